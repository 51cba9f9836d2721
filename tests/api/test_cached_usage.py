"""A prompt that comes again: what callers and dashboards see of it."""

from __future__ import annotations

import json

from tests.api.test_ops import scrape
from tests.conftest import Served, native

TEXT = "Once more, the film that everybody knows."


def test_a_prompt_that_comes_again_says_so(served: Served) -> None:
    assert served.put("cached-a", native(71)).status_code == 201
    assert served.put("cached-b", native(72)).status_code == 201
    before = scrape(served)
    parameters = {"max_new_tokens": 8, "ignore_eos": True, "details": True}
    first, again, other = (
        served.generate(TEXT, task, **parameters).json() for task in ("cached-a", "cached-a", "cached-b")
    )
    assert [answer["details"]["cached_tokens"] for answer in (first, again, other)] == [0, 32, 0]
    assert again["generated_text"] == first["generated_text"] != other["generated_text"]
    after = scrape(served)
    name = "prefixserve_prompt_tokens"
    assert after[f"{name}_cached_total"] - before[f"{name}_cached_total"] == 32
    assert after[f"{name}_total"] - before[f"{name}_total"] == 3 * len(TEXT)
    assert after["prefixserve_kv_blocks_cached"] >= 4
    assert after["prefixserve_kv_cache_usage_perc"] == 0  # nobody holds them


def test_usage_and_streams_say_so_too(served: Served) -> None:
    assert served.put("cached-c", native(73)).status_code == 201
    body = {"model": "cached-c", "prompt": TEXT, "max_tokens": 8, "n": 2, "seed": 1}
    usages = [served.http.post("/v1/completions", json=body).json()["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"] for usage in usages] == [{"cached_tokens": 0}, {"cached_tokens": 32}]
    assert {usage["prompt_tokens"] for usage in usages} == {len(TEXT)}
    body = {"inputs": TEXT, "parameters": {"max_new_tokens": 4}}
    streamed = served.http.post("/generate_stream", params={"task": "cached-c"}, json=body)
    last = json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))
    assert last["details"]["cached_tokens"] == 32


def test_a_chat_finds_its_history(served: Served) -> None:
    assert served.put("cached-d", native(74)).status_code == 201
    messages = [{"role": "user", "content": TEXT}]
    body = {"model": "cached-d", "max_tokens": 4, "temperature": 0, "messages": messages}
    first = served.http.post("/v1/chat/completions", json=body).json()
    said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    messages += [said, {"role": "user", "content": "And then?"}]
    second = served.http.post("/v1/chat/completions", json=body).json()
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48
