"""What requests used, summed here and kept by the registry every few seconds."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from prefix_store.errors import StorageFullError, UnavailableError, in_full
from prefix_store.registry import Registry
from prefix_store.usage import Usage

log = structlog.get_logger()


def today() -> str:
    """The UTC day, `2026-11-25`."""
    return time.strftime("%Y-%m-%d", time.gmtime(time.time()))


@dataclass(frozen=True)
class Batch:
    id: str
    rows: tuple[Usage, ...]


class Meter:
    """Used from the event loop only. What was not flushed when a server is killed is lost: some seconds' worth.

    A batch is given to the registry again until it says that it has it, under the same id: it counts once.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._sums: dict[tuple[str, str, str, int], Usage] = {}
        self._batch: Batch | None = None
        self._flushing = asyncio.Lock()

    def add(self, rows: Iterable[Usage]) -> None:
        for row in rows:
            found = self._sums.get(row.key)
            self._sums[row.key] = row if found is None else found + row

    async def flush(self) -> None:
        """Where the registry is away or full it stays for the next time."""
        async with self._flushing:
            if await self._hand_over():  # what stayed from the last time
                await self._hand_over()

    async def _hand_over(self) -> bool:
        """Whether the registry has the batch, which is made if there is none."""
        if self._batch is None:
            if not self._sums:
                return True
            self._batch, self._sums = Batch(uuid.uuid4().hex, tuple(self._sums.values())), {}
        try:
            await asyncio.to_thread(self._registry.add_usage, self._batch.rows, self._batch.id)
        except (UnavailableError, StorageFullError) as error:
            log.warning("usage_kept_back", num_rows=len(self._batch.rows), reason=in_full(error))
            return False
        self._batch = None
        return True
