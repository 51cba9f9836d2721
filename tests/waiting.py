"""Waiting for what comes by itself. The bound only ends what would never come: how long it takes is for benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable

SOON_S = 30.0


def eventually(is_so: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < deadline_s, f"it did not become so within {SOON_S:g} s"
        time.sleep(0.01)
