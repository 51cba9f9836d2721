"""Which loads failed lately: who asks again is told the same, without another try."""

from __future__ import annotations

import time

from prefix_store.errors import DamagedBlobError, InvalidArtefactError, UnavailableError
from server.engine.errors import EngineError, PrefixAwayError, PrefixLoadError

REMEMBERED_S = 10.0


class RecentFailures:
    """Of the last 10 s, by the prefix's key."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[float, type[EngineError], str, bool]] = {}  # key -> when, what, why, whose

    def add(self, key: str, digest: str, error: Exception) -> None:
        now_s = time.monotonic()
        kind = PrefixAwayError if isinstance(error, UnavailableError) else PrefixLoadError
        self._failures = {key: each for key, each in self._failures.items() if now_s - each[0] <= REMEMBERED_S}
        why = f"prefix {digest[:12]} could not be loaded: {error}"
        self._failures[key] = (now_s, kind, why, _is_versions_fault(error))

    def get(self, key: str) -> EngineError | None:
        """PrefixAwayError where the files could not be reached, else PrefixLoadError; the prefix's own fault each time
        that it is asked for, if it was when its load failed."""
        found = self._failures.get(key)
        if found is None or time.monotonic() - found[0] > REMEMBERED_S:
            return None
        _, kind, why, is_versions_fault = found
        return kind(why, is_versions_fault=is_versions_fault)


def _is_versions_fault(error: Exception) -> bool:
    if isinstance(error, EngineError):
        return error.is_versions_fault
    return isinstance(error, DamagedBlobError | InvalidArtefactError)
