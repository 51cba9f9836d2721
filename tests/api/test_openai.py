"""OpenAI's routes: shapes, streams, log-probabilities, errors in OpenAI's body."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from server.api.schemas import ChatRequest, CompletionRequest
from tests.conftest import NAME, Served, native

PROMPT = "A fine film."
HELLO = [{"role": "user", "content": "Hello"}]


def complete(served: Served, **fields: object) -> httpx.Response:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | fields
    return served.http.post("/v1/completions", json=body)


def chat(served: Served, **fields: object) -> httpx.Response:
    body = {"model": NAME, "messages": HELLO, "max_tokens": 8, "temperature": 0} | fields
    return served.http.post("/v1/chat/completions", json=body)


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_completion_equals_generate(served: Served, films: str) -> None:
    answer = complete(served, model=films).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == served.generate(PROMPT, films, max_new_tokens=8).json()["generated_text"]
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    assert answer["usage"]["total_tokens"] == len(PROMPT) + answer["usage"]["completion_tokens"]
    assert answer["system_fingerprint"]


def test_completion_defaults_to_sixteen_sampled_tokens(served: Served) -> None:
    body = {"model": NAME, "prompt": "x", "ignore_eos": True}
    answers = [served.http.post("/v1/completions", json=body).json() for _ in range(3)]
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {16}
    assert len({answer["choices"][0]["text"] for answer in answers}) > 1


def test_seed_repeats_and_choices_differ(served: Served) -> None:
    fields = {"temperature": 1.5, "seed": 11, "n": 3, "max_tokens": 12}
    first, again = (complete(served, **fields).json()["choices"] for _ in range(2))
    assert first == again
    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert len({choice["text"] for choice in first}) == 3


def test_stream_joins_to_the_whole_answer_for_every_choice(served: Served, films: str) -> None:
    fields = {"model": films, "temperature": 1.0, "seed": 5, "n": 2, "max_tokens": 20}
    whole = complete(served, **fields).json()
    found = chunks(complete(served, **fields, stream=True, stream_options={"include_usage": True}))
    usage = found.pop()
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in found if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == whole["choices"][index]["text"]
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == [
            whole["choices"][index]["finish_reason"]
        ]
    assert all(chunk["usage"] is None for chunk in found)


@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize("include_usage", [True, False])
def test_continuous_usage_counts_up_to_each_chunk(served: Served, ask: Any, include_usage: bool) -> None:
    fields = {"temperature": 1.0, "seed": 5, "n": 2, "max_tokens": 20}
    whole = ask(served, **fields).json()["usage"]
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    found = chunks(ask(served, **fields, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert counts == sorted(counts)
    assert len(set(counts)) > 5
    assert {chunk["usage"]["prompt_tokens"] for chunk in found} == {whole["prompt_tokens"]}
    assert all(
        chunk["usage"]["total_tokens"] == whole["prompt_tokens"] + n for chunk, n in zip(found, counts, strict=True)
    )
    assert found[-1]["usage"]["completion_tokens"] == whole["completion_tokens"]
    assert [chunk["choices"] for chunk in found].count([]) == include_usage
    unstreamed = ask(served, **fields, stream_options=options).json()["usage"]
    assert unstreamed["completion_tokens"] == whole["completion_tokens"]


@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize("stream", [True, False])
def test_min_tokens_holds_on_both_routes_streamed_or_not(served: Served, ask: Any, stream: bool) -> None:
    def num_tokens(**fields: object) -> int:
        answer = ask(served, **fields, stream=stream, stream_options={"include_usage": True})
        usage = chunks(answer)[-1]["usage"] if stream else answer.json()["usage"]
        return int(usage["completion_tokens"])

    hot = {"temperature": 2.0, "max_tokens": 200}
    short = next(seed for seed in range(50) if num_tokens(**hot, seed=seed) < 150)
    assert num_tokens(**hot, seed=short, min_tokens=150) >= 150
    assert num_tokens(**hot, seed=short, min_tokens=None) < 150
    assert num_tokens(**hot, seed=short, min_tokens=200) == 200


def test_stop_is_left_out(served: Served) -> None:
    whole = complete(served, max_tokens=40, ignore_eos=True).json()["choices"][0]["text"]
    stop = next(c for c in whole[3:] if c.isascii() and c.isprintable() and c not in whole[:3])
    for value in (stop, [stop]):
        choice = complete(served, max_tokens=40, stop=value, ignore_eos=True).json()["choices"][0]
        assert choice["text"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"


def test_completion_logprobs(served: Served) -> None:
    logprobs = complete(served, logprobs=3, ignore_eos=True).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 8
    for logprob, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert logprob == pytest.approx(max(top.values()))  # greedy
    assert complete(served).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("num_top", [0, 2])
def test_chosen_token_is_among_the_top_logprobs(served: Served, num_top: int) -> None:
    logprobs = complete(served, logprobs=num_top, temperature=2, seed=1, ignore_eos=True).json()["choices"][0][
        "logprobs"
    ]
    for token, logprob, top in zip(*(logprobs[n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert num_top <= len(top) <= num_top + 1
        assert top[token] >= logprob  # two tokens may read the same


def test_streamed_logprobs_join_to_the_whole(served: Served, films: str) -> None:
    fields = {"model": films, "temperature": 1.0, "seed": 5, "n": 2, "max_tokens": 12, "logprobs": 1}
    whole = complete(served, **fields).json()["choices"]
    found = [chunk["choices"][0] for chunk in chunks(complete(served, **fields, stream=True))]
    for index in range(2):
        mine = [choice["logprobs"] for choice in found if choice["index"] == index]
        for name, values in whole[index]["logprobs"].items():
            joined = [value for logprobs in mine for value in logprobs[name]]
            if name == "top_logprobs":
                assert [list(top) for top in joined] == [list(top) for top in values]
            else:  # the last bits of a product depend on how many rows run beside
                assert joined == (pytest.approx(values, abs=1e-5) if name == "token_logprobs" else values)


def test_seed_may_be_any_of_openais(served: Served) -> None:
    for seed in (-(2**63), -1, 2**63 - 1):
        first, again = (complete(served, temperature=2, seed=seed, n=2).json()["choices"] for _ in range(2))
        assert first == again
        assert first[0]["text"] != first[1]["text"]


def test_chat_goes_through_the_models_template(served: Served) -> None:
    answer = chat(served, max_tokens=10).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] == len("user: Hello") + 3 + len("assistant:")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert chat(served, max_tokens=10, messages=parts).json()["choices"] == answer["choices"]


def test_chat_stream_joins_to_the_whole_answer(served: Served, films: str) -> None:
    whole = chat(served, model=films, max_tokens=20).json()["choices"][0]
    found = chunks(chat(served, model=films, max_tokens=20, stream=True))
    assert found[0]["object"] == "chat.completion.chunk"
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in found)
    assert text == whole["message"]["content"]
    assert found[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_chat_logprobs(served: Served) -> None:
    content = chat(served, logprobs=True, top_logprobs=4, ignore_eos=True).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    for entry in content:
        assert len(entry["top_logprobs"]) == 4
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]


def test_chat_without_a_limit_fits_the_context(served: Served) -> None:
    answer = chat(served, max_tokens=None, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] <= 256
    assert chat(served, max_tokens=None, max_completion_tokens=3).json()["usage"]["completion_tokens"] <= 3


def test_conversation_that_the_template_refuses_is_the_callers_error(served: Served) -> None:
    response = chat(served, messages=[{"role": "assistant", "content": "I"}])
    assert response.status_code == 400
    assert "the user speaks first" in response.json()["error"]["message"]


@pytest.mark.parametrize("model", ["nothing", "films@99", "No Such", "a/b"])
@pytest.mark.parametrize("ask", [complete, chat])
def test_unknown_model_is_not_found(served: Served, films: str, ask: Any, model: str) -> None:
    response = ask(served, model=model)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("ask", "name", "value"),
    [
        (complete, "echo", True),
        (complete, "best_of", 3),
        (complete, "suffix", "end"),
        (complete, "logit_bias", {"3": 1}),
        (complete, "prompt", ["a", "b"]),
        (complete, "prompt", [1, 2]),
        (complete, "frequency_penalty", 0.5),
        (complete, "presence_penalty", 0.5),
        (complete, "logprobs", 6),
        (complete, "n", 0),
        (complete, "temperature", 3),
        (complete, "max_tokens", 0),
        (complete, "no_such_field", 1),
        (chat, "tools", [{"type": "function", "function": {"name": "f"}}]),
        (chat, "response_format", {"type": "json_object"}),
        (chat, "top_logprobs", 2),
        (chat, "messages", []),
        (chat, "messages", [{"role": "function", "content": "x"}]),
        (chat, "messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ],
)
def test_field_is_refused_by_name(served: Served, ask: Any, name: str, value: object) -> None:
    response = ask(served, **{name: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert name in error["message"]
    assert error["param"] is None or re.split(r"[.\[]", error["param"])[0] == name


def test_unserved_field_is_the_errors_param(served: Served) -> None:
    assert complete(served, echo=True).json()["error"]["param"] == "echo"
    assert complete(served, max_tokens=0).json()["error"]["param"] == "max_tokens"
    assert complete(served, model="nothing").json()["error"]["param"] == "model"


@pytest.mark.parametrize("ask", [complete, chat])
def test_zero_top_p_or_temperature_is_the_most_likely_token(served: Served, ask: Any) -> None:
    greedy = ask(served).json()["choices"]
    for fields in ({"top_p": 0, "temperature": 2}, {"top_p": 0.0, "temperature": None}, {"top_p": None, "seed": -7}):
        assert ask(served, **fields).json()["choices"] == greedy


def test_no_log_probabilities_may_be_said_as_false(served: Served) -> None:
    for fields in ({"logprobs": False}, {"logprobs": None}, {"top_logprobs": 0}, {"top_logprobs": None}):
        assert complete(served, **fields).json()["choices"][0]["logprobs"] is None
        assert chat(served, **fields).json()["choices"][0]["logprobs"] is None
    assert chat(served, logprobs=False, top_logprobs=0).status_code == 200
    assert complete(served, logprobs=0).json()["choices"][0]["logprobs"] is not None
    for ask, fields in ((complete, {"logprobs": True}), (complete, {"top_logprobs": 2}), (chat, {"logprobs": 3})):
        error = ask(served, **fields).json()["error"]
        assert error["param"] == next(iter(fields))
        assert error["param"] in error["message"]


@pytest.mark.parametrize("ask", [complete, chat])
def test_every_optional_field_may_be_null(served: Served, ask: Any) -> None:
    model = ChatRequest if ask is chat else CompletionRequest
    optional = [name for name, field in model.model_fields.items() if not field.is_required()]
    unserved = ["frequency_penalty", "presence_penalty", "logit_bias", "tools", "tool_choice", "response_format"]
    unserved += ["functions", "function_call", "modalities", "audio", "prediction", "reasoning_effort", "service_tier"]
    unserved += ["store", "web_search_options", "verbosity", "best_of", "parallel_tool_calls", "prompt_cache_retention"]
    assert ask(served, **dict.fromkeys(optional + unserved)).status_code == 200


@pytest.mark.parametrize("ask", [complete, chat])
def test_what_asks_for_nothing_more_is_taken(served: Served, ask: Any) -> None:
    plain = ask(served).json()["choices"]
    fields: list[dict[str, object]] = [{"metadata": {"team": "a"}}, {"metadata": {}}, {"store": False}]
    fields += [{"service_tier": "auto"}, {"service_tier": "default"}, {"user": "u"}, {"safety_identifier": "u"}]
    fields += [{"prompt_cache_key": "k"}, {"parallel_tool_calls": True}, {"parallel_tool_calls": False}]
    fields += [{"tools": [], "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}, {"functions": []}]
    fields += [{"response_format": {"type": "text"}}, {"n": 1}, {"best_of": 1}, {"logit_bias": {}}, {"seed": -1}]
    for one in fields:
        assert ask(served, **one).json()["choices"] == plain, one
    refused: list[dict[str, object]] = [{"store": True}, {"service_tier": "flex"}, {"tool_choice": "required"}]
    refused += [{"metadata": {"k": 1}}, {"metadata": {str(i): "v" for i in range(17)}}, {"functions": [{"name": "f"}]}]
    for one in refused:
        error = ask(served, **one).json()["error"]
        assert error["message"].startswith(next(iter(one))), error


def test_neutral_values_are_accepted(served: Served) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "n": 1, "logit_bias": {}, "user": "me"}
    assert complete(served, **neutral, echo=False, best_of=1, suffix=None).status_code == 200
    assert chat(served, **neutral, tools=None, response_format={"type": "text"}).status_code == 200


def test_context_is_refused_with_its_three_numbers(served: Served) -> None:
    response = complete(served, max_tokens=250)
    assert response.status_code == 400
    for number in (0, len(PROMPT), 250, 256):
        assert str(number) in response.json()["error"]["message"]


def test_models_lists_the_base_model_and_the_tasks(served: Served, films: str) -> None:
    listed = served.http.get("/v1/models").json()
    assert listed["object"] == "list"
    ids = [model["id"] for model in listed["data"]]
    assert ids[0] == NAME
    assert films in ids
    assert served.http.get(f"/v1/models/{films}").json()["id"] == films
    assert served.http.get("/v1/models/mini").status_code == 200
    served.put("stored-only", native(180), activate="false")
    assert "stored-only" not in {model["id"] for model in served.http.get("/v1/models").json()["data"]}
    assert (
        served.http.get("/v1/models/stored-only").status_code
        == complete(served, model="stored-only").status_code
        == 404
    )
    missing = served.http.get("/v1/models/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_the_openapi_page_says_which_routes_sample_and_what_the_template_changes(served: Served) -> None:
    page = served.http.get("/openapi.json").json()
    said = {path: page["paths"][path]["post"]["description"] for path in ("/generate", "/v1/completions")}
    said |= {"chat": page["paths"]["/v1/chat/completions"]["post"]["description"]}
    assert "Greedy" in said["/generate"]
    assert "sampled at temperature 1" in " ".join(said["/v1/completions"].split())
    assert "temperature 1" in said["chat"]
    assert "chat template" in said["chat"]
    schemas = page["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        assert "sampled" in schemas[name]["properties"]["temperature"]["description"]
    assert "template" in schemas["ChatRequest"]["properties"]["messages"]["description"]
