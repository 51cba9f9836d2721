"""Callers who go at any moment leave nothing: no row, no block, no held prefix, no coroutine."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time

from tests.conftest import Served, native

NUM_DISCONNECTS = 1000
NUM_AT_ONCE = 8
TASKS = tuple(f"gone-{i}" for i in range(6))


def num_coroutines(served: Served) -> int:
    loop = served.state.engine._loop
    assert loop is not None
    future = asyncio.run_coroutine_threadsafe(_num_tasks(), loop)
    return future.result(10)


async def _num_tasks() -> int:
    return len(asyncio.all_tasks())


def ask(port: int, chance: random.Random) -> socket.socket:
    """Send a request, or only some of it."""
    task = chance.choice((*TASKS, None))
    path = chance.choice(("/generate", "/generate_stream")) + (f"?task={task}" if task else "")
    parameters = {"max_new_tokens": chance.randint(1, 60), "ignore_eos": True}
    body = json.dumps({"inputs": "x" * chance.randint(1, 60), "parameters": parameters}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    request = head.encode() + b"\r\n" + body
    one = socket.create_connection(("127.0.0.1", port), timeout=10)
    one.sendall(request[: chance.randint(1, len(request))] if chance.random() < 0.1 else request)
    return one


def test_a_thousand_disconnects_leave_nothing(served: Served) -> None:
    for i, task in enumerate(TASKS):
        assert served.put(task, native(50 + i)).status_code == 201
    port = int(served.url.rpartition(":")[2])
    engine = served.state.engine
    served.generate("x", max_new_tokens=1)
    before = num_coroutines(served)
    chance = random.Random(0)
    open_ones: list[socket.socket] = []
    for _ in range(NUM_DISCONNECTS):
        open_ones.append(ask(port, chance))
        time.sleep(chance.choice((0, 0, 0.001, 0.01)))
        if len(open_ones) >= NUM_AT_ONCE:
            gone = open_ones.pop(chance.randrange(len(open_ones)))
            if chance.random() < 0.5:
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a farewell
            gone.close()
    for one in open_ones:
        one.close()
    deadline_s = time.monotonic() + 20
    while True:
        stats = engine.stats()
        left = (stats.num_running, stats.num_waiting, stats.kv_blocks_used, stats.num_pinned)
        more = num_coroutines(served) - before
        if not any(left) and more <= 0 and served.state.num_active == 0:
            break
        assert time.monotonic() < deadline_s, f"rows, queue, blocks, held prefixes: {left}, coroutines: {more}"
        time.sleep(0.05)
    assert served.generate("x", TASKS[0], max_new_tokens=1).status_code == 200
    for task in TASKS:
        assert served.http.delete(f"/v1/prefixes/{task}").status_code == 204
