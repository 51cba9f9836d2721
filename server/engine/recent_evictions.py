"""Which prefixes were evicted lately to make room: to load one of them again is thrash."""

from __future__ import annotations

import time
from collections import OrderedDict

THRASH_S = 60.0
MAX_REMEMBERED = 4096


class RecentEvictions:
    """Of the last 60 s, the latest 4,096."""

    def __init__(self) -> None:
        self._evicted: OrderedDict[str, float] = OrderedDict()  # key -> when, longest ago first

    def add(self, key: str) -> None:
        self._evicted[key] = time.monotonic()
        self._evicted.move_to_end(key)
        while len(self._evicted) > MAX_REMEMBERED:
            self._evicted.popitem(last=False)

    def pop(self, key: str) -> bool:
        """Whether it is one, which it is no longer."""
        when = self._evicted.pop(key, None)
        return when is not None and time.monotonic() - when < THRASH_S
