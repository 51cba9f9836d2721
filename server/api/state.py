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

from prefix_store.ensemble import Ensemble, Rule
from prefix_store.prefix import Layout
from prefix_store.registry import Version
from prefix_store.store import PrefixStore
from server.api.errors import RequestError
from server.api.schemas import MAX_PARTS
from server.config import Settings
from server.engine.async_engine import AsyncEngine
from server.engine.errors import EngineError, OverloadedError
from server.engine.sequence import Composition, PrefixRef
from server.metrics import Metrics

TENANT = "default"
MAX_LABELS = 4096
DRAIN_RETRY_S = 5
log = structlog.get_logger()


def refs_of(version: Version) -> tuple[PrefixRef, ...]:
    """The prefix of a version, or those of an ensemble's members."""
    if isinstance(version.content, Ensemble):
        return tuple(PrefixRef(member.digest, member.content) for member in version.content.members)
    return (PrefixRef(version.digest, version.content),)


def _owners(version: Version) -> dict[str, str]:
    """By digest, the task whose version each of `refs_of` is."""
    if isinstance(version.content, Ensemble):
        return {member.digest: member.task for member in version.content.members}
    return {version.digest: version.task}


@dataclass(frozen=True)
class Target:
    """What a request runs on: rows, each behind a composition. No versions: the bare model.

    With the rule `vote` the rows answer each for itself, else they choose every token together.
    """

    task: str | None = None
    versions: tuple[Version, ...] = ()
    members: tuple[Composition, ...] = ((),)
    rule: Rule | None = None

    @property
    def version(self) -> int | str | None:
        """The version's number; of a composition all, with commas."""
        if len(self.versions) == 1:
            return self.versions[0].version
        return ",".join(str(version.version) for version in self.versions) or None


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
    _labels: OrderedDict[str, str] = field(default_factory=OrderedDict)  # digest -> of its tasks the last in use

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
        """What `T`, `T@V` or `T,U` means now. Raises the store's NotFoundError or IncompatibleError, RequestError for
        parts that do not go together."""
        if name is None:
            return Target()
        num_parts = 1 + name.count(",")
        if num_parts > MAX_PARTS:
            raise RequestError(422, f"a composition has <= {MAX_PARTS} parts, got {num_parts}", "task")
        versions = tuple([await asyncio.to_thread(self.store.resolve, TENANT, part) for part in name.split(",")])
        task = ",".join(version.task for version in versions)
        refs = [refs_of(version) for version in versions]
        if len(versions) == 1 and isinstance(versions[0].content, Ensemble):
            target = Target(task, versions, tuple((ref,) for ref in refs[0]), versions[0].content.rule)
        else:
            check_composition(versions)
            target = Target(task, versions, (tuple(ref for (ref,) in refs),))
        for version in versions:
            for digest, owner in _owners(version).items():
                self._labels[digest] = owner
                self._labels.move_to_end(digest)
        while len(self._labels) > MAX_LABELS:
            self._labels.popitem(last=False)
        return target

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
            wanted = {ref.digest: ref for version in versions for ref in refs_of(version)}
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
        """Give back the device memory of deleted versions, of those in use when their last row has finished. An
        ensemble has none of its own: its members are versions too."""
        for version in versions:
            if self._labels.get(version.digest) == version.task:
                del self._labels[version.digest]
            task = asyncio.create_task(self._evict_when_unused(version.digest))
            self._evictions.add(task)
            task.add_done_callback(self._evictions.discard)

    async def _evict_when_unused(self, digest: str) -> None:
        """Its content may be published again meanwhile: then it stays."""
        while self.engine.residency(digest) != "cold" and not await asyncio.to_thread(self.store.has_file, digest):
            if await self.engine.evict(digest):
                return
            await asyncio.sleep(0.1)

    def residency(self, version: Version) -> str:
        """`resident`, `loading` or `cold`; an ensemble is what the least of its members is."""
        found = {self.engine.residency(ref.digest) for ref in refs_of(version)}
        return next(name for name in ("cold", "loading", "resident") if name in found)

    def device_bytes(self, versions: Iterable[Version], *, resident: bool) -> int:
        """Of prefixes, each once: what they take now, or would take."""
        refs = {ref.digest: ref for version in versions for ref in refs_of(version)}
        if resident:
            return sum(self.engine.resident_bytes(digest) for digest in refs)
        return sum(self.engine.bytes_on_device(ref.layout) for ref in refs.values())

    def check_ensemble(self, ensemble: Ensemble) -> None:
        """Raises PrefixFaultError for one whose members could never run together."""
        num_bytes = sum({m.digest: self.engine.bytes_on_device(m.content) for m in ensemble.members}.values())
        self.engine.check_together(len(ensemble.members), num_bytes)

    async def preload(self, version: Version) -> None:
        """Make it resident. Raises the engine's errors."""
        await self.engine.preload(refs_of(version))

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


def check_composition(versions: tuple[Version, ...]) -> None:
    """Raises RequestError. KV prefixes concatenate; a soft prompt was trained to stand first and alone."""
    if len(versions) == 1:
        return
    layouts = [version.content for version in versions if isinstance(version.content, Layout)]
    if len(layouts) < len(versions):
        ensemble = next(version.task for version in versions if isinstance(version.content, Ensemble))
        raise RequestError(422, f"an ensemble cannot be composed with others, got {ensemble!r}", "task")
    prefixes = [layout for layout in layouts if layout.placement == "prefix"]
    if len(layouts) - len(prefixes) > 1:
        raise RequestError(422, f"a composition has one infix at most, got {len(layouts) - len(prefixes)}", "task")
    if len(prefixes) > 1 and any(layout.kind == "soft" for layout in prefixes):
        soft = next(v.task for v in versions if v.kind == "soft" and v.content in prefixes)
        raise RequestError(422, f"only KV prefixes can be composed, {soft!r} is a soft prompt", "task")


async def state_of(request: Request) -> AppState:
    state = request.app.state.prefixserve
    assert isinstance(state, AppState)
    return state


State = Annotated[AppState, Depends(state_of)]
