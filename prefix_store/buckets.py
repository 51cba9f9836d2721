"""Token buckets: what a tenant may do in a minute, refilled steadily."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple


class Taken(NamedTuple):
    """`remaining` is what is left in the bucket, 0 at least; `wait_s` after how long the amount would be there: 0
    where it was taken, infinite where the bucket never holds so much."""

    taken: bool
    remaining: float
    wait_s: float


def settle(level: float, amount: float, capacity: float, per_s: float, may_owe: bool) -> tuple[float, Taken]:
    """The new level of a bucket that holds `level`, and what became of taking `amount` out of it."""
    if may_owe or amount <= max(0.0, level) + 1e-9:
        level = min(capacity, level - amount)
        return level, Taken(True, max(0.0, level), 0.0)
    is_hopeless = amount > capacity or per_s <= 0
    return level, Taken(False, max(0.0, level), math.inf if is_hopeless else (amount - level) / per_s)


class TokenBuckets:
    """Those of one process. May be called from any thread."""

    def __init__(self) -> None:
        self._levels: dict[tuple[str, str], tuple[float, float]] = {}  # what there was, and when
        self._lock = threading.Lock()

    def take(
        self,
        tenant: str,
        bucket: str,
        amount: float,
        capacity: float,
        per_s: float,
        now: float,
        *,
        may_owe: bool = False,
    ) -> Taken:
        """As `Registry.take`."""
        with self._lock:
            level, then = self._levels.get((tenant, bucket), (capacity, now))
            level = min(capacity, level + max(0.0, now - then) * per_s)
            level, taken = settle(level, amount, capacity, per_s, may_owe)
            self._levels[tenant, bucket] = (level, now)
        return taken
