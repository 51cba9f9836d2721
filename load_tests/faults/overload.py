"""Ten times what the server can take, for minutes: what is refused, how long the accepted wait, what memory does.

    PYTHONPATH=load_tests python -m faults.overload [--seconds 300] [--model PATH]

First `capacity`: every row busy and a full queue behind, one request after another on each connection, which gives the
rate and the time of an answer. Then ten times that rate for `--seconds`, open loop. Held to: no other answer than 200,
429 and 503, an accepted 99th percentile of at most 1.5 times that at capacity, and resident memory that does not grow
by more than a tenth from the first fifth to the last.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections import Counter

import httpx
from http_client import Connection
from served import Served, served
from workloads import prompt

MAX_ROWS, MAX_QUEUED, NUM_IN, NUM_OUT = 16, 24, 32, 32
FACTOR, MAX_P99, MAX_GROWTH = 10, 1.5, 1.1
CAPACITY_S = 30.0
MAX_OPEN = 2000
STATUS = re.compile(r": (\d{3}) ")


def body(seed: object) -> dict[str, object]:
    return {"inputs": prompt(seed, NUM_IN), "parameters": {"max_new_tokens": NUM_OUT, "ignore_eos": True}}


async def capacity(port: int) -> tuple[float, list[float]]:
    """Requests a second, and seconds of each, with every row busy and a full queue behind."""
    end_s = time.perf_counter() + CAPACITY_S
    took: list[float] = []

    async def work(number: int) -> None:
        connection = await Connection.open(port)
        count = 0
        while time.perf_counter() < end_s:
            start_s = time.perf_counter()
            await connection.request("POST", "/generate", body(f"{number} {count}"))
            took.append(time.perf_counter() - start_s)
            count += 1
        await connection.close()

    start_s = time.perf_counter()
    await asyncio.gather(*(work(number) for number in range(MAX_QUEUED)))
    return len(took) / (time.perf_counter() - start_s), took


async def overload(server: Served, rate: float, seconds: float) -> tuple[Counter[str], list[float], list[int]]:
    """Answers by status, seconds of the accepted, and resident memory every second."""
    statuses: Counter[str] = Counter()
    took: list[float] = []
    memory: list[int] = []
    open_ones: set[asyncio.Task[None]] = set()

    async def one(number: int) -> None:
        start_s = time.perf_counter()
        try:
            connection = await Connection.open(server.port)
            try:
                await connection.request("POST", "/generate", body(f"over {number}"))
                statuses["200"] += 1
                took.append(time.perf_counter() - start_s)
            finally:
                await connection.close()
        except RuntimeError as error:
            found = STATUS.search(str(error))
            statuses[found[1] if found else str(error)[:80]] += 1
        except OSError as error:
            statuses[type(error).__name__] += 1

    start_s = time.perf_counter()
    number = 0
    while (passed_s := time.perf_counter() - start_s) < seconds:
        while number < passed_s * rate and len(open_ones) < MAX_OPEN:
            task = asyncio.create_task(one(number))
            open_ones.add(task)
            task.add_done_callback(open_ones.discard)
            number += 1
        if len(memory) <= passed_s:
            memory.append(server.memory_bytes)
        await asyncio.sleep(0.005)
    await asyncio.gather(*open_ones)
    return statuses, took, memory


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--model", help="a folder; none: the default model")
    arguments = parser.parse_args()
    model = ("--model", arguments.model) if arguments.model else ()
    with served("--max-rows", str(MAX_ROWS), "--max-queued", str(MAX_QUEUED), *model) as server:
        rate, at_capacity = asyncio.run(capacity(server.port))
        print(f"capacity: {rate:.1f} requests/s, p99 {p99(at_capacity):.2f} s", flush=True)
        statuses, took, memory = asyncio.run(overload(server, FACTOR * rate, arguments.seconds))
        url = f"http://127.0.0.1:{server.port}"
        is_ready = httpx.get(f"{url}/readyz", timeout=30).status_code == 200
    ratio = p99(took) / p99(at_capacity)
    minute = max(1, len(memory) // 5)
    growth = max(memory[-minute:]) / max(memory[:minute])
    print(f"answers: {dict(statuses)}, ready afterwards: {is_ready}")
    print(f"accepted p99 {p99(took):.2f} s, {ratio:.2f}x of at capacity, held to <= {MAX_P99}x")
    print(f"memory at the end against the beginning {growth:.3f}x, held to <= {MAX_GROWTH}x")
    is_good = set(statuses) <= {"200", "429", "503"} and ratio <= MAX_P99 and growth <= MAX_GROWTH and is_ready
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
