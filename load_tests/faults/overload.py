"""Ten times what the server can take, for minutes: what is refused, how long the accepted wait, what memory does.

    PYTHONPATH=load_tests python -m faults.overload [--seconds 300] [--model PATH]

First `capacity`: every row busy and others waiting, one request after another on each connection, which gives the rate
that is served. Then arrivals at chance (Poisson) at that rate, and at ten times that rate for `--seconds`. Held to: no
other answer than 200, 429 and 503, an accepted 99th percentile of at most 1.5 times that at capacity, and resident
memory that does not grow by more than a tenth from the first fifth to the last.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
from http_client import Connection
from served import Served, served
from workloads import prompt

MAX_ROWS, MAX_QUEUED, NUM_IN, NUM_OUT = 16, 24, 32, 32
FACTOR, MAX_P99, MAX_GROWTH = 10, 1.5, 1.1
CAPACITY_S, AT_CAPACITY_S = 30.0, 60.0
MAX_OPEN = 2000
KV_BYTES = "192MiB"  # all of it is in use before the memory is compared: it is the kernel's until it is
STATUS = re.compile(r": (\d{3}) ")


def body(seed: object) -> dict[str, object]:
    return {"inputs": prompt(seed, NUM_IN), "parameters": {"max_new_tokens": NUM_OUT, "ignore_eos": True}}


async def capacity(port: int) -> float:
    """Requests a second, with every row busy and others waiting."""
    end_s = time.perf_counter() + CAPACITY_S
    num_answers = 0

    async def work(number: int) -> None:
        nonlocal num_answers
        connection = await Connection.open(port)
        count = 0
        while time.perf_counter() < end_s:
            await connection.request("POST", "/generate", body(f"{number} {count}"))
            num_answers += 1
            count += 1
        await connection.close()

    start_s = time.perf_counter()
    await asyncio.gather(*(work(number) for number in range(MAX_QUEUED)))
    return num_answers / (time.perf_counter() - start_s)


@dataclass
class Seen:
    """Answers by status, seconds of the accepted, and resident memory every second."""

    statuses: Counter[str] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


async def offer(server: Served, rate: float, seconds: float, name: str) -> Seen:
    """Requests that arrive at chance, `rate` a second, whatever the answers."""
    seen = Seen()
    open_ones: set[asyncio.Task[None]] = set()
    chance = random.Random(name)

    async def one(number: int) -> None:
        start_s = time.perf_counter()
        try:
            connection = await Connection.open(server.port)
            try:
                await connection.request("POST", "/generate", body(f"{name} {number}"))
                seen.statuses["200"] += 1
                seen.took_s.append(time.perf_counter() - start_s)
            finally:
                await connection.close()
        except RuntimeError as error:
            found = STATUS.search(str(error))
            seen.statuses[found[1] if found else str(error)[:80]] += 1
        except OSError as error:
            seen.statuses[type(error).__name__] += 1

    start_s = time.perf_counter()
    number, next_s = 0, 0.0
    while (passed_s := time.perf_counter() - start_s) < seconds:
        while next_s < passed_s and len(open_ones) < MAX_OPEN:
            task = asyncio.create_task(one(number))
            open_ones.add(task)
            task.add_done_callback(open_ones.discard)
            number += 1
            next_s += chance.expovariate(rate)
        if len(seen.memory) <= passed_s:
            seen.memory.append(server.memory_bytes)
        await asyncio.sleep(0.005)
    await asyncio.gather(*open_ones)
    return seen


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def report(seen: Seen) -> str:
    return f"answers {dict(seen.statuses)}, accepted p99 {p99(seen.took_s):.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--model", help="a folder; none: the default model")
    arguments = parser.parse_args()
    model = ("--model", arguments.model) if arguments.model else ()
    with served("--max-rows", str(MAX_ROWS), "--max-queued", str(MAX_QUEUED), "--kv-bytes", KV_BYTES, *model) as server:
        rate = asyncio.run(capacity(server.port))
        at_capacity = asyncio.run(offer(server, rate, AT_CAPACITY_S, "at"))
        print(f"capacity: {rate:.1f} requests/s; {report(at_capacity)}", flush=True)
        over = asyncio.run(offer(server, FACTOR * rate, arguments.seconds, "over"))
        print(f"{FACTOR}x: {report(over)}", flush=True)
        is_ready = httpx.get(f"http://127.0.0.1:{server.port}/readyz", timeout=30).status_code == 200
    ratio = p99(over.took_s) / p99(at_capacity.took_s)
    minute = max(1, len(over.memory) // 5)
    growth = max(over.memory[-minute:]) / max(over.memory[:minute])
    print(f"ready afterwards: {is_ready}")
    print(f"accepted p99 {ratio:.2f}x of at capacity, held to <= {MAX_P99}x")
    print(f"memory at the end against the beginning {growth:.3f}x, held to <= {MAX_GROWTH}x")
    is_good = set(over.statuses) <= {"200", "429", "503"} and ratio <= MAX_P99 and growth <= MAX_GROWTH and is_ready
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
