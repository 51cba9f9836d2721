"""A prefix that passed every check and gives NaN at run time: its requests fail and nothing of them is kept, those
beside them get the tokens that they get alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from prefix_store.prefix import Prefix
from server.engine.sequence import PrefixRef
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, Served, native, serve_in_thread, settings_for

PROMPT = "A prompt that is long enough for two blocks of text."
NUM_OUT = 40
GOOD, BAD = "sound", "unsound"
VALUES = [math.nan, math.inf, -math.inf]


def ask(served: Served, task: str | None, *, streams: bool = False) -> httpx.Response:
    parameters = {"max_new_tokens": NUM_OUT, "ignore_eos": True, "details": True}
    query = {} if task is None else {"task": task}
    body = {"inputs": PROMPT, "parameters": parameters, "stream": streams}
    return served.http.post("/generate", params=query, json=body)


def tokens(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [token["id"] for token in response.json()["details"]["tokens"]]


@pytest.fixture(scope="module")
def served(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Of these tests alone: its blocks never run out, so that what is cached can be counted."""
    settings = settings_for(tmp_path_factory.mktemp("data"))
    yield from serve_in_thread(make_state(settings, ModelFiles(model_path, NAME)))


@pytest.fixture
def body(value: float) -> bytes:
    """A prefix of its own for each value: no text behind it is cached from another test."""
    return native(802 + VALUES.index(value))


@pytest.fixture
def digest(served: Served, body: bytes) -> Iterator[str]:
    made = [served.put(task, each) for task, each in ((GOOD, native(801)), (BAD, body))]
    yield made[1].json()["digest"]
    for task in (GOOD, BAD):
        assert served.http.delete(f"/v1/prefixes/{task}").status_code == 204


@pytest.mark.parametrize("value", VALUES)
def test_its_rows_fail_and_no_others(
    served: Served, digest: str, body: bytes, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    engine = served.state.engine._engine
    load = engine._load_prefix

    def load_bad(ref: PrefixRef) -> Prefix:
        prefix = load(ref)
        if ref.digest != digest:
            return prefix
        layers = {layer: (key, torch.full_like(v, value)) for layer, (key, v) in prefix.layers.items()}
        return replace(prefix, layers=layers)

    alone = {task: tokens(ask(served, task)) for task in (GOOD, None)}
    num_cached = served.state.engine.stats().kv_blocks_used, engine.own_blocks.num_cached
    with monkeypatch.context() as broken, ThreadPoolExecutor(8) as pool:
        broken.setattr(engine, "_load_prefix", load_bad)
        asked = [(task, pool.submit(ask, served, task)) for _ in range(2) for task in (GOOD, BAD, None)]
        streamed = pool.submit(ask, served, BAD, streams=True).result()
        answers = [(task, future.result()) for task, future in asked]
    for task, response in answers:
        if task == BAD:
            assert (response.status_code, response.json()["error_type"]) == (500, "generation")
            assert "finite" in response.json()["error"]
        else:
            assert tokens(response) == alone[task]
    assert (streamed.status_code, streamed.json()["error_type"]) == (500, "generation")  # before its first event
    assert (served.state.engine.stats().kv_blocks_used, engine.own_blocks.num_cached) == num_cached
    assert served.http.delete(f"/v1/prefixes/{BAD}").status_code == 204
    engine_key = f"default/{digest}"
    while served.state.engine.residency(engine_key) != "cold":
        pass
    assert served.put(BAD, body).status_code == 201
    mended = ask(served, BAD)
    assert tokens(mended)
    assert mended.json()["details"]["cached_tokens"] == 0
