"""At least how many tokens a text has, known from its length alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_LETTERS: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
PRINTABLE = range(0x20, 0x7F)
CONTINUATION = range(0x80, 0xC0)  # bytes within a character
MAX_COMPOSED = 4  # characters that NFC and NFKC make one of at most
COMPOSING, LENGTHENING = ("NFC", "NFKC"), ("NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel")
KEEPING = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Punctuation", "Split")
DROPPING_WHITESPACE = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
ONLY_WHITESPACE = re.compile(r"( |\\s|\\n|\\t|\\r|\[( |\\s)+\]|\{\d*,?\d*\}|[+*])+")  # patterns that match nothing else


@dataclass(frozen=True)
class TokenBound:
    """One token stands for `max_length` bytes of a text's UTF-8 at most, or for as many characters.

    Whitespace counts where no step of the tokenizer drops or swallows it; bytes do not that the vocabulary has no
    token for. Of a text beyond ASCII `num_composed` characters may become one before it is cut into tokens.
    """

    max_length: int
    counts_bytes: bool
    counts_whitespace: bool
    unknown_bytes: bytes
    num_composed: int

    def least_tokens(self, text: str) -> int:
        counted = (text if self.counts_whitespace else "".join(text.split())).encode()
        counted = counted.translate(None, delete=self.unknown_bytes)
        if self.counts_bytes:
            return -(-len(counted) // self.max_length)
        num_characters = len(counted.translate(None, delete=bytes(CONTINUATION)))
        return -(-num_characters // (self.max_length * (1 if text.isascii() else self.num_composed)))


def has_plain_backend(tokenizer: Any) -> bool:
    """Whether `tokenizer(text)` is what its backend, of the package `tokenizers`, makes of the text."""
    return (
        isinstance(tokenizer, TokenizersBackend)
        and type(tokenizer).__call__ is PreTrainedTokenizerBase.__call__
        and type(tokenizer)._encode_plus is TokenizersBackend._encode_plus
    )


def token_bound(tokenizer: Any) -> TokenBound | None:
    """None for a tokenizer that may drop characters, join unknown ones in one token, or shorten a text by a step that
    is not known here."""
    if not has_plain_backend(tokenizer):
        return None
    backend = tokenizer.backend_tokenizer
    normalizers, pre_tokenizers = _steps(backend.normalizer), _steps(backend.pre_tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    vocab = backend.get_vocab(with_added_tokens=True)
    is_byte_level = any(step["type"] == "ByteLevel" for step in (*normalizers, *pre_tokenizers))
    unknown_bytes = _unknown_bytes(backend.model, vocab, is_byte_level)
    if (
        unknown_bytes is None
        or not all(_keeps_text(step) for step in _steps(backend.post_processor))
        or not all(map(_is_understood, normalizers))
        or not all(map(_is_kept, pre_tokenizers))
    ):
        return None
    changes_length = any(step["type"] in (*COMPOSING, "NFD", "NFKD", "Lowercase") for step in normalizers)
    if changes_length and any(PRINTABLE.start <= byte < CONTINUATION.stop for byte in unknown_bytes):
        return None
    swallows = any(token.lstrip or token.rstrip for token in added)
    lengths = [len(token) if is_byte_level or changes_length else len(token.encode()) for token in vocab]
    lengths += [len(token.content) if changes_length else len(token.content.encode()) for token in added]
    return TokenBound(
        max_length=max(lengths),
        counts_bytes=not changes_length,
        counts_whitespace=not (swallows or any(map(_drops_whitespace, (*normalizers, *pre_tokenizers)))),
        unknown_bytes=unknown_bytes,
        num_composed=MAX_COMPOSED if any(step["type"] in COMPOSING for step in normalizers) else 1,
    )


def _steps(component: Any) -> list[dict[str, Any]]:
    """Its steps, in their order, sequences taken apart."""
    return [] if component is None else _flat(json.loads(component.__getstate__()))


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    parts = next(value for name, value in step.items() if name != "type")
    return [inner for part in parts for inner in _flat(part)]


def _unknown_bytes(model: Any, vocab: dict[str, int], is_byte_level: bool) -> bytes | None:
    """Those that may become no token, or one token together with others. None if characters may."""
    if not isinstance(model, BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if is_byte_level:
        return bytes(byte for byte, letter in BYTE_LETTERS.items() if letter not in vocab)
    return b"" if model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256)) else None


def _keeps_text(step: dict[str, Any]) -> bool:
    return step["type"] != "TemplateProcessing" or any(
        "Sequence" in piece and piece["Sequence"]["id"] == "A" for piece in step["single"]
    )


def _is_understood(step: dict[str, Any]) -> bool:
    """A normalizer that keeps every character, or as many of them, but for whitespace and what NFC composes."""
    if step["type"] == "Replace":
        pattern, content = next(iter(step["pattern"].items())), step["content"]
        is_whole = len(content) >= len(pattern[1]) and len(content.encode()) >= len(pattern[1].encode())
        if pattern[0] == "String" and is_whole and (not content.isspace() or pattern[1].isspace()):
            return True
    return step["type"] in (*COMPOSING, *LENGTHENING, "Strip") or _drops_whitespace(step)


def _is_kept(step: dict[str, Any]) -> bool:
    """A pre-tokenizer that drops no characters but whitespace."""
    return (step["type"] in KEEPING and step.get("behavior") != "Removed") or _drops_whitespace(step)


def _drops_whitespace(step: dict[str, Any]) -> bool:
    """Whether a step may drop whitespace, and nothing else."""
    kind = step["type"]
    if kind == "Strip" or kind in DROPPING_WHITESPACE:
        return True
    if kind == "CharDelimiterSplit":
        return bool(step["delimiter"].isspace())
    if kind == "Replace":
        ((how, pattern),) = step["pattern"].items()
        if how == "String" and len(step["content"]) >= len(pattern):
            return False
    elif kind == "Split" and step["behavior"] == "Removed" and not step["invert"]:
        ((how, pattern),) = step["pattern"].items()
    else:
        return False
    return bool(pattern.isspace() if how == "String" else ONLY_WHITESPACE.fullmatch(pattern))
