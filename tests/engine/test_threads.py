"""Threads beside the step compute alone: they start no OpenMP threads of their own."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: the tests' own has one thread for everything.
SCRIPT = """
import os, threading
import torch
from server.engine.threads import use_one_thread, workers

def num_threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    large = torch.ones(600, 600)
    half = large.bfloat16()
    for made in (large + 1, large @ large, half @ half, large.softmax(-1), torch.bmm(half[None], half[None])):
        made.sum()
    return num_threads()

num_before = num_threads()
use_one_thread()
assert compute() == num_before
with workers(1, "worker") as pool:
    assert pool.submit(compute).result() == num_before + 1
found = []
step = threading.Thread(target=lambda: found.extend((compute(), torch.get_num_threads())))
step.start()
step.join()
num_alive, num_used = found
assert num_used > 1 or len(os.sched_getaffinity(0)) == 1
assert num_alive == num_before + num_used
"""


def test_only_the_steps_thread_computes_on_several() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
