"""Text of rows whose byte tokens do not make characters."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.engine.detokenizer import Detokenizer

# The three bytes of 你, a line's end, and the beginning of a character that does not follow.
NI = ["<0xE4>", "<0xBD>", "<0xA0>"]
TOKENS = ["A", "b", "c", "<0x0A>", "<0xE2>", *NI]
FAULT = ["A", "<0x0A>", "<0xE2>", "b"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="A"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def feed(detokenizer: Detokenizer, tokens: list[str]) -> list[str]:
    """The pieces of the tokens and of the end; each holds to what `text` says."""
    pieces = []
    for token in tokens:
        pieces.append(detokenizer.append(TOKENS.index(token)))
        assert "".join(pieces) == detokenizer.text
        if detokenizer.is_stopped:
            break
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return pieces


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (FAULT, ["A", "\n", "", "�b", ""]),
        ([*FAULT, "c", "<0x0A>", *NI, "A"], ["A", "\n", "", "�b", "c", "\n", "", "", "你", "A", ""]),
        ([*FAULT, *FAULT], ["A", "\n", "", "�b"] * 2 + [""]),
        (["A", *NI, "<0xE2>", "b"], ["A", "", "", "你", "", "�b", ""]),
        # The end comes amid the bytes: before any fault was seen, after one, and within a character.
        (["A", *NI, "<0xE2>"], ["A", "", "", "你", "", "�"]),
        ([*FAULT, *NI, "<0xE2>"], ["A", "\n", "", "�b", "", "", "你", "", "�"]),
        ([*FAULT, "c", *NI[:2]], ["A", "\n", "", "�b", "c", "", "", "��"]),
        # None of these is a fault.
        (["A", "<0xE2>", "b"], ["A", "", "�b", ""]),
        (["A", "<0x0A>", *NI, "b"], ["A", "\n", "", "", "你", "b", ""]),
        (["A", *NI[:2]], ["A", "", "", "��"]),
    ],
)
def test_invalid_bytes_become_replacement_characters(
    tokenizer: PreTrainedTokenizerFast, tokens: list[str], pieces: list[str]
) -> None:
    assert feed(Detokenizer(tokenizer), tokens) == pieces


@pytest.mark.parametrize("stop", ["bc", "\n�b", "cA"])
@pytest.mark.parametrize("include_stop", [True, False])
def test_stop_strings_after_invalid_bytes(tokenizer: PreTrainedTokenizerFast, stop: str, include_stop: bool) -> None:
    detokenizer = Detokenizer(tokenizer, (stop,), include_stop)
    feed(detokenizer, [*FAULT, "c", "A", "c"])
    assert detokenizer.is_stopped
    before = "A\n�bcAc".partition(stop)[0]
    assert detokenizer.text == (before + stop if include_stop else before)


def test_what_may_yet_be_a_stop_string_comes_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    assert feed(Detokenizer(tokenizer, ("�bcA",), False), [*FAULT, "c"]) == ["A", "\n", "", "", "", "�bc"]


def test_a_stop_string_of_held_back_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(tokenizer, ("c�",), False)
    assert "".join(feed(detokenizer, [*FAULT, "c", "<0xE2>"])) == "A\n�b"
    assert detokenizer.is_stopped
