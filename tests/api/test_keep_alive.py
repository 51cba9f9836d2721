"""A stream that has nothing to say keeps its connection open, and an error that comes in time keeps its status."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from huggingface_hub import InferenceClient

from server.api import answers
from server.engine.engine import Engine, StepOutput
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, Served, serve_in_thread, settings_for
from tests.raw_http import connect
from tests.waiting import SOON_S, eventually

BODY = {"inputs": "x", "parameters": {"max_new_tokens": 4, "ignore_eos": True}, "stream": True}
CHAT = {
    "model": NAME,
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 4,
    "ignore_eos": True,
    "n": 2,
    "temperature": 0,
}
CHAT |= {"stream": True}
COMPLETION = {"model": NAME, "prompt": "x", "max_tokens": 4, "temperature": 0, "stream": True}
HEAD = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
ROUTES = [("/generate", BODY), ("/generate_stream", BODY), ("/v1/completions", COMPLETION)]
ROUTES.append(("/v1/chat/completions", CHAT))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "KEEP_ALIVE_S", 0.1)
    monkeypatch.setattr(answers, "COMMIT_S", 0.2)


class HeldSteps:
    """The engine's steps, which wait while they are held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = threading.Event()
        step = Engine.step

        def held(engine: Engine) -> list[StepOutput]:
            if engine.has_work:
                assert self.may_go_on.wait(SOON_S)
            return step(engine)

        monkeypatch.setattr(Engine, "step", held)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldSteps]:
    held = HeldSteps(monkeypatch)
    yield held
    held.may_go_on.set()


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_streams_pass_a_proxy_unbuffered(served: Served, path: str, body: dict[str, Any]) -> None:
    answer = served.http.post(path, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Accel-Buffering"] == "no"


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_comment_comes_before_a_late_first_token(
    served: Served, steps: HeldSteps, path: str, body: dict[str, Any]
) -> None:
    with served.http.stream("POST", path, json=body) as stream:
        assert stream.status_code == 200
        assert stream.headers["X-Request-Id"]
        lines = stream.iter_lines()
        assert [next(lines) for _ in range(6)] == [": keep-alive", ""] * 3
        steps.may_go_on.set()
        rest = list(lines)
    again = served.http.post(path, json=body).text.splitlines()
    assert sum("data: " in line for line in rest) == sum("data: " in line for line in again) > 1
    assert {line[:1] for line in rest} <= {"d", ":", ""}


def test_a_comment_comes_between_late_tokens(served: Served, steps: HeldSteps) -> None:
    steps.may_go_on.set()
    body = BODY | {"parameters": {"max_new_tokens": 150, "ignore_eos": True}}
    with served.http.stream("POST", "/generate", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        steps.may_go_on.clear()
        assert ": keep-alive" in lines
        steps.may_go_on.set()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert events[-1]["details"]["generated_tokens"] == 150


def test_the_clients_read_past_comments(served: Served, steps: HeldSteps) -> None:
    release = threading.Timer(0.5, steps.may_go_on.set)
    release.start()
    with InferenceClient(served.url) as hub:
        parts = list(hub.text_generation("x", max_new_tokens=4, stream=True, details=True))
    assert parts[-1].details is not None
    assert parts[-1].details.generated_tokens == 4
    steps.may_go_on.clear()
    release = threading.Timer(0.5, steps.may_go_on.set)
    release.start()
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "x"}]
        chunks = list(client.chat.completions.create(model=NAME, messages=messages, max_tokens=4, stream=True))
    assert chunks[-1].choices[0].finish_reason


@pytest.mark.parametrize("is_late", [False, True])
def test_who_goes_while_it_waits_is_freed(
    served: Served, steps: HeldSteps, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """Comments that nobody reads keep no row."""
    if not is_late:
        monkeypatch.setattr(answers, "COMMIT_S", SOON_S)
    body = json.dumps(BODY).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    with connect(served) as one:
        one.sendall(f"{head}\r\n\r\n".encode() + body)
        eventually(lambda: served.state.engine.num_waiting)
        if is_late:
            assert one.recv(12) == b"HTTP/1.1 200"
    eventually(lambda: served.state.num_active == 0 and not served.state.engine._streams)


@contextmanager
def short_queue(model_path: Path, folder: Path) -> Iterator[Served]:
    """A server with one row, in whose queue nobody waits long."""
    settings = settings_for(folder, max_rows=1, max_queue_s=0.5)
    yield from serve_in_thread(make_state(settings, ModelFiles(model_path, NAME)))


LONG = {"inputs": "x", "parameters": {"max_new_tokens": 230, "ignore_eos": True}}


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_an_error_in_time_keeps_its_status_and_a_late_one_is_an_event(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    for commit_s, status in ((SOON_S, 503), (0.1, 200)):
        monkeypatch.setattr(answers, "COMMIT_S", commit_s)
        with short_queue(model_path, tmp_path / str(status)) as served, connect(served) as first:
            slow = Engine.step

            def step(engine: Engine, slow: Any = slow) -> list[StepOutput]:
                threading.Event().wait(0.02)  # a slow model
                return slow(engine)  # type: ignore[no-any-return]

            with monkeypatch.context() as slowly:
                slowly.setattr(Engine, "step", step)
                sent = json.dumps(LONG).encode()
                head = (
                    "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
                )
                first.sendall(f"{head}{len(sent)}\r\n\r\n".encode() + sent)
                eventually(lambda served=served: served.state.engine.stats().num_running)  # type: ignore[misc]
                answer = served.http.post(path, json=body)
            assert answer.status_code == status
            if status == 503:
                assert answer.headers["Retry-After"]
            else:
                assert answer.text.startswith(": keep-alive\n\n")
                (event,) = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
                assert event["error"]
