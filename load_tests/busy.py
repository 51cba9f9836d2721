"""Tokens a second while other processes keep cores busy, the number of threads adapted as the server does and fixed at
all cores; and how long the server takes to notice that such a process came or went.

    python load_tests/busy.py [--rounds 7] [--quick]

Nothing else may run on the machine. The script starts the busy processes, each in a session of its own: Linux shares
cores between sessions first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from figures import Bound, Series, in_turn
from in_process import CPU, InProcess, Rows
from results import BUSY, Run, options
from workloads import Measures, asks_of, measures_of

from server.engine.model_runner import native_dtype
from server.engine.step_threads import StepThreads
from server.engine.threads import use_one_thread
from server.model_files import ModelFiles, find_model

ROW_COUNTS, FP32_ROW_COUNTS = (1, 16, 64), (16,)
CONTEXT = 64
BUSY_COUNTS = (0, 1, 2)
AT_LEAST = {1: 0.45, 2: 0.30}  # of alone, by the number of busy processes
WARM_S, MEASURED_S, NOTICE_S = 0.7, 1.5, 10.0
ADAPTED, FIXED = "adapted threads", "all threads"
Step = Callable[[], float]


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """So many processes that compute without end, until the block is left."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(num_processes)]
    try:
        time.sleep(0.2 if processes else 0.0)  # until they compute
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def in_thread(function: Callable[[], float]) -> float:
    """Call `function` in a new thread and return its result. The OpenMP threads end with that thread."""
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def seconds_a_step(step: Step, is_adapted: bool) -> float:
    """After a while in which the number of threads is found."""
    threads = StepThreads() if is_adapted else None
    num_steps, begin_s, warm_until_s = 0, 0.0, time.perf_counter() + WARM_S
    while not num_steps or time.perf_counter() < begin_s + MEASURED_S:
        step_s = step()
        if threads is not None:
            threads.after_step(step_s)
        if begin_s:
            num_steps += 1
        elif time.perf_counter() >= warm_until_s:
            begin_s = time.perf_counter()
    return (time.perf_counter() - begin_s) / num_steps


def measure_throughput(run: Run, engine: InProcess, dtype: torch.dtype, num_rows: int) -> None:
    rows = engine.rows(busy=asks_of([None] * num_rows, CONTEXT - 1))
    names = {(kind, count): name_of(kind, count) for count in BUSY_COUNTS for kind in (ADAPTED, FIXED)}

    def tokens_a_second(is_adapted: bool, num_busy: int, _: int) -> float:
        with busy(num_busy):
            return num_rows / in_thread(partial(seconds_a_step, rows["busy"].model_s, is_adapted))

    measures = {name: partial(tokens_a_second, kind == ADAPTED, count) for (kind, count), name in names.items()}
    series = in_turn(measures, run.rounds, num_warm=0)
    engine.drop(rows)
    dtype_name = str(dtype).removeprefix("torch.")
    what = f"{num_rows} row{'s' * (num_rows > 1)}, {dtype_name}"
    alone = names[ADAPTED, 0]
    bounds = [
        Bound(f"{what}: beside {count} busy against alone", names[ADAPTED, count], alone, at_least=limit)
        for count, limit in AT_LEAST.items()
    ]
    bounds.append(Bound(f"{what}: {ADAPTED} against {FIXED}, alone", alone, names[FIXED, 0], at_least=0.97))
    run.keep(f"{dtype_name}-{num_rows}", f"model steps of {what}", "tokens/s", series, tuple(bounds))


def name_of(kind: str, num_busy: int) -> str:
    return f"{kind}, {'alone' if num_busy == 0 else f'{num_busy} busy'}"


def measure_notice(run: Run, engine: InProcess, num_rows: int) -> None:
    """Seconds from a busy process's start until steps leave it a core, and from its end until steps use all cores."""
    rows: dict[str, Rows] = engine.rows(busy=asks_of([None] * num_rows, CONTEXT - 1))

    def until(threads: StepThreads, is_reached: Callable[[int], bool]) -> float:
        start_s = time.perf_counter()
        while not is_reached(threads.num_threads) and time.perf_counter() < start_s + NOTICE_S:
            threads.after_step(rows["busy"].model_s())
        return time.perf_counter() - start_s

    came, went = [], []

    def round_trip() -> float:
        threads = StepThreads()
        num_cores = threads.num_threads
        with busy(1):
            came.append(until(threads, lambda count: count < num_cores))
        went.append(until(threads, lambda count: count == num_cores))
        return 0.0

    for _ in range(run.rounds):
        in_thread(round_trip)
    engine.drop(rows)
    series = {"it came": Series(tuple(came)), "it went": Series(tuple(went))}
    run.keep("notice", f"noticing a busy process in steps of {num_rows} rows", "s", series)


def measure(run: Run, files: ModelFiles, measures: Measures, dtype: torch.dtype, row_counts: tuple[int, ...]) -> None:
    engine = InProcess(files, measures, dtype, max_rows=max(row_counts), max_step_tokens=max(row_counts) * CONTEXT)
    for num_rows in row_counts:
        measure_throughput(run, engine, dtype, num_rows)
    if dtype is native_dtype("auto", CPU):
        measure_notice(run, engine, row_counts[len(row_counts) // 2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = options(parser, rounds=7)
    run, files = Run.of(BUSY, arguments), find_model(None)
    use_one_thread()  # this thread: the measured ones have their own
    measures = measures_of(files.path)
    native = native_dtype("auto", CPU)
    by_dtype = {native: (1,) if run.is_quick else ROW_COUNTS}
    if native is not torch.float32 and not run.is_quick:
        by_dtype[torch.float32] = FP32_ROW_COUNTS
    for dtype, row_counts in by_dtype.items():
        measure(run, files, measures, dtype, row_counts)
    run.finish()


if __name__ == "__main__":
    assert len(os.sched_getaffinity(0)) > 1, "on one core steps have one thread"
    main()
