"""Tokens a second as rows, registered tasks and virtual tokens grow.

python load_tests/growth.py [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from figures import in_turn
from registered import register
from results import Run, options
from served import Served, served
from workloads import NUM_OUT, NUM_VIRTUAL, Measures, Task, asks_of, measures_of, soft_tasks

from server.model_files import ModelFiles, find_model

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REGISTERED = (1, 10, 100, 1_000, 10_000)
VIRTUAL = (20, 64, 256, 1024, 2048, 4096)
KV_BYTES = 2**29  # of a server where several stand side by side


def rate(server: Served, tasks: list[Task], turn: int) -> float:
    """Tokens a second of one request of each, all at once."""
    return len(tasks) * NUM_OUT / server.seconds(asks_of(tasks, turn=turn), NUM_OUT, len(tasks))


def rows(run: Run, measures: Measures) -> None:
    counts = ROWS[:4] if run.is_quick else ROWS
    tasks = soft_tasks(64)
    with served("--max-rows", str(max(ROWS))) as server:
        server.publish(tasks, measures)
        points = {str(count): partial(rate, server, [tasks[i % 64] for i in range(count)]) for count in counts}
        series = in_turn(points, run.rounds)
    run.keep("rows", f"rows, over 64 tasks of {NUM_VIRTUAL} virtual tokens", "tokens/s", series)


def registered_tasks(run: Run, files: ModelFiles, measures: Measures) -> None:
    """64 requests drawn evenly from all registered tasks: from some hundred on most of them are cold."""
    counts = REGISTERED[:3] if run.is_quick else REGISTERED
    tasks = soft_tasks(max(counts), "registered")
    with ExitStack() as stack:

        def point(server: Served, count: int, turn: int) -> float:
            return rate(server, random.Random(turn).choices(tasks[:count], k=64), turn)

        points = {}
        for count in counts:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            register(files, tasks[:count], measures, folder)
            server = stack.enter_context(served("--kv-bytes", str(KV_BYTES), data_dir=folder))
            points[f"{count:,}"] = partial(point, server, count)
        series = in_turn(points, run.rounds)
    run.keep("registered", "registered tasks, 64 requests drawn evenly from them", "tokens/s", series)


def virtual_tokens(run: Run, measures: Measures) -> None:
    counts = VIRTUAL[:3] if run.is_quick else VIRTUAL
    with served() as server:
        points = {}
        for count in counts:
            task = Task(f"virtual-{count}", "kv", count, seed=count)
            server.publish([task], measures)
            points[f"{count:,}"] = partial(rate, server, [task] * 32)
        series = in_turn(points, run.rounds)
    run.keep("virtual", "virtual tokens of a KV prefix that 32 rows share", "tokens/s", series)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = Run.of("growth", options(parser, rounds=5))
    files = find_model(None)
    measures = measures_of(files.path)
    rows(run, measures)
    registered_tasks(run, files, measures)
    virtual_tokens(run, measures)
    run.finish()


if __name__ == "__main__":
    main()
