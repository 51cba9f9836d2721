"""What requests used, summed here and kept by the registry every few seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import structlog

from prefix_store.errors import StorageFullError, UnavailableError
from prefix_store.registry import Registry
from prefix_store.usage import Usage

log = structlog.get_logger()


def today() -> str:
    """The UTC day, `2026-11-25`."""
    return time.strftime("%Y-%m-%d", time.gmtime(time.time()))


class Meter:
    """Used from the event loop only. What was not flushed when a server is killed is lost: some seconds' worth."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._sums: dict[tuple[str, str, str, int], Usage] = {}

    def add(self, rows: Iterable[Usage]) -> None:
        for row in rows:
            found = self._sums.get(row.key)
            self._sums[row.key] = row if found is None else found + row

    async def flush(self) -> None:
        """Where the registry is away or full the sums stay for the next time."""
        rows, self._sums = list(self._sums.values()), {}
        if not rows:
            return
        try:
            await asyncio.to_thread(self._registry.add_usage, rows)
        except (UnavailableError, StorageFullError) as error:
            log.warning("usage_kept_back", num_rows=len(rows), reason=str(error))
            self.add(rows)
