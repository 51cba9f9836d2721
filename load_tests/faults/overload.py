"""Ten times what the server can take, for minutes: what is refused, how long the accepted wait, what memory does.

    PYTHONPATH=load_tests python -m faults.overload [--seconds 300] [--model PATH]

First `capacity`: every row busy and every place in the queue taken, one request after another on as many connections,
which gives the rate that is served and how long it takes. Then arrivals at chance (Poisson) at ten times that
rate for `--seconds`, and before that at the rate itself. Held to: no other answer than 200, 429 and 503, an accepted
99th percentile of at most 1.5 times that at capacity, of both kinds, and resident memory that does not grow by more
than a tenth from the first fifth to the last. The queue has half as many places as there are rows: who is accepted then
waits for half of an answer's time at most, which is what bounds the percentile.
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

MAX_ROWS, MAX_QUEUED, NUM_IN, NUM_OUT = 16, 8, 32, 32
FACTOR, MAX_P99, MAX_GROWTH = 10, 1.5, 1.1
CAPACITY_S, AGAIN_S = 60.0, 0.1
MAX_OPEN = 2000
KV_BYTES = "192MiB"  # all of it is in use before the memory is compared: it is the kernel's until it is
STATUS = re.compile(r": (\d{3}) ")


def status(error: RuntimeError) -> str:
    """Of a request that was not answered with 200."""
    found = STATUS.search(str(error))
    return found[1] if found else str(error)[:80]


def body(seed: object) -> dict[str, object]:
    return {"inputs": prompt(seed, NUM_IN), "parameters": {"max_new_tokens": NUM_OUT, "ignore_eos": True}}


async def capacity(port: int) -> tuple[float, list[float]]:
    """Requests a second, and seconds of each, with every row busy and every place taken."""
    end_s = time.perf_counter() + CAPACITY_S
    took_s: list[float] = []

    async def work(number: int) -> None:
        connection = await Connection.open(port)
        count = 0
        while (asked_s := time.perf_counter()) < end_s:
            count += 1
            try:
                await connection.request("POST", "/generate", body(f"{number} {count}"))
            except RuntimeError as error:
                if status(error) != "503":
                    raise
                await asyncio.sleep(AGAIN_S)  # a place is another's until its first token
            else:
                took_s.append(time.perf_counter() - asked_s)
        await connection.close()

    start_s = time.perf_counter()
    await asyncio.gather(*(work(number) for number in range(MAX_QUEUED + MAX_ROWS)))
    return len(took_s) / (time.perf_counter() - start_s), took_s


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
            seen.statuses[status(error)] += 1
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
        rate, took_s = asyncio.run(capacity(server.port))
        print(f"capacity: {rate:.2f} requests/s, p99 {p99(took_s):.2f} s of {len(took_s)}", flush=True)
        at_chance = asyncio.run(offer(server, rate, CAPACITY_S, "at"))
        print(f"1x: {report(at_chance)}", flush=True)
        over = asyncio.run(offer(server, FACTOR * rate, arguments.seconds, "over"))
        print(f"{FACTOR}x: {report(over)}", flush=True)
        is_ready = httpx.get(f"http://127.0.0.1:{server.port}/readyz", timeout=30).status_code == 200
    capacities = {"with all places taken": took_s, "of arrivals at the rate": at_chance.took_s}
    ratio = p99(over.took_s) / min(map(p99, capacities.values()))
    minute = max(1, len(over.memory) // 5)
    growth = max(over.memory[-minute:]) / max(over.memory[:minute])
    print(f"ready afterwards: {is_ready}")
    for name, found in capacities.items():
        print(f"accepted p99 {p99(over.took_s) / p99(found):.2f}x of at capacity {name}, held to <= {MAX_P99}x")
    print(f"memory at the end against the beginning {growth:.3f}x, held to <= {MAX_GROWTH}x")
    is_good = set(over.statuses) <= {"200", "429", "503"} and ratio <= MAX_P99 and growth <= MAX_GROWTH and is_ready
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
