"""What a tokenizer's ids read as: the text of many, the text and the bytes of one behind others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"  # what decoders give for bytes that are no character, or not yet
BYTE_LEVEL: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
BYTE_OF_LETTER = {letter: byte for byte, letter in BYTE_LEVEL.items()}
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of vocabularies with byte fallback
UNCERTAIN = re.compile(r" (n'?|'[rv]?)?\Z")  # the beginning of what transformers' `clean_up_tokenization` shortens


@dataclass(frozen=True)
class TokenText:
    """One token as a caller sees it. `encoded` is its part of the text's UTF-8, empty for a token that is no text;
    `text` is for people: a part of a character reads as U+FFFD, a special token as its name."""

    text: str
    encoded: bytes


class TokenTexts:
    """Decodes ids of any tokenizer that transformers loads. Special tokens, and ids that the tokenizer has no token
    for, are no text.

    `decode` gives the text of many tokens, `decode_certain` the part of it that no further token changes, but for a
    last character that may be incomplete. They differ where a tokenizer, written in Python, joins words only when the
    next token is known ("hel@@", "lo"), and where it takes spaces out of decoded text ("do n't").
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._cleans_up = _cleans_up(tokenizer)
        self._special_ids: frozenset[int] = frozenset()
        self._next_word: list[int] = []
        self.decode: Callable[[list[int]], str]
        self.decode_certain: Callable[[list[int]], str]
        if self._backend is None:
            self._special_ids = special_token_ids(tokenizer)
            encoded = tokenizer("a", add_special_tokens=False)["input_ids"]
            self._next_word = [i for i in encoded if i is not None and i not in self._special_ids]
            self.decode, self.decode_certain = self._decode_in_python, self._decode_certain
        elif self._cleans_up:
            self.decode, self.decode_certain = self._decode_and_clean_up, self._decode_certain
        else:
            self.decode = self.decode_certain = self._backend.decode  # which skips special tokens

    def read(self, token_id: int, behind: Sequence[int]) -> TokenText:
        """One token behind others, which begin no character that they do not end."""
        alone = self.decode([token_id])
        if not alone and (named := self._name(token_id)) is not None:
            return TokenText(named, b"")
        if not alone or REPLACEMENT in alone:
            for encoded in self._byte_readings(token_id):
                # Decoders replace what is no character, or leave it out.
                if alone in (encoded.decode("utf-8", "replace"), encoded.decode("utf-8", "ignore")):
                    return TokenText(alone or encoded.decode("utf-8", "replace"), encoded)
        before, whole = self.decode_certain([*behind]), self.decode_certain([*behind, token_id])
        text = whole[len(before) :] if whole.startswith(before) else alone
        return TokenText(text, text.encode())

    def _name(self, token_id: int) -> str | None:
        """Of a special token; empty for an id without a token; None for a token that is text."""
        token = self._token(token_id)
        if not token:
            return ""
        if self._backend is None:
            return token if token_id in self._special_ids else None
        return token if self._backend.decode([token_id], skip_special_tokens=False) else None

    def _byte_readings(self, token_id: int) -> list[bytes]:
        """The bytes that the token may stand for where its text is no character: byte fallback, byte-level, latin-1."""
        token = self._token(token_id) or ""
        readings = []
        if match := BYTE_TOKEN.fullmatch(token):
            readings.append(bytes.fromhex(match[1]))
        if all(letter in BYTE_OF_LETTER for letter in token):
            readings.append(bytes(BYTE_OF_LETTER[letter] for letter in token))
        if self._backend is None and all(ord(letter) < 256 for letter in token):
            readings.append(token.encode("latin-1"))
        return readings

    def _token(self, token_id: int) -> str | None:
        if self._backend is not None:
            token: str | None = self._backend.id_to_token(token_id)
            return token
        return self._tokenizer.convert_ids_to_tokens(token_id) if self._is_known(token_id) else None

    def _decode_in_python(self, ids: list[int]) -> str:
        ids = [i for i in ids if i not in self._special_ids]
        try:
            return self._join(ids)
        except Exception:  # a tokenizer raises what it likes for an id that it does not know
            return self._join([i for i in ids if self._is_known(i)])

    def _decode_and_clean_up(self, ids: list[int]) -> str:
        text: str = self._tokenizer.clean_up_tokenization(self._backend.decode(ids))
        return text

    def _decode_certain(self, ids: list[int]) -> str:
        text = self.decode(ids)
        if self._next_word and text:
            longer = self.decode([*ids, *self._next_word])
            num_same = next((i for i, (a, b) in enumerate(zip(text, longer, strict=False)) if a != b), len(longer))
            text = text[:num_same]
        return UNCERTAIN.sub("", text) if self._cleans_up else text

    def _join(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids) if ids else ""
        return text

    def _is_known(self, token_id: int) -> bool:
        try:
            self._join([token_id])
        except Exception:  # as above
            return False
        return True


def _cleans_up(tokenizer: Any) -> bool:
    """Whether `tokenizer.decode` takes out spaces before punctuation, which transformers leaves to few makes."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return is_forced or type(getattr(backend, "model", None)).__name__ != "BPE"


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that are no text: those with a name of their own, as EOS, and those added as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = getattr(tokenizer, "all_special_ids", ())
    return frozenset(named) | {token_id for token_id, token in added.items() if token.special}
