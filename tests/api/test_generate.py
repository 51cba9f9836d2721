"""TGI's routes: shapes, parameters honoured or refused by name, streams, and rows freed when the caller goes."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import httpx
import pytest

from tests.conftest import Served, native
from tests.waiting import eventually

PROMPT = "A fine film."


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = response.text.split("\n\n")
    assert chunks.pop() == ""
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def test_answer_has_tgis_shape_and_headers(served: Served, films: str) -> None:
    response = served.generate(PROMPT, films, max_new_tokens=6, details=True, ignore_eos=True)
    assert response.status_code == 200
    details = response.json()["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == 6
    assert details["prefill"] == []
    assert set(details["tokens"][0]) == {"id", "text", "logprob", "special"}
    assert all(token["logprob"] <= 0 for token in details["tokens"])
    assert (details["task"], details["version"]) == (films, 2)
    assert (details["prompt_tokens"], details["virtual_tokens"], details["cached_tokens"]) == (len(PROMPT), 5, 0)
    assert (response.headers["X-Task"], response.headers["X-Prefix-Version"]) == (films, "2")
    assert response.headers["X-Request-Id"]
    times = [int(response.headers[f"x-{name}-time"]) for name in ("queue", "inference", "total")]
    assert times[2] >= max(times[:2])


def test_texts_of_the_tokens_join_to_the_answer(served: Served) -> None:
    # Hot, the tiny model writes parts of characters and special tokens.
    for seed in range(3):
        parameters = {"max_new_tokens": 100, "temperature": 5.0, "seed": seed, "ignore_eos": True, "details": True}
        answer = served.generate(PROMPT, **parameters).json()
        tokens = answer["details"]["tokens"]
        assert "".join(token["text"] for token in tokens) == answer["generated_text"]
        assert any(not token["text"] for token in tokens)
        body = {"inputs": PROMPT, "parameters": parameters}
        assert [event["token"] for event in events(served.http.post("/generate_stream", json=body))] == tokens


def test_answer_without_details_is_the_text_alone(served: Served) -> None:
    response = served.generate(PROMPT, max_new_tokens=4)
    assert response.json().get("details") is None
    assert isinstance(response.json()["generated_text"], str)
    assert response.headers["X-Task"] == ""


def test_max_new_tokens_defaults_to_128(served: Served) -> None:
    assert served.generate("x", details=True, ignore_eos=True).json()["details"]["generated_tokens"] == 128


def test_root_is_generate(served: Served, films: str) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8}}
    answers = [served.http.post(path, params={"task": films}, json=body).json() for path in ("/", "/generate")]
    assert answers[0] == answers[1]


def test_tasks_and_versions_answer_differently(served: Served, films: str) -> None:
    refs = [None, films, f"{films}@1", f"{films}@2", f"{films}@previous"]
    texts = [served.generate(PROMPT, ref, max_new_tokens=24).json()["generated_text"] for ref in refs]
    assert len(set(texts)) == 3
    assert texts[1] == texts[3]
    assert texts[2] == texts[4]


def test_adapter_id_names_the_task_too(served: Served, films: str) -> None:
    assert served.generate(PROMPT, adapter_id=films, max_new_tokens=2).headers["X-Task"] == films
    assert served.generate(PROMPT, films, adapter_id=films, max_new_tokens=2).status_code == 200
    different = served.generate(PROMPT, films, adapter_id="other", max_new_tokens=2)
    assert different.status_code == 422
    assert "adapter_id" in different.json()["error"]


def test_stream_joins_to_the_whole_answer(served: Served, films: str) -> None:
    parameters = {"max_new_tokens": 40, "details": True, "seed": 3, "do_sample": True}
    whole = served.generate(PROMPT, films, **parameters).json()
    for path, more in (("/generate_stream", {}), ("/generate", {"stream": True}), ("/", {"stream": True})):
        body = {"inputs": PROMPT, "parameters": parameters} | more
        response = served.http.post(path, params={"task": films}, json=body)
        assert response.headers["X-Prefix-Version"] == "2"
        found = events(response)
        assert [event["index"] for event in found] == list(range(1, len(found) + 1))
        assert "".join(event["token"]["text"] for event in found) == whole["generated_text"]
        assert [e["token"]["id"] for e in found] == [t["id"] for t in whole["details"]["tokens"]]
        assert all(e["generated_text"] is None and e["details"] is None for e in found[:-1])
        assert found[-1]["generated_text"] == whole["generated_text"]
        details = found[-1]["details"]
        assert details["input_length"] == len(PROMPT)
        assert details["generated_tokens"] == whole["details"]["generated_tokens"]
        assert details["seed"] == 3


def test_every_event_is_one_line_for_clients_that_split_at_unicode_line_ends(served: Served) -> None:
    # Token by token the tiny model writes any byte, U+0085 and U+2028 among them; ids fix the text exactly.
    for seed in range(4):
        body = {"inputs": "x", "parameters": {"max_new_tokens": 200, "do_sample": True, "temperature": 9, "seed": seed}}
        text = served.http.post("/generate_stream", json=body | {"stream": True}).text
        lines = [line for line in text.splitlines() if line]
        assert all(json.loads(line.removeprefix("data: ")) for line in lines)


def test_return_full_text_puts_the_prompt_in_front(served: Served) -> None:
    short = served.generate(PROMPT, max_new_tokens=5).json()["generated_text"]
    assert served.generate(PROMPT, max_new_tokens=5, return_full_text=True).json()["generated_text"] == PROMPT + short


def test_stop_ends_the_answer_and_stays_in_it(served: Served) -> None:
    whole = served.generate(PROMPT, max_new_tokens=40, ignore_eos=True).json()["generated_text"]
    stop = next(c for c in whole[3:] if c.isascii() and c.isprintable() and c not in whole[:3])
    answer = served.generate(PROMPT, max_new_tokens=40, stop=[stop], details=True, ignore_eos=True).json()
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["generated_text"] == whole[: whole.index(stop) + 1]


def test_sampling_is_repeated_by_its_seed(served: Served) -> None:
    first = served.generate(PROMPT, do_sample=True, temperature=2.0, max_new_tokens=20, details=True).json()
    seed = first["details"]["seed"]
    again = served.generate(PROMPT, do_sample=True, temperature=2.0, max_new_tokens=20, details=True, seed=seed).json()
    assert isinstance(seed, int)
    assert again["generated_text"] == first["generated_text"]
    assert served.generate(PROMPT, max_new_tokens=2, details=True).json()["details"]["seed"] is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),
        ("decoder_input_details", True),
        ("frequency_penalty", 0.5),
        ("grammar", {"type": "regex", "value": "a"}),
        ("top_n_tokens", 3),
        ("truncate", 10),
        ("typical_p", 0.9),
        ("watermark", True),
        ("response_format", {"type": "json_object"}),
        ("constrain", ["yes", "no"]),
        ("no_such_field", 1),
        ("temperature", 0),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("stop", [""]),
        ("seed", -1),
        ("seed", 2**64),
        ("adapter_source", "hub"),
        ("merged_adapters", {"ids": ["a"]}),
        ("ignore_eos_token", True),
    ],
)
def test_field_is_refused_by_name(served: Served, name: str, value: object) -> None:
    response = served.generate(PROMPT, **{name: value})
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    assert name in response.json()["error"]


def test_every_field_of_tgi_may_be_null(served: Served) -> None:
    names = [
        "adapter_id",
        "best_of",
        "decoder_input_details",
        "details",
        "do_sample",
        "frequency_penalty",
        "grammar",
        "repetition_penalty",
        "return_full_text",
        "seed",
        "stop",
        "temperature",
        "top_k",
        "top_n_tokens",
        "top_p",
        "truncate",
        "typical_p",
        "watermark",
        "ignore_eos",
        "raw",
    ]
    assert served.generate(PROMPT, max_new_tokens=1, **dict.fromkeys(names)).status_code == 200
    every = {"max_new_tokens": None, "response_format": None, "constrain": None} | dict.fromkeys(names)
    assert served.http.post("/generate", json={"inputs": "x", "parameters": every, "stream": None}).status_code == 200
    assert served.http.post("/generate", json={"inputs": "x", "parameters": None}).status_code == 200


def test_what_the_client_of_lorax_always_sends_is_taken(served: Served, films: str) -> None:
    nulls = ["adapter_source", "merged_adapters", "api_token", "return_k_alternatives", "response_format", "truncate"]
    falses = ["ignore_eos_token", "do_sample", "return_full_text", "watermark", "details", "decoder_input_details"]
    fields: dict[str, Any] = dict.fromkeys(nulls) | dict.fromkeys(falses, False) | {"stop": [], "adapter_id": films}
    answer = served.generate(PROMPT, max_new_tokens=4, **fields)
    assert answer.json() == served.generate(PROMPT, films, max_new_tokens=4).json()


def test_typical_p_is_taken_where_nothing_is_sampled(served: Served) -> None:
    greedy = served.generate(PROMPT, max_new_tokens=4).json()
    assert served.generate(PROMPT, max_new_tokens=4, do_sample=False, typical_p=0.95, top_p=0.95).json() == greedy
    for fields in ({"do_sample": True}, {"do_sample": None}, {"do_sample": False, "typical_p": 1.5}):
        refused = served.generate(PROMPT, max_new_tokens=4, **{"typical_p": 0.95} | fields)
        assert refused.status_code == 422
        assert "typical_p" in refused.json()["error"]


def test_raw_and_the_largest_seed_are_taken(served: Served) -> None:
    assert served.generate(PROMPT, max_new_tokens=2, raw=True).status_code == 200
    for seed in (0, 2**63, 2**64 - 1):
        details = served.generate(PROMPT, max_new_tokens=2, do_sample=True, seed=seed, details=True).json()["details"]
        assert details["seed"] == seed


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"parameters": {}}',
        b'{"inputs": ["a"]}',
        b'{"inputs": ""}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "a", "parameters": {"temperature": NaN}}',
        b'{"inputs": "a", "more": 1}',
        b'{"inputs": "a", "parameters": {"stop": ["\\ud800"]}}',
        b"[" * 100_000,
    ],
)
def test_wrong_body_is_a_validation_error(served: Served, body: bytes) -> None:
    response = served.http.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["error_type"] == "validation"


def test_context_is_refused_with_its_three_numbers(served: Served, films: str) -> None:
    for max_new_tokens in (250, 10_000_000):
        response = served.generate(PROMPT, films, max_new_tokens=max_new_tokens)
        assert response.status_code == 422
        for number in (5, len(PROMPT), max_new_tokens, 256):
            assert str(number) in response.json()["error"]
    default = served.generate("x" * 200)  # 128 is never cut to fit
    assert (default.status_code, "(128)" in default.json()["error"]) == (422, True)


@pytest.mark.parametrize("name", ["nothing", "films@99", "films@0123456789ab", "No Such", "../films", "a,b", "o/t"])
def test_unknown_task_is_not_found(served: Served, films: str, name: str) -> None:
    response = served.generate(PROMPT, name)
    assert response.status_code == 404
    assert response.json()["error_type"] == "not_found"


def test_failure_amid_a_stream_is_an_event(served: Served) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 200, "ignore_eos": True}}
    weight = served.state.engine._engine.runner.model.model.norm.weight
    kept = weight[0].item()
    with served.http.stream("POST", "/generate_stream", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        assert "error" not in json.loads(next(lines).removeprefix("data: "))
        weight[0] = float("nan")  # the logits of every row from now on
        try:
            last = json.loads(list(lines)[-1].removeprefix("data: "))
        finally:
            weight[0] = kept
    assert set(last) == {"error", "error_type"}
    assert last["error_type"] == "generation"
    assert served.generate("x", max_new_tokens=1).status_code == 200


def test_prefix_that_cannot_be_loaded_fails_its_own_requests(served: Served) -> None:
    digest = served.put("lost", native(170)).json()["digest"]
    for path in served.state.settings.data_dir.joinpath("blobs").rglob(f"{digest}*"):
        path.unlink()
    answer = served.generate("x", "lost", max_new_tokens=1)
    assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")
    completion = served.http.post("/v1/completions", json={"model": "lost", "prompt": "x"})
    assert (completion.status_code, completion.json()["error"]["type"]) == (424, "server_error")
    assert served.http.post("/v1/prefixes/lost/preload").status_code == 424
    assert served.generate("x", max_new_tokens=1).status_code == 200
    served.http.delete("/v1/prefixes/lost")


def wait_for_quiet(served: Served) -> None:
    """No row outlives its caller."""
    stats = served.state.engine.stats
    eventually(lambda: (stats().num_running, stats().num_waiting, stats().kv_blocks_used) == (0, 0, 0))


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_disconnect_frees_the_row(served: Served, films: str, path: str) -> None:
    port = httpx.URL(served.url).port
    assert port is not None
    body = json.dumps({"inputs": "y" * 20, "parameters": {"max_new_tokens": 220, "ignore_eos": True}}).encode()
    head = f"POST {path}?task={films} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    before = served.state.engine.stats()
    aborted = served.state.metrics.registry.get_sample_value("prefixserve_request_aborted_total") or 0
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while not served.state.engine.stats().num_running:
                time.sleep(0.001)
    wait_for_quiet(served)
    after = served.state.engine.stats()
    assert after.kv_blocks_used == before.kv_blocks_used == 0
    assert (served.state.metrics.registry.get_sample_value("prefixserve_request_aborted_total") or 0) > aborted


def test_full_queue_is_overloaded_with_retry_after(served: Served) -> None:
    async def ask_many() -> list[httpx.Response]:
        body = {"inputs": "z", "parameters": {"max_new_tokens": 60, "ignore_eos": True}}
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
            return await asyncio.gather(*[http.post("/generate", json=body) for _ in range(64)])

    responses = asyncio.run(ask_many())
    assert {response.status_code for response in responses} == {200, 503}
    refused = next(response for response in responses if response.status_code == 503)
    assert refused.json()["error_type"] == "overloaded"
    assert int(refused.headers["Retry-After"]) >= 1
    wait_for_quiet(served)
