"""Long texts beside others: they take no place in the queue while they are tokenised, and keep nobody waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.engine.async_engine import MAX_LONG_TEXTS
from server.engine.text_lanes import LONG_TEXT
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, OPERATOR_KEY, Served, make_tenant, serve_in_thread, settings_for, write_key
from tests.tokenizer_makes import save_scripted_model, unigram
from tests.waiting import eventually

LONG = "the " * (LONG_TEXT // 4 + 1)  # words: a tokenizer of which nothing is known before it has read them


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model whose tokenizer may make one token of any text, and a queue of two."""
    folder = tmp_path_factory.mktemp("words")
    write_key(folder / "operator.key", OPERATOR_KEY)
    tokenizer = unigram()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = save_scripted_model(folder / NAME, tokenizer, [5, 6])
    more = {"max_queued": 2, "max_requests_per_key": 64, "operator_key_file": folder / "operator.key"}
    settings = settings_for(folder / "data", **more)
    for served in serve_in_thread(make_state(settings, ModelFiles(path, NAME))):
        yield served.as_key(OPERATOR_KEY)


@contextmanager
def busy_with_a_long_text(served: Served) -> Iterator[None]:
    """The thread of long texts has one that takes until the end."""
    goes_on = threading.Event()
    future = served.state.engine._lanes.submit("another", LONG_TEXT + 1, lambda: goes_on.wait(60))
    try:
        yield
    finally:
        goes_on.set()
        future.result(60)


def num_long(served: Served) -> int:
    return len(served.state.engine._long_texts._places)


def test_long_texts_that_wait_leave_the_queue_to_others(words: Served) -> None:
    same, other = make_tenant(words, "same"), make_tenant(words, "other")
    chat = {"model": NAME, "messages": [{"role": "user", "content": LONG}]}
    with ThreadPoolExecutor(8) as threads:
        with busy_with_a_long_text(words):
            waiting = [threads.submit(same.generate, LONG) for _ in range(4)]
            waiting += [threads.submit(same.http.post, "/v1/chat/completions", json=chat) for _ in range(4)]
            eventually(lambda: num_long(words) == 8)
            for tenant in (same, other):
                for _ in range(5):
                    assert tenant.generate("the cat", max_new_tokens=1).status_code == 200
        assert [future.result().status_code for future in waiting] == [422] * 4 + [400] * 4
    assert num_long(words) == 0


def test_more_long_texts_than_may_wait_are_refused_at_once(words: Served) -> None:
    loud, quiet = make_tenant(words, "loud"), make_tenant(words, "quiet")
    with ThreadPoolExecutor(MAX_LONG_TEXTS + 1) as threads:
        with busy_with_a_long_text(words):
            waiting = [threads.submit(loud.generate, LONG) for _ in range(MAX_LONG_TEXTS)]
            eventually(lambda: num_long(words) == MAX_LONG_TEXTS)
            refused = loud.generate(LONG)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert "long texts" in refused.json()["error"]
            waiting.append(threads.submit(quiet.generate, LONG))  # a tenant without any has a place
            eventually(lambda: num_long(words) == MAX_LONG_TEXTS + 1)
        assert [future.result().status_code for future in waiting] == [422] * (MAX_LONG_TEXTS + 1)


def test_a_caller_that_goes_takes_its_long_text_with_it(words: Served) -> None:
    with busy_with_a_long_text(words):
        with pytest.raises(httpx.ReadTimeout):
            words.http.post("/generate", json={"inputs": LONG}, timeout=0.5)
        eventually(lambda: num_long(words) == 0)


def test_a_long_text_that_fits_is_answered(words: Served) -> None:
    spaced = "the" + " " * (LONG_TEXT + 1) + "cat"
    collapsed = words.generate(spaced, max_new_tokens=1, details=True)
    assert collapsed.status_code in (200, 422)
    unknown = words.generate("\u0416" * (LONG_TEXT + 1), max_new_tokens=1, details=True)
    assert unknown.status_code == 200, unknown.text
    assert unknown.json()["details"]["prompt_tokens"] <= 2


def test_a_text_beyond_the_bound_is_refused_unread(served: Served) -> None:
    with busy_with_a_long_text(served):
        refused = served.generate("x" * 4_000_000)
        assert refused.status_code == 422
        assert "prompt tokens (at least 1000000)" in refused.json()["error"]
        assert "must be <= 256" in refused.json()["error"]
    assert served.http.post("/v1/completions", json={"model": NAME, "prompt": "x" * 100, "max_tokens": 1}).is_success


def test_many_large_bodies_of_one_tenant_wait_and_small_ones_do_not(keyed: Served) -> None:
    loud = make_tenant(keyed, "large")
    brackets = b"[" + b"[]," * 1_000_000 + b"[]]"
    headers = {"Content-Type": "application/json"}
    with ThreadPoolExecutor(12) as threads:
        sent = [threads.submit(loud.http.post, "/generate", content=brackets, headers=headers) for _ in range(12)]
        assert loud.generate("x", max_new_tokens=1).status_code == 200
        answers = [future.result() for future in sent]
    assert {answer.status_code for answer in answers} == {422, 429}
    assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 429)


def test_info_tells_how_control_tokens_in_texts_are_read(served: Served, model_path: Path, tmp_path: Path) -> None:
    assert served.http.get("/info").json()["special_tokens_in_text"] == "allow"
    settings = settings_for(tmp_path / "data", special_tokens_in_text="split")
    for split in serve_in_thread(make_state(settings, ModelFiles(model_path, NAME))):
        assert split.http.get("/info").json()["special_tokens_in_text"] == "split"
        for inputs, num_tokens in (("a</s>b", 6), ("ab", 2)):
            answer = split.generate(inputs, max_new_tokens=1, details=True)
            assert answer.json()["details"]["prompt_tokens"] == num_tokens
            body = {"model": NAME, "prompt": inputs, "max_tokens": 1}
            assert split.http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens"] == num_tokens
            messages = [{"role": "user", "content": inputs}]
            answer = split.http.post(
                "/v1/chat/completions", json={"model": NAME, "messages": messages, "max_tokens": 1}
            )
            num_written = len("user: ") + len("assistant:") + 3
            assert answer.json()["usage"]["prompt_tokens"] == num_written + num_tokens
    assert served.generate("a</s>b", max_new_tokens=1, details=True).json()["details"]["prompt_tokens"] == 3
