"""The whole program on the default model: the same tokens whatever happens around a request; `kill -9` in uploads."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from prefix_store.native_format import write_native
from prefix_store.prefix import Prefix
from tests.program import ROOT, Program, running

pytestmark = pytest.mark.program
EXAMPLES = ROOT / "examples" / "prefixes"
LAYERS, KV_HEADS, HEAD_DIM, HIDDEN = 30, 3, 64, 576
BLOCK_BYTES = LAYERS * 2 * KV_HEADS * 16 * HEAD_DIM * 4  # of one block of the default model in fp32
NUM_TASKS, NUM_VIRTUAL = 16, 20
NATIVE = {"Content-Type": "application/octet-stream"}
TEXTS = ["The film was", "Once upon a time", "A list of three animals:", "He opened the door and"]


def native(seed: int) -> bytes:
    """Soft prompts and KV in turn; each about 2 blocks on the device."""
    generator = torch.Generator().manual_seed(seed)
    if seed % 2:
        return write_native(Prefix("soft", embeddings=torch.randn(NUM_VIRTUAL, HIDDEN, generator=generator) * 0.1))
    kv = torch.randn(LAYERS, 2, KV_HEADS, NUM_VIRTUAL, HEAD_DIM, generator=generator) * 0.5
    return write_native(Prefix("kv", layers={i: (kv[i, 0], kv[i, 1]) for i in range(LAYERS)}))


def upload_tasks(program: Program) -> None:
    for i in range(NUM_TASKS):
        answer = program.http.put(f"/v1/prefixes/t{i}?accept_base=1", content=native(i), headers=NATIVE)
        assert answer.status_code == 201, answer.text


Request = tuple[str, str | None, int]


def requests() -> list[Request]:
    """Text, task, new tokens: all tasks in turn, and bare rows between them."""
    choose = random.Random(4)
    return [
        (choose.choice(TEXTS) + " the" * choose.randrange(12), None if i % 9 == 8 else f"t{i % NUM_TASKS}", 8 + i % 17)
        for i in range(36)
    ]


def ask(program: Program, request: Request) -> list[int]:
    return program.tokens(*request)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with running(tmp_path_factory.mktemp("roomy") / "data", "--dtype", "float32") as program:
        upload_tasks(program)
        yield program


@pytest.fixture(scope="module")
def alone(roomy: Program) -> list[list[int]]:
    """One request at a time, every prefix cold at its first use."""
    answers = [ask(roomy, request) for request in requests()]
    assert roomy.metric("prefix_loads_total") == NUM_TASKS
    return answers


def test_answers_are_varied_enough_to_prove_something(alone: list[list[int]]) -> None:
    assert len({token for tokens in alone for token in tokens}) >= 8
    assert len({tuple(tokens) for tokens in alone}) > len(alone) * 0.8


def test_warm_and_mixed_requests_answer_as_alone(roomy: Program, alone: list[list[int]]) -> None:
    asked = requests()
    with ThreadPoolExecutor(len(asked)) as clients:
        mixed = list(clients.map(lambda request: ask(roomy, request), asked))
    assert mixed == alone
    assert [ask(roomy, request) for request in asked[:8]] == alone[:8]
    assert roomy.metric("prefix_loads_total") == NUM_TASKS  # nothing was loaded again


def test_evicted_and_preempted_requests_answer_as_alone(alone: list[list[int]], tmp_path: Path) -> None:
    """Room for 4 prefixes, 16 tasks in turn; KV memory for a few rows of the 36 that come at once."""
    room = ["--prefix-bytes", str(4 * 2 * BLOCK_BYTES), "--kv-bytes", str(8 * BLOCK_BYTES), "--max-queue-s", "600"]
    with running(tmp_path / "data", "--dtype", "float32", *room) as program:
        upload_tasks(program)
        asked = requests()
        in_turn = [ask(program, request) for request in asked]
        num_evictions = program.metric("prefix_evictions_total")
        with ThreadPoolExecutor(len(asked)) as clients:
            together = list(clients.map(lambda request: ask(program, request), asked))
        assert program.metric("num_preemptions_total") >= 3
        assert program.metric("prefix_resident_bytes") <= program.metric("prefix_pool_bytes") == 8 * BLOCK_BYTES
    assert num_evictions >= 2 * NUM_TASKS - 4
    assert in_turn == alone
    assert together == alone


def test_acknowledged_uploads_survive_kill_of_the_server(tmp_path: Path) -> None:
    """10 rounds: three uploaders at work, the server killed at a random moment, and started again."""
    choose = random.Random(1)
    data_dir = tmp_path / "data"
    acknowledged: dict[tuple[str, int], str] = {}

    def upload(url: httpx.URL, first: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            for seed in range(first, first + 100):
                try:
                    answer = http.put(
                        f"/v1/prefixes/task-{seed % 5}?accept_base=1", content=native(seed), headers=NATIVE
                    )
                except httpx.TransportError:  # the server is gone
                    return
                assert answer.status_code == 201, answer.text
                manifest = answer.json()
                acknowledged[manifest["task"], manifest["version"]] = manifest["digest"]

    for round_ in range(11):
        with running(data_dir) as program:
            check_everything_is_there(program, acknowledged)
            if round_ == 10:
                break
            threads = [
                threading.Thread(target=upload, args=(program.http.base_url, round_ * 1000 + 100 * i)) for i in range(3)
            ]
            for thread in threads:
                thread.start()
            time.sleep(choose.uniform(0.2, 1.5))
            program.kill()
            for thread in threads:
                thread.join()
    assert len(acknowledged) >= 20


def check_everything_is_there(program: Program, acknowledged: dict[tuple[str, int], str]) -> None:
    """Every acknowledged version is listed with its digest, and every listed one is whole: the server checks a file's
    digest when it reads it."""
    tasks = program.http.get("/v1/prefixes", params={"limit": 1000}).json()["prefixes"]
    listed = {(task["task"], version["version"]): version["digest"] for task in tasks for version in task["versions"]}
    assert acknowledged.items() <= listed.items()
    for task, version in listed:
        answer = program.http.get(f"/v1/prefixes/{task}/versions/{version}/file")
        assert answer.status_code == 200, (task, version, answer.text)
