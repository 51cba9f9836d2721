"""What is longer than the context, or more than can ever be served: said once, in the words that clients look for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from server.model_files import ModelFiles
from server.start import make_state
from tests.byte_model import HEAD_DIM, KV_HEADS, LAYERS
from tests.conftest import NAME, Served, make_tenant, native, serve_in_thread, settings_for
from tests.tiny_models import SEQ2SEQ_FAMILIES, letter_tokenizer, seq2seq_model

LIMIT = 256
LONG, GIANT = "x" * 300, "x" * 4_000_000
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def chat(content: str, **more: object) -> dict[str, object]:
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **more}


def text(prompt: str, **more: object) -> dict[str, object]:
    return {"model": NAME, "prompt": prompt, **more}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, text(LONG), "prompt"),
        (TEXT, text(LONG, max_tokens=4), "prompt"),
        (TEXT, text("x" * LIMIT, max_tokens=1), "prompt"),
        (TEXT, text(GIANT, max_tokens=4), "prompt"),
        (TEXT, text([LONG], max_tokens=4), "prompt"),  # type: ignore[arg-type]
        (TEXT, text("x" * 200, max_tokens=100), "max_tokens"),
        (TEXT, text("x", max_tokens=2**30), "max_tokens"),
        (TEXT, text("x" * 250), "prompt"),
        (TEXT, text("x" * 200, max_tokens=100, stream=True), "max_tokens"),
        (CHAT, chat(LONG), "messages"),
        (CHAT, chat(LONG, max_tokens=4), "messages"),
        (CHAT, chat(GIANT), "messages"),
        (CHAT, chat(GIANT, stream=True, max_tokens=1), "messages"),
        (CHAT, chat("x" * 100, max_tokens=200), "max_tokens"),
        (CHAT, chat("x" * 100, max_completion_tokens=200), "max_completion_tokens"),
        (CHAT, chat("x", n=3, max_tokens=300), "max_tokens"),
    ],
)
def test_too_long_is_told_as_openai_does(served: Served, path: str, body: dict[str, object], param: str) -> None:
    answer = served.http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert error["type"] == "invalid_request_error"
    start = f"This model's maximum context length is {LIMIT} tokens. However, you requested "
    assert error["message"].startswith(start)
    assert "context_length_exceeded" in error["message"]  # langchain-openai looks for it there
    num_asked = int(error["message"].removeprefix(start).removeprefix("at least ").split()[0])
    assert num_asked > LIMIT
    assert answer.headers["x-should-retry"] == "false"


def test_virtual_tokens_count_in_what_was_asked(served: Served, films: str) -> None:
    answer = served.http.post(TEXT, json={"model": films, "prompt": "x" * 250, "max_tokens": 2})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert "requested 257 tokens (5 of the task, 250 in the prompt, 2 in the completion)" in error["message"]
    error = served.http.post(TEXT, json={"model": films, "prompt": "x" * 253, "max_tokens": 2}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_tgis_routes_keep_status_and_numbers(served: Served, films: str) -> None:
    answer = served.generate("x" * 250, films, max_new_tokens=2)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert "virtual tokens (5) + prompt tokens (250) + max_new_tokens (2) must be <= 256" in answer.json()["error"]


@pytest.fixture(scope="module")
def small(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Its KV memory holds fewer tokens than the context, its queue two requests."""
    token_bytes = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    settings = settings_for(tmp_path_factory.mktemp("small"), kv_bytes=96 * token_bytes, max_queued=2)
    yield from serve_in_thread(make_state(settings, ModelFiles(model_path, NAME)))


def test_longer_than_the_memory_can_hold_is_too_long(small: Served) -> None:
    for prompt, max_tokens, param in (("x" * 120, 2, "prompt"), ("x" * 20, 120, "max_tokens")):
        answer = small.http.post(TEXT, json=text(prompt, max_tokens=max_tokens))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert "maximum context length is 96 tokens" in error["message"]


def test_an_encoders_limit_and_a_decoders_are_told_apart(tmp_path: Path) -> None:
    seq2seq_model(SEQ2SEQ_FAMILIES["bart"]()).save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    settings = settings_for(tmp_path / "data", kv_bytes=2**22)
    letter = chr(0x105)
    for served in serve_in_thread(make_state(settings, ModelFiles(tmp_path / "model", NAME))):
        for prompt, max_tokens, param in ((letter * 300, 2, "prompt"), (letter, 300, "max_tokens")):
            answer = served.http.post(TEXT, json=text(prompt, max_tokens=max_tokens))
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
            assert "maximum context length is 256 tokens. However, you requested 30" in error["message"]


def test_more_answers_than_the_queue_holds_are_not_asked_again(small: Served) -> None:
    answer = small.http.post(TEXT, json=text("x", n=3, max_tokens=1))
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert answer.json()["error"]["message"] == "a request must have <= 2 answers, got 3"
    assert answer.headers["x-should-retry"] == "false"
    assert small.http.post(TEXT, json=text("x", n=2, max_tokens=1)).status_code == 200


def test_other_refusals_are_not_called_too_long(served: Served) -> None:
    for path, body in ((TEXT, text("")), (TEXT, text("x", temperature=9)), (CHAT, chat("x", top_logprobs=2))):
        answer = served.http.post(path, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] is None


@pytest.mark.parametrize("limits", [{"tokens_per_minute": 50}, {"max_new_tokens": 50}, {"max_queued": 1}])
def test_what_a_tenants_limits_never_allow_is_not_asked_again(keyed: Served, limits: dict[str, int]) -> None:
    tenant = make_tenant(keyed, f"never-{next(iter(limits)).replace('_', '-')}", **limits)
    body = text("x", n=2, max_tokens=100)
    answer = tenant.http.post(TEXT, json=body)
    assert answer.status_code in (400, 429)
    assert answer.headers["x-should-retry"] == "false"
    assert "Retry-After" not in answer.headers
    assert answer.json()["error"]["type"] == "invalid_request_error"
    key = tenant.http.headers["Authorization"].removeprefix("Bearer ")
    with (
        openai.OpenAI(base_url=f"{tenant.url}/v1", api_key=key) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.completions.create(model=NAME, prompt="x", n=2, max_tokens=100)
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_what_passes_in_a_while_is_asked_again(keyed: Served) -> None:
    tenant = make_tenant(keyed, "again", requests_per_minute=1)
    assert tenant.generate("x", max_new_tokens=1).status_code == 200
    answer = tenant.generate("x", max_new_tokens=1)
    assert (answer.status_code, "Retry-After" in answer.headers) == (429, True)
    assert "x-should-retry" not in answer.headers


@pytest.mark.parametrize("prompt", [LONG, GIANT])
def test_a_prompt_that_is_too_long_counts_as_a_request(keyed: Served, prompt: str) -> None:
    tenant = make_tenant(keyed, f"counted-{len(prompt)}", requests_per_minute=2)
    statuses = [tenant.http.post(TEXT, json=text(prompt, max_tokens=1)).status_code for _ in range(3)]
    assert statuses == [400, 400, 429]


def test_a_prompt_that_was_tokenised_for_nothing_costs_its_tokens(keyed: Served) -> None:
    tenant = make_tenant(keyed, "costly", tokens_per_minute=300)
    assert tenant.http.post(TEXT, json=text(LONG, max_tokens=1)).status_code == 400
    answer = tenant.http.post(TEXT, json=text("x", max_tokens=100))
    assert answer.status_code == 429
    assert "Retry-After" in answer.headers


def test_a_prefix_that_does_not_fit_the_model_is_final_for_clients(served: Served) -> None:
    answer = served.put("films-final", native(3, num_virtual_tokens=65))
    assert (answer.status_code, answer.headers["x-should-retry"]) == (422, "false")
