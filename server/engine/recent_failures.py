"""Which loads failed lately: a request for the same prefix gets the same error, without another try."""

from __future__ import annotations

import threading
import time

from prefix_store.errors import DamagedBlobError, InvalidArtefactError, UnavailableError
from server.engine.errors import EngineError, PrefixAwayError, PrefixLoadError

REMEMBERED_S = 10.0


class RecentFailures:
    """Of the last 10 s, by the prefix's key. May be called from any thread."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[float, type[EngineError], str, bool]] = {}  # key -> when, what, why, whose
        self._changing = threading.Lock()

    def add(self, key: str, digest: str, error: Exception) -> None:
        now_s = time.monotonic()
        kind = PrefixAwayError if isinstance(error, UnavailableError) else PrefixLoadError
        why = f"prefix {digest[:12]} could not be loaded: {error}"
        with self._changing:
            recent = {key: each for key, each in self._failures.items() if now_s - each[0] <= REMEMBERED_S}
            self._failures = recent | {key: (now_s, kind, why, _is_versions_fault(error))}

    def forget(self, tenant_id: str) -> None:
        """Let the next request for a prefix of this tenant try again: a file of its may have been put right."""
        with self._changing:
            kept = {key: each for key, each in self._failures.items() if not key.startswith(f"{tenant_id}/")}
            self._failures = kept

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
