"""The bound on a text's tokens from its length: never more than the text has, and there where it can be."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.engine.token_bound import token_bound
from tests.tokenizer_makes import BYTES, CHARACTERS, LETTERS, MAKES, SPECIAL, WORDS, fast

BOUNDED = {"byte-level", "byte-level-prefix-space", *(name for name in MAKES if name.startswith("sentencepiece"))}
PIECES = [
    *"aZ9 \t\n\x04\x00\u2003\u00a0",
    "  ",
    " " * 40,
    "e\u0301",
    "\u03b1\u0313\u0301\u0345",
    "\u1100\u1161\u11a8",
    "K",
    "İ",
]
PIECES += [*CHARACTERS, *SPECIAL, "the", " the", "▁▁", "<0xE4>", "\U000f0000", "ﷺ", "``", "<pad>", "\u200b"]


def byte_letters(without: str = "") -> Tokenizer:
    letters = [letter for letter in bytes_to_unicode().values() if letter not in without]
    backend = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *letters, "ab"])}, merges=[("a", "b")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def with_bytes(normalizer: Any = None, pre_tokenizer: Any = None, *, drops: str = "") -> Any:
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *BYTES, *WORDS, *LETTERS])) if token != drops}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return fast(backend)


def with_added(**strips: bool) -> Any:
    tokenizer = fast(byte_letters())
    tokenizer.add_tokens([AddedToken("<pad>", special=True, **strips)])
    return tokenizer


def composing() -> Any:
    backend = byte_letters()
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return fast(backend)


def truncating() -> Any:
    backend = byte_letters()
    backend.enable_truncation(4)
    return fast(backend)


SHRINKING = {
    "a letter of a control byte missing": lambda: fast(byte_letters(without="ĄÄ")),
    "NFKC and lowercase": composing,
    "tokens that swallow spaces on their left": lambda: with_added(lstrip=True),
    "tokens that swallow spaces on their right": lambda: with_added(rstrip=True),
    "truncation": truncating,
    "NFC": lambda: with_bytes(normalizers.NFC()),
    "spaces collapse": lambda: with_bytes(normalizers.Replace(Regex(" {2,}"), " ")),
    "spaces are stripped": lambda: with_bytes(normalizers.Strip()),
    "spaces are dropped": lambda: with_bytes(None, pre_tokenizers.WhitespaceSplit()),
    "spaces are removed": lambda: with_bytes(None, pre_tokenizers.Split(Regex(r"\s+"), "removed")),
    "spaces delimit": lambda: with_bytes(None, pre_tokenizers.CharDelimiterSplit(" ")),
    "a letter delimits": lambda: with_bytes(None, pre_tokenizers.CharDelimiterSplit("a")),
    "letters become a space that is dropped": lambda: with_bytes(
        normalizers.Replace("a", " "), pre_tokenizers.WhitespaceSplit()
    ),
    "text is deleted": lambda: with_bytes(normalizers.Replace("a", "")),
    "text is shortened": lambda: with_bytes(normalizers.Replace("``", '"')),
    "accents are stripped": lambda: with_bytes(normalizers.StripAccents()),
    "control characters are removed": lambda: with_bytes(normalizers.Nmt()),
    "BERT's normalizer": lambda: with_bytes(normalizers.BertNormalizer()),
    "punctuation is removed": lambda: with_bytes(None, pre_tokenizers.Punctuation("removed")),
    "no byte fallback for one byte": lambda: with_bytes(drops="<0xE4>"),
}


def texts(seed: int) -> list[str]:
    chance = random.Random(seed)
    repeated = [piece * 300 for piece in PIECES]
    mixed = ["".join(chance.choices(PIECES, k=chance.randrange(1, 200))) for _ in range(60)]
    return [*repeated, *(f"{one}<pad>{one}" for one in ("  " * 100, "\n" * 50)), *mixed]


@pytest.mark.parametrize("make", [*MAKES, *SHRINKING])
def test_no_text_has_fewer_tokens_than_its_bound(make: str) -> None:
    tokenizer = (MAKES | SHRINKING)[make]()
    bound = token_bound(tokenizer)
    assert (bound is not None) == (make in BOUNDED) or make in SHRINKING
    if bound is None:
        return
    longest = sorted(tokenizer.get_vocab(), key=len)[-3:]
    for text in [*texts(len(make)), *(token * 50 for token in longest)]:
        assert bound.least_tokens(text) <= len(tokenizer(text)["input_ids"]), text[:40]


def test_what_may_shrink_without_bound_has_none() -> None:
    unbounded = {make for make in SHRINKING if token_bound(SHRINKING[make]()) is None}
    assert unbounded == {
        "a letter delimits",
        "letters become a space that is dropped",
        "text is deleted",
        "text is shortened",
        "accents are stripped",
        "control characters are removed",
        "BERT's normalizer",
        "punctuation is removed",
        "no byte fallback for one byte",
    }


def test_a_bound_is_close_for_a_text_of_the_longest_token() -> None:
    tokenizer = fast(byte_letters())
    bound = token_bound(tokenizer)
    assert bound is not None
    assert bound.least_tokens("a" * 5000) == -(-5000 // len("<unk>"))
