"""Quiet tenants beside one that asks for 50 times its share, and beside 50 that ask for one share each.

    OMP_NUM_THREADS=1 PYTHONPATH=load_tests python -m faults.fairness [--rounds 40] [--seconds 4] [--model PATH]

On a tiny model by default: a wave of requests takes a second, so that there are many.

Every round measures, in turn: `equal`, 50 tenants with one request on its way each; `greedy`, one tenant with 50;
`first come`, the same 54 streams of requests from one single tenant, whose requests are served in the order of arrival.
Four quiet tenants ask beside them, one request at a time with a pause. Throughput is compared in processor seconds of
the server for a token, `greedy` against `first come` of the same round. A round moves by a tenth either way with what
else the machine does, so there are many short ones, and the median is given with its 95 % interval. Then two tenants
that always wait are compared by the tokens that they were served.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from faults.keyed import Keyed, keyed
from http_client import Connection
from workloads import prompt

from tests.byte_model import save_byte_model

NUM_QUIET, NUM_LOUD, NUM_IN, NUM_OUT = 4, 50, 32, 32
MAX_ROWS = 16
OPTIONS = ("--max-rows", str(MAX_ROWS), "--max-queue-s", "600")
PAUSE_S = 0.5
MAX_TTFT, MIN_THROUGHPUT = 1.3, 0.97
INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # of the virtual token counters


@dataclass
class Seen:
    """First tokens of quiet requests, seconds after they were sent, and when any token of all came."""

    first_s: list[float] = field(default_factory=list)
    num_tokens: int = 0


async def ask(connection: Connection, seen: Seen, seed: object, *, is_quiet: bool) -> None:
    body = {"inputs": prompt(seed, NUM_IN), "parameters": {"max_new_tokens": NUM_OUT, "ignore_eos": True}}
    sent_s, is_first = time.perf_counter(), True
    async for _ in connection.events("/generate_stream", body):
        if is_first and is_quiet:
            seen.first_s.append(time.perf_counter() - sent_s)
        is_first = False
        seen.num_tokens += 1


async def asking(port: int, key: str, seen: Seen, end_s: float, name: str, *, is_quiet: bool) -> None:
    chance = random.Random(name)
    connection = await Connection.open(port, key)
    count = 0
    while time.perf_counter() < end_s:
        if is_quiet:
            await asyncio.sleep(PAUSE_S * chance.uniform(0.5, 1.5))
        await ask(connection, seen, f"{name} {count}", is_quiet=is_quiet)
        count += 1
    await connection.close()


async def run(server: Keyed, quiet: list[str], loud: list[str], seconds: float, name: str) -> tuple[Seen, float]:
    """Keys of the quiet and the loud, one stream of requests each; how long it took."""
    seen = Seen()
    start_s = time.perf_counter()
    await asyncio.gather(
        *(
            asking(server.port, key, seen, start_s + seconds, f"{name} quiet {i}", is_quiet=True)
            for i, key in enumerate(quiet)
        ),
        *(
            asking(server.port, key, seen, start_s + seconds, f"{name} loud {i}", is_quiet=False)
            for i, key in enumerate(loud)
        ),
    )
    return seen, time.perf_counter() - start_s


async def backlogged(server: Keyed, keys: list[str], seconds: float) -> float:
    """The largest difference of the two tenants' served tokens, weighed as the counters weigh them, while both wait."""
    seen = [Seen(), Seen()]
    start_s = time.perf_counter()
    largest = 0.0

    async def watch() -> None:
        nonlocal largest
        while time.perf_counter() < start_s + seconds:
            await asyncio.sleep(0.05)
            served = [one.num_tokens * (OUTPUT_WEIGHT + INPUT_WEIGHT * NUM_IN / NUM_OUT) for one in seen]
            largest = max(largest, abs(served[0] - served[1]))

    await asyncio.gather(
        watch(),
        *(
            asking(server.port, key, one, start_s + seconds, f"both {which} {i}", is_quiet=False)
            for which, (key, one) in enumerate(zip(keys, seen, strict=True))
            for i in range(24 if which else 40)
        ),
    )
    return largest


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def interval(ordered: list[float]) -> tuple[float, float]:
    """Between these two of the values, in their order, lies the median of what they are drawn from, 19 times of 20."""
    count = len(ordered)
    below, rank = 0.0, 0
    while (below := below + math.comb(count, rank) / 2**count) <= 0.025:
        rank += 1
    return ordered[max(rank - 1, 0)], ordered[min(count - rank, count - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--model", type=Path, help="a folder; none: a tiny one")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = arguments.model or save_byte_model(folder / "fair")
        server = stack.enter_context(keyed("--model", str(model), *OPTIONS))
        quiet = [server.tenant(f"quiet-{i}") for i in range(NUM_QUIET)]
        many = [server.tenant(f"equal-{i}") for i in range(NUM_LOUD)]
        greedy, alone = server.tenant("greedy"), server.tenant("alone")
        cases = {
            "equal": (quiet, many),
            "greedy": (quiet, [greedy] * NUM_LOUD),
            "first come": ([alone] * NUM_QUIET, [alone] * NUM_LOUD),
        }
        first_s: dict[str, list[float]] = {name: [] for name in cases}
        rates: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(arguments.rounds):
            for name, (few, loud) in random.Random(number).sample(list(cases.items()), len(cases)):
                start_s = server.served.processor_s
                seen, took_s = asyncio.run(run(server, few, loud, arguments.seconds, f"{name} {number}"))
                first_s[name] += seen.first_s
                rates[name].append(seen.num_tokens / (server.served.processor_s - start_s))
                print(
                    f"{name}: {len(seen.first_s)} quiet requests, first token p99 {p99(seen.first_s) * 1e3:.0f} ms, "
                    f"{rates[name][-1]:.1f} tokens a processor second, {seen.num_tokens / took_s:.1f} a second",
                    flush=True,
                )
        difference = asyncio.run(backlogged(server, [greedy, alone], arguments.seconds))
    waits = p99(first_s["greedy"]) / p99(first_s["equal"])
    pairs = sorted(fair / plain for fair, plain in zip(rates["greedy"], rates["first come"], strict=True))
    throughput = statistics.median(pairs)
    bound = 2 * max(INPUT_WEIGHT * NUM_IN, OUTPUT_WEIGHT * MAX_ROWS * (NUM_IN + NUM_OUT))
    print(f"first token p99 of the quiet beside one greedy against 50 equal: {waits:.2f}x, held to <= {MAX_TTFT}x")
    low, high = interval(pairs)
    spread = f"{low:.3f} to {high:.3f}; rounds {pairs[0]:.3f} to {pairs[-1]:.3f}"
    print(f"throughput against first come: {throughput:.3f}x ({spread}), held to >= {MIN_THROUGHPUT}x")
    print(f"two that always wait differ by {difference:.0f} weighed tokens at most, held to <= {bound}")
    sys.exit(waits > MAX_TTFT or throughput < MIN_THROUGHPUT or difference > bound)


if __name__ == "__main__":
    main()
