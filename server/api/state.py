"""What every route needs, passed in finished: settings, engine, store, metrics; and the look-up of a task."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from prefix_store.registry import Version
from prefix_store.store import PrefixStore
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.engine.errors import OverloadedError
from server.engine.sequence import PrefixRef
from server.metrics import Metrics

TENANT = "default"
MAX_LABELS = 4096
DRAIN_RETRY_S = 5


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

    def row_id(self, request_id: str) -> str:
        """An id of a row of its own, whatever id the client chose for its request."""
        return f"{request_id}.{next(self._request_ids)}"

    def forget(self, digest: str) -> None:
        self._labels.pop(digest, None)

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
