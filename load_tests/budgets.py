"""The step and server figures that the budgets hold, each a ratio of pairs taken in turn.

python load_tests/budgets.py [--only http,loads] [--rounds 7] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from figures import Bound, Series, in_ms, in_turn
from in_process import CPU, InProcess
from registered import register
from results import Run, options
from served import Answer, Served, served
from workloads import (
    NUM_OUT,
    NUM_VIRTUAL,
    Ask,
    Measures,
    Task,
    asks_of,
    measures_of,
    shared_long,
    soft_tasks,
    template,
)

from server.engine.model_runner import native_dtype
from server.model_files import ModelFiles, find_model

CONTEXT = 64
NUM_REGISTERED, FEW_REGISTERED, NUM_LOOKUPS = 10_000, 10, 50
SETTLED_S = 1.0  # by then every row runs
FLAT = 1.2  # what "flat" is held to


def shared_prefix(run: Run, files: ModelFiles, measures: Measures) -> None:
    """A long prefix that rows share, against a short one."""
    long = shared_long(run.is_quick, 0)
    (long_task,) = long.tasks
    short_task = soft_tasks(1)[0]
    num_rows, text = len(long.asks), CONTEXT - 1
    engine = InProcess(
        files,
        measures,
        native_dtype("auto", CPU),
        max_rows=2 * num_rows,
        kv_tokens=2 * num_rows * 2 * CONTEXT,
        max_step_tokens=2 * num_rows * CONTEXT,
        prefix_tokens=long_task.num_virtual_tokens + 2 * NUM_VIRTUAL,
    )
    rows = engine.rows(short=asks_of([short_task] * num_rows, text), long=asks_of([long_task] * num_rows, text))
    short, far = f"{NUM_VIRTUAL} virtual tokens", f"{long_task.num_virtual_tokens:,} virtual tokens"
    series = in_turn({short: in_ms(rows["short"].model_s), far: in_ms(rows["long"].model_s)}, run.rounds, num_warm=2)
    title = f"model step of {num_rows} rows that share a prefix"
    text = f"step behind a shared prefix of {long_task.num_virtual_tokens:,} against {NUM_VIRTUAL}, {num_rows} rows"
    run.keep("shared-prefix", title, "ms", series, (Bound(text, far, short, at_most=2.0),))
    own = {short: Series((rows["short"].own_bytes,)), far: Series((rows["long"].own_bytes,))}
    text = f"KV bytes a row behind {long_task.num_virtual_tokens:,} against {NUM_VIRTUAL}, the shared prefix apart"
    run.keep("row-bytes", "KV memory of a row's own", "bytes", own, (Bound(text, far, short, at_most=1.0),))


def many_tasks(run: Run, files: ModelFiles, measures: Measures) -> None:
    """A prefix of its own for every row, against bare rows at the same context."""
    num_rows = 8 if run.is_quick else 64
    engine = InProcess(
        files,
        measures,
        native_dtype("auto", CPU),
        max_rows=2 * num_rows,
        kv_tokens=2 * num_rows * 2 * CONTEXT,
        max_step_tokens=2 * num_rows * (CONTEXT + NUM_VIRTUAL),
        prefix_tokens=num_rows * 2 * NUM_VIRTUAL,
    )
    rows = engine.rows(
        bare=asks_of([None] * num_rows, CONTEXT + NUM_VIRTUAL - 1), tasks=asks_of(soft_tasks(num_rows), CONTEXT - 1)
    )
    bare, tasks = "bare rows", f"{num_rows} tasks"
    series = in_turn({bare: in_ms(rows["bare"].model_s), tasks: in_ms(rows["tasks"].model_s)}, run.rounds, num_warm=2)
    text = f"{num_rows} rows, each of another task, against bare rows at equal context"
    title = f"model step of {num_rows} rows at context {CONTEXT + NUM_VIRTUAL}"
    run.keep("many-tasks", title, "ms", series, (Bound(text, bare, tasks, at_least=0.85),))


def http(run: Run, files: ModelFiles, measures: Measures) -> None:
    """Streams over HTTP against the engine in this process."""
    tasks = soft_tasks(8 if run.is_quick else 64)
    num_tokens = len(tasks) * NUM_OUT
    engine = InProcess(files, measures, native_dtype("auto", CPU))
    with served() as server:
        server.publish(tasks, measures)

        def alone(turn: int) -> float:
            return num_tokens / engine.seconds(asks_of(tasks, turn=turn), NUM_OUT)

        def streams(turn: int) -> float:
            answers = server.streams(asks_of(tasks, turn=turn), NUM_OUT)
            return num_tokens / max(answer.tokens_s[-1] for answer in answers)

        series = in_turn({"engine in process": alone, "HTTP": streams}, run.rounds)
    bound = Bound(
        f"{len(tasks)} streams over HTTP against the engine in process", "HTTP", "engine in process", at_least=0.90
    )
    run.keep("http", f"{len(tasks)} streams", "tokens/s", series, (bound,))


def loads(run: Run, files: ModelFiles, measures: Measures) -> None:
    """Gaps between tokens of running rows while cold prefixes load, against the same time without."""
    num_cold, num_out = (10, 64) if run.is_quick else (100, 256)
    running, cold = soft_tasks(8, "running"), soft_tasks(num_cold, "cold")
    # Room for half of the cold ones: each is cold again when its turn comes.
    num_resident = len(running) + num_cold // 2
    task_bytes = measures.kv_bytes(NUM_VIRTUAL, native_dtype("auto", CPU))
    with served("--prefix-bytes", str(num_resident * task_bytes)) as server:
        server.publish(running + cold, measures)

        def quiet(turn: int) -> float:
            answers = server.streams(asks_of(running, turn=2 * turn), num_out)
            return p99_ms([gap for answer in answers for gap in gaps_s(answer, answer.sent_s + SETTLED_S)])

        def loading(turn: int) -> float:
            asks = asks_of(running, turn=2 * turn + 1)
            answers, (start_s, end_s) = asyncio.run(stream_while_loading(server, asks, cold, num_out))
            return p99_ms([gap for answer in answers for gap in gaps_s(answer, start_s, end_s)])

        series = in_turn({"quiet": quiet, "loading": loading}, run.rounds)
    text = f"running rows' inter-token p99 while {num_cold} cold prefixes load against quiet"
    title = f"p99 of the time between tokens of {len(running)} rows"
    run.keep("loads", title, "ms", series, (Bound(text, "loading", "quiet", at_most=1.3),))


async def stream_while_loading(
    server: Served, running: tuple[Ask, ...], cold: list[Task], num_out: int
) -> tuple[list[Answer], tuple[float, float]]:
    """The answers, and from when to when the loads went on."""
    streams = asyncio.create_task(server.stream_all(running, num_out))
    await asyncio.sleep(SETTLED_S)
    start_s = time.perf_counter()
    await server.preload_all([task.name for task in cold])
    end_s = time.perf_counter()
    return await streams, (start_s, end_s)


def gaps_s(answer: Answer, start_s: float, end_s: float = float("inf")) -> list[float]:
    """Seconds between neighbouring tokens, those that ended in the window."""
    pairs = zip(answer.tokens_s, answer.tokens_s[1:], strict=False)
    return [after - before for before, after in pairs if start_s <= answer.sent_s + after <= end_s]


def p99_ms(found_s: list[float]) -> float:
    assert found_s, "no token came in the window"
    return sorted(found_s)[int(0.99 * (len(found_s) - 1))] * 1e3


def registered_prefixes(run: Run, files: ModelFiles, measures: Measures) -> None:
    """Many registered tasks against few: start-up, look-up, memory; and the start itself."""
    num_many = 100 if run.is_quick else NUM_REGISTERED
    counts = {f"{FEW_REGISTERED} registered": FEW_REGISTERED, f"{num_many:,} registered": num_many}
    few, many = counts
    with ExitStack() as stack:
        folders = {name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for name in counts}
        for name, count in counts.items():
            register(files, soft_tasks(count, "registered"), measures, folders[name])

        def start(name: str, _: int) -> float:
            with served(data_dir=folders[name]) as server:
                return server.ready_s

        starts = in_turn({name: partial(start, name) for name in counts}, run.rounds)
        servers = {name: stack.enter_context(served(data_dir=folders[name])) for name in counts}

        def lookup(name: str, turn: int) -> float:
            asked = random.Random(turn).choices(range(counts[name]), k=NUM_LOOKUPS)
            return servers[name].lookup_s([f"registered-{i}" for i in asked]) * 1e3

        lookups = in_turn({name: partial(lookup, name) for name in counts}, run.rounds)
        memory = {name: Series((server.memory_bytes / 2**20,)) for name, server in servers.items()}
    against = f"of {num_many:,} registered prefixes against {FEW_REGISTERED}"
    ready = Bound("ready after start, model on disk", few, at_most=10)
    run.keep("start", "start to ready", "s", starts, (ready, Bound(f"start {against}", many, few, at_most=FLAT)))
    bound = Bound(f"look-up over HTTP {against}", many, few, at_most=FLAT)
    run.keep("lookup", "describing a task over HTTP", "ms", lookups, (bound,))
    bound = Bound(f"memory {against}", many, few, at_most=FLAT)
    run.keep("memory", "resident memory of the server", "MiB", memory, (bound,))


def cached_text(run: Run, files: ModelFiles, measures: Measures) -> None:
    """Time to the first token of a text whose template an earlier request had, against a template that is new."""
    num_cached: list[int] = []
    with served() as server:
        server.publish(template(run.is_quick, 0).tasks, measures)

        def first_token(is_cached: bool, turn: int) -> float:
            workload = template(run.is_quick, turn, is_cached=is_cached)
            if workload.lead is not None:
                server.streams([workload.lead], 1)
            (answer,) = server.streams(workload.asks, 1)
            if is_cached:
                num_cached.append(answer.details["cached_tokens"])
            return workload.figure(1, answer.tokens_s[0])

        series = in_turn({"cold": partial(first_token, False), "cached": partial(first_token, True)}, run.rounds)
    series["cached"] = replace(series["cached"], note=f"{min(num_cached)} to {max(num_cached)} cached tokens")
    text = "time to first token with the template's tokens cached against cold"
    run.keep(
        "cached-text", template(run.is_quick, 0).title, "ms", series, (Bound(text, "cached", "cold", at_most=0.25),)
    )


SECTIONS: dict[str, Callable[[Run, ModelFiles, Measures], None]] = {
    "shared": shared_prefix,
    "tasks": many_tasks,
    "http": http,
    "loads": loads,
    "registered": registered_prefixes,
    "cached": cached_text,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="names, with commas")
    arguments = options(parser, rounds=7)
    names = arguments.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"expected some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    run, files = Run.of("budgets", arguments), find_model(None)
    measures = measures_of(files.path)
    for name in names:
        SECTIONS[name](run, files, measures)
        gc.collect()
    run.finish()


if __name__ == "__main__":
    main()
