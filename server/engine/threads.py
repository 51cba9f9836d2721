"""Who computes on how many threads: the step on all cores, everything beside it on one.

As soon as the threads of all OpenMP pools of a process together exceed the cores, libgomp no longer waits a moment for
the next piece of work but sleeps, and a step has hundreds of them (a third of its time at one row). torch and MKL
have a number for the whole process, `torch.set_num_threads`, which would end that: OpenMP's own is a thread's.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch


def load_openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch has loaded, its symbols open to other libraries. None where it is another than libgomp."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    return None


def use_one_thread() -> None:
    """The calling thread computes alone from now on."""
    torch.zeros(1, 2).softmax(-1)  # torch sets a thread's number at its first parallel loop and would undo what follows
    openmp = load_openmp()
    if openmp is not None:
        openmp.omp_set_num_threads(1)


def workers(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Threads that compute alone each."""
    return ThreadPoolExecutor(num_threads, name, initializer=use_one_thread)
