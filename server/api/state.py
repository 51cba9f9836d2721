"""What every route needs, passed in finished: settings, engine, store, metrics; and the look-up of a task."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

import structlog
from fastapi import Depends, Request

from prefix_store.registry import Version
from prefix_store.store import PrefixStore
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.engine.errors import EngineError, OverloadedError
from server.engine.sequence import PrefixRef
from server.metrics import Metrics

TENANT = "default"
MAX_LABELS = 4096
DRAIN_RETRY_S = 5
log = structlog.get_logger()


def ref_of(version: Version) -> PrefixRef:
    return PrefixRef(version.digest, version.num_virtual_tokens)


@dataclass(frozen=True)
class Target:
    """What a request runs on. All None: the bare model."""

    task: str | None = None
    version: Version | None = None
    prefix: PrefixRef | None = None


@dataclass(eq=False)
class AppState:
    """One server. `num_active` counts requests that a stop waits for."""

    settings: Settings
    engine: AsyncEngine
    store: PrefixStore
    metrics: Metrics
    is_draining: bool = False
    is_registry_seen: bool = False
    num_active: int = 0
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    _request_ids: itertools.count[int] = field(default_factory=itertools.count)
    _pinned: dict[str, PrefixRef] = field(default_factory=dict)
    _pinning: asyncio.Lock = field(default_factory=asyncio.Lock)
    _evictions: set[asyncio.Task[None]] = field(default_factory=set)
    _labels: OrderedDict[str, str] = field(default_factory=OrderedDict)  # digest -> the task that last used it

    @property
    def model_name(self) -> str:
        return self.engine.shape.model_name

    @property
    def model_names(self) -> tuple[str, ...]:
        """The served name and its aliases."""
        return (self.engine.shape.model_name, *self.engine.shape.model_aliases)

    @property
    def is_ready(self) -> bool:
        return not self.is_draining and self.is_registry_seen and self.engine.is_healthy

    async def resolve_task(self, name: str | None) -> Target:
        """The version that `T` or `T@V` means now. Raises the store's NotFoundError or IncompatibleError."""
        if name is None:
            return Target()
        version = await asyncio.to_thread(self.store.resolve, TENANT, name)
        self._labels[version.digest] = version.task
        self._labels.move_to_end(version.digest)
        if len(self._labels) > MAX_LABELS:
            self._labels.popitem(last=False)
        return Target(version.task, version, ref_of(version))

    def check_room(self) -> None:
        """Refuse before a prompt is tokenised here. The engine decides again, by its own count."""
        num_waiting = self.engine.stats().num_waiting
        if num_waiting >= self.settings.max_queued:
            self.metrics.rejected("queue_full")
            raise OverloadedError(f"the queue holds {num_waiting} requests, its limit is {self.settings.max_queued}")

    async def start(self) -> None:
        """Start the engine, see the registry once and make pinned prefixes resident."""
        await self.engine.start()
        await asyncio.to_thread(self.store.sweep)
        await self.sync_pins()
        self.metrics.watch(self.engine.stats, self.resident_bytes_by_task)
        self.is_registry_seen = True
        log.info("ready", model=self.model_name, host=self.settings.host, port=self.settings.port)

    async def sync_pins(self) -> None:
        """Hold exactly the active versions of pinned tasks."""
        async with self._pinning:
            versions = await asyncio.to_thread(self.store.pinned_versions)
            wanted = {version.digest: ref_of(version) for version in versions}
            for digest in set(self._pinned) - set(wanted):
                await self.engine.unpin(self._pinned.pop(digest))
            for digest in set(wanted) - set(self._pinned):
                try:
                    await self.engine.pin(wanted[digest])
                except EngineError as error:  # it stays pinned in the registry and is tried again at the next change
                    log.warning("pin_failed", digest=digest[:12], reason=str(error))
                else:
                    self._pinned[digest] = wanted[digest]

    async def free(self, versions: Iterable[Version]) -> None:
        """Give back the device memory of deleted versions, of those in use when their last row has finished."""
        for digest in {version.digest for version in versions}:
            if not await asyncio.to_thread(self.store.has_file, digest):
                self._labels.pop(digest, None)
                task = asyncio.create_task(self._evict_when_unused(digest))
                self._evictions.add(task)
                task.add_done_callback(self._evictions.discard)

    async def _evict_when_unused(self, digest: str) -> None:
        while self.engine.residency(digest) != "cold" and not await self.engine.evict(digest):
            await asyncio.sleep(0.1)

    def row_id(self, request_id: str) -> str:
        """An id of a row of its own, whatever id the client chose for its request."""
        return f"{request_id}.{next(self._request_ids)}"

    def resident_bytes_by_task(self) -> dict[str, int]:
        """Bytes on the device of the tasks' prefixes that are resident."""
        found: dict[str, int] = {}
        for digest, task in tuple(self._labels.items()):
            num_bytes = self.engine.resident_bytes(digest)
            if num_bytes:
                found[task] = found.get(task, 0) + num_bytes
        return found


async def state_of(request: Request) -> AppState:
    state = request.app.state.prefixserve
    assert isinstance(state, AppState)
    return state


State = Annotated[AppState, Depends(state_of)]
