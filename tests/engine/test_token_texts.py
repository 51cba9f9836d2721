"""The text of an answer behind its prompt, piece by piece, against what the tokenizer makes of all tokens at once."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.detokenizer import Detokenizer, Place
from server.engine.token_texts import TokenTexts
from tests.tokenizer_makes import MAKES

REPLACEMENT = "\ufffd"
tokenizer_of = cache(lambda make: MAKES[make]())
FEW = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
    return text


def is_well_defined(tokenizer: Any, ids: list[int], start: int) -> bool:
    """No token changes text that is complete before it, and the prompt has no broken character."""
    whole = decode(tokenizer, ids)
    texts = [decode(tokenizer, ids[:end]) for end in range(start, len(ids))]
    return REPLACEMENT not in texts[0] and all(whole.startswith(text.rstrip(REPLACEMENT)) for text in texts)


def answer(tokenizer: Any, prompt: list[int], ids: list[int], **more: Any) -> tuple[str, list[Place]]:
    detokenizer = Detokenizer(tokenizer, context_ids=prompt, **more)
    pieces, places = [], []
    for token_id in ids:
        places.append(detokenizer.place(token_id))
        pieces.append(detokenizer.append(token_id))
        assert "".join(pieces) == detokenizer.text
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return detokenizer.text, places


@st.composite
def splits(draw: Any, make: str) -> tuple[list[int], int]:
    """Tokens, more of them text than bytes, and where the answer begins."""
    size = len(tokenizer_of(make))
    few = st.integers(max(0, size - 40), size - 1)
    ids = draw(st.lists(st.one_of(few, st.integers(0, size - 1), few), min_size=1, max_size=40))
    return ids, draw(st.integers(0, len(ids) - 1))


@pytest.mark.parametrize("make", MAKES)
def test_answer_is_what_all_tokens_read_beyond_the_prompt(make: str) -> None:
    tokenizer = tokenizer_of(make)
    seen = []

    @FEW
    @given(splits(make))
    def check(split: tuple[list[int], int]) -> None:
        ids, start = split
        text, places = answer(tokenizer, ids[:start], ids[start:])
        if not is_well_defined(tokenizer, ids, start):
            return
        seen.append(ids)
        assert text == decode(tokenizer, ids)[len(decode(tokenizer, ids[:start])) :]
        assert [place.offset for place in places] == sorted(place.offset for place in places)
        assert all(place.offset <= len(text) for place in places)

    check()
    assert len(seen) > 20


@pytest.mark.parametrize("make", MAKES)
def test_bytes_of_an_answers_tokens_join_to_its_utf8(make: str) -> None:
    tokenizer = tokenizer_of(make)
    texts = TokenTexts(tokenizer)
    words = ["the cat", " the ab", "a你 é🎬", "नम\ufffd.", "  ing,\nthe"]

    @FEW
    @given(st.lists(st.sampled_from(words), max_size=3), st.lists(st.sampled_from(words), min_size=1, max_size=4))
    def check(before: list[str], chosen: list[str]) -> None:
        prompt, ids = (tokenizer("".join(each), add_special_tokens=False)["input_ids"] for each in (before, chosen))
        text, places = answer(tokenizer, prompt, ids)
        read = [texts.read(token_id, place.behind) for token_id, place in zip(ids, places, strict=True)]
        assert b"".join(token.encoded for token in read) == text.encode()
        position = 0
        for token, place in zip(read, places, strict=True):
            assert place.offset == len(text.encode()[:position].decode("utf-8", "ignore"))
            if token.encoded and REPLACEMENT not in token.text:
                assert text.startswith(token.text, place.offset)
            position += len(token.encoded)

    check()


@pytest.mark.parametrize("make", ["byte-level", "sentencepiece-prepend", "sentencepiece-mistral", "byt5"])
def test_a_character_begun_in_the_prompt_is_whole_in_the_answer(make: str) -> None:
    tokenizer = tokenizer_of(make)
    texts = TokenTexts(tokenizer)
    size = len(tokenizer)
    byte_of = {read.encoded: i for i in range(size) if len((read := texts.read(i, ())).encoded) == 1}
    cut = [byte_of[bytes([byte])] for byte in "🎬".encode()]
    a = tokenizer("a", add_special_tokens=False)["input_ids"]
    for num_before in range(1, 4):
        assert answer(tokenizer, a + cut[:num_before], cut[num_before:] + a[-1:])[0] == "🎬a"
        unfinished = answer(tokenizer, a + cut[:num_before], a[-1:])[0]
        assert unfinished.strip(REPLACEMENT) == "a"
