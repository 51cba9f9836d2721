"""The threads that compute the steps: how long they wait for a core, and how many the next step uses.

Linux counts how long each thread was ready to run but not scheduled, and how long each core was idle. On other systems,
or with another OpenMP than libgomp, steps use all threads.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from server.engine.thread_count import ThreadCount, Window
from server.engine.threads import load_openmp

WINDOW_S = 0.2  # of computing: some slices of the scheduler, and many of the 10 ms in which idle time is counted
TASKS = Path("/proc/self/task")
CORES = Path("/proc/stat")
log = structlog.get_logger()


@dataclass(frozen=True)
class Reading:
    """The kernel's counters at one moment."""

    at_s: float
    waited_s: dict[str, float]  # by thread: of the step's own, and those that OpenMP started for it
    idle_s: float  # of all cores that this process may use


class StepThreads:
    """Made in the thread that runs the steps and used there only: OpenMP's number of threads is each thread's own."""

    def __init__(self) -> None:
        torch.zeros(1, 2).softmax(-1)  # torch sets a thread's number at its first parallel loop and would undo ours
        self._openmp = load_openmp()
        self._count = ThreadCount(torch.get_num_threads())
        self._computed_s = 0.0
        self._last = self._read()

    @property
    def num_threads(self) -> int:
        return self._count.num_threads

    def after_step(self, computed_s: float) -> None:
        """Count a step of so many seconds. Where a window ends, the next step's number of threads may be another."""
        self._computed_s += computed_s
        if self._computed_s < WINDOW_S:
            return
        reading = self._read()
        if self._last is not None and reading is not None:
            self._observe(self._window(self._last, reading))
        self._last, self._computed_s = reading, 0.0

    def _observe(self, window: Window) -> None:
        before = self.num_threads
        self._count.observe(window)
        if self.num_threads != before:
            assert self._openmp is not None
            self._openmp.omp_set_num_threads(self.num_threads)
            waiting, spare = round(window.waiting, 2), round(window.spare, 2)
            log.info("step_threads", num_threads=self.num_threads, waiting=waiting, spare=spare)

    def _window(self, before: Reading, after: Reading) -> Window:
        elapsed_s = after.at_s - before.at_s
        paused_s = max(elapsed_s - self._computed_s, 0.0)
        waited_s = sum(at_end - before.waited_s.get(thread, 0.0) for thread, at_end in after.waited_s.items())
        idle_s = after.idle_s - before.idle_s - self.num_threads * paused_s
        return Window(waiting=waited_s / self._computed_s, spare=idle_s / elapsed_s)

    def _read(self) -> Reading | None:
        """None: there is nothing to decide, or the kernel does not tell (now: too many files may be open)."""
        if self._openmp is None or self._count.max_threads == 1:
            return None
        try:
            return Reading(time.monotonic(), _waited_s(), _idle_s())
        except (OSError, ValueError):
            return None


def _waited_s() -> dict[str, float]:
    """Of the calling thread and of all that Python did not start: OpenMP's are among them."""
    pythons = {str(thread.native_id) for thread in threading.enumerate()} - {str(threading.get_native_id())}
    waited_s = {}
    for thread in set(os.listdir(TASKS)) - pythons:
        try:
            _, waited_ns, _ = (TASKS / thread / "schedstat").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        waited_s[thread] = int(waited_ns) / 1e9
    return waited_s


def _idle_s() -> float:
    """Of all cores that this process may use, also idle while a disk works."""
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in CORES.read_text().splitlines():
        name, *fields = line.split()
        if name in names:
            _user, _nice, _system, idle, io_wait, *_ = map(int, fields)
            ticks += idle + io_wait
    return ticks / os.sysconf("SC_CLK_TCK")
