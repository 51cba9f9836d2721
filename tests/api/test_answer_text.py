"""The text of answers over HTTP, from models with tokenizers of several makes that answer with known tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config

from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, Served, serve_in_thread, settings_for
from tests.tiny_models import seq2seq_model
from tests.tokenizer_makes import MAKES, save_scripted_model, sentencepiece

PROMPT = "the cat"
HELLO = [{"role": "user", "content": "the"}]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}</s>ab:{% endif %}"
# " the cat你 🎬." and the end; 你 and 🎬 in bytes.
SCRIPT = ["▁the", "▁cat", "<0xE4>", "<0xBD>", "<0xA0>", "▁", "<0xF0>", "<0x9F>", "<0x8E>", "<0xAC>", ".", "</s>"]
TEXT = " the cat你 🎬."
OFFSETS = [0, 4, 8, 8, 8, 9, 10, 10, 10, 10, 11, 12]
ENCODED = [b" the", b" cat", b"\xe4", b"\xbd", b"\xa0", b" ", b"\xf0", b"\x9f", b"\x8e", b"\xac", b".", b""]


@contextmanager
def serving(path: Path, tokenizer: Any, script: list[int]) -> Iterator[Served]:
    save_scripted_model(path / NAME, tokenizer, script)
    yield from serve_in_thread(make_state(settings_for(path / "data"), ModelFiles(path / NAME, NAME)))


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tokenizer = sentencepiece("prepend")
    tokenizer.chat_template = CHAT_TEMPLATE
    with serving(tmp_path_factory.mktemp("llama2"), tokenizer, tokenizer.convert_tokens_to_ids(SCRIPT)) as served:
        yield served


def complete(served: Served, **fields: object) -> dict[str, Any]:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 16, "temperature": 0} | fields
    answer: dict[str, Any] = served.http.post("/v1/completions", json=body).json()["choices"][0]
    return answer


def chat(served: Served, **fields: object) -> dict[str, Any]:
    body = {"model": NAME, "messages": HELLO, "max_tokens": 16, "temperature": 0} | fields
    answer: dict[str, Any] = served.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    return answer


def events(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = served.http.post(path, json=body | {"stream": True}).text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]


def chunks(served: Served, path: str, **fields: object) -> list[dict[str, Any]]:
    asked = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": HELLO}
    body = {"model": NAME, "max_tokens": 16, "temperature": 0} | asked | fields
    return [event["choices"][0] for event in events(served, path, body)]


def test_first_space_of_an_answer_is_kept_on_every_route(llama2: Served) -> None:
    answer = llama2.generate(PROMPT, details=True).json()
    assert answer["generated_text"] == TEXT
    assert "".join(token["text"] for token in answer["details"]["tokens"]) == TEXT
    assert llama2.generate(PROMPT, return_full_text=True).json()["generated_text"] == PROMPT + TEXT
    streamed = events(llama2, "/generate_stream", {"inputs": PROMPT, "parameters": {"return_full_text": True}})
    assert "".join(event["token"]["text"] for event in streamed) == TEXT
    assert streamed[-1]["generated_text"] == PROMPT + TEXT
    assert complete(llama2)["text"] == TEXT
    assert "".join(choice["text"] for choice in chunks(llama2, "/v1/completions")) == TEXT
    assert chat(llama2)["message"]["content"] == TEXT
    assert "".join(choice["delta"]["content"] for choice in chunks(llama2, "/v1/chat/completions")) == TEXT


def test_stop_string_with_the_first_space_matches(llama2: Served) -> None:
    answer = llama2.generate(PROMPT, stop=[" the"], details=True).json()
    assert (answer["generated_text"], answer["details"]["finish_reason"]) == (" the", "stop_sequence")
    choice = complete(llama2, stop=" the")
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_logprobs_of_a_completion_point_into_its_text(llama2: Served) -> None:
    choice = complete(llama2, logprobs=2)
    assert choice["text"] == TEXT
    assert choice["logprobs"]["text_offset"] == OFFSETS
    assert choice["logprobs"]["tokens"] == [token.decode("utf-8", "replace") for token in ENCODED[:-1]] + ["</s>"]
    for token, top in zip(choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True):
        assert token in top


@pytest.mark.parametrize("stop", [None, "你", " 🎬", "🎬."])
def test_streamed_logprobs_are_those_of_the_whole_answer(llama2: Served, stop: str | None) -> None:
    whole = complete(llama2, logprobs=0, stop=stop)
    streamed = chunks(llama2, "/v1/completions", logprobs=0, stop=stop)
    assert "".join(choice["text"] for choice in streamed) == whole["text"] == TEXT.partition(stop or "\0")[0]
    found = [choice["logprobs"] for choice in streamed if choice["logprobs"]]
    for name in ("tokens", "text_offset"):
        assert [value for each in found for value in each[name]] == whole["logprobs"][name]
    expected = [min(offset, len(whole["text"])) for offset in OFFSETS]
    assert whole["logprobs"]["text_offset"] == expected[: len(whole["logprobs"]["text_offset"])]


def test_bytes_in_a_chats_logprobs_join_to_its_utf8(llama2: Served) -> None:
    content = chat(llama2, logprobs=True, top_logprobs=20)["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in content] == ENCODED
    assert content[-1]["token"] == "</s>"
    streamed = [c["logprobs"] for c in chunks(llama2, "/v1/chat/completions", logprobs=True) if c["logprobs"]]
    assert [bytes(entry["bytes"]) for each in streamed for entry in each["content"]] == ENCODED
    for entry in content:
        top = {each["token"]: each["bytes"] for each in entry["top_logprobs"] if "\ufffd" not in each["token"]}
        assert top.pop("</s>", []) == top.pop("<s>", []) == top.pop("<unk>", []) == []
        assert all(bytes(encoded).decode() == token for token, encoded in top.items())


@pytest.mark.parametrize("make", MAKES)
def test_answer_of_every_make_is_served_whole(tmp_path: Path, make: str) -> None:
    tokenizer = MAKES[make]()
    words = list(dict.fromkeys(tokenizer("the 你cat", add_special_tokens=False)["input_ids"]))
    words = [i for i in words if i not in tokenizer.all_special_ids]
    no_token = [] if make == "ctrl" else [len(tokenizer)]  # CTRL's reads <unk> there, the others nothing
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    script = [words[0], *no_token, *words[1:], *end]
    with serving(tmp_path, tokenizer, script) as served:
        prompt = tokenizer("cat ab")["input_ids"]
        both, before = (tokenizer.decode(ids, skip_special_tokens=True) for ids in ([*prompt, *words], prompt))
        expected = both[len(before) :]
        answer = served.generate("cat ab", details=True, max_new_tokens=len(script)).json()
        assert answer["generated_text"] == expected
        assert "".join(token["text"] for token in answer["details"]["tokens"]) == expected
        assert complete(served, prompt="cat ab", max_tokens=len(script))["text"] == expected
        fields = {"prompt": "cat ab", "max_tokens": len(script), "logprobs": 1}
        assert "".join(choice["text"] for choice in chunks(served, "/v1/completions", **fields)) == expected


@pytest.mark.parametrize("make", ["unigram", "unigram-cleaned-up", "byt5"])
def test_answer_of_an_encoder_decoder_reads_as_its_own_tokens(tmp_path: Path, make: str) -> None:
    tokenizer = MAKES[make]()
    tokenizer.save_pretrained(tmp_path / NAME)
    torch.manual_seed(1)
    sizes = {"vocab_size": len(tokenizer), "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "decoder_start_token_id": 0}
    seq2seq_model(T5Config(**sizes, **ends, initializer_factor=1.5)).save_pretrained(tmp_path / NAME)
    for served in serve_in_thread(make_state(settings_for(tmp_path / "data"), ModelFiles(tmp_path / NAME, NAME))):
        for seed in range(4):
            sampling = {"do_sample": True, "temperature": 2.0, "seed": seed, "max_new_tokens": 24}
            answer = served.generate("the cat", details=True, **sampling).json()
            ids = [token["id"] for token in answer["details"]["tokens"]]
            assert answer["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert "".join(token["text"] for token in answer["details"]["tokens"]) == answer["generated_text"]
