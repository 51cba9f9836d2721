"""What every route needs, passed in finished: settings, engine, store, keys, metrics; and the look-up of a task."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ParamSpec, TypeVar

import structlog
from fastapi import Depends, Request

from prefix_store.ensemble import Ensemble, Rule
from prefix_store.errors import UnavailableError
from prefix_store.prefix import Layout
from prefix_store.registry import Registry
from prefix_store.store import PrefixStore
from prefix_store.task import Task, Version
from server.api.auth import Caller, KeyRing
from server.api.connections import Connections
from server.api.errors import RequestError
from server.api.faults import FaultWatch
from server.api.limits import RateLimits
from server.api.metering import Meter
from server.api.schemas import MAX_PARTS
from server.api.warm_start import Label
from server.config import Settings
from server.engine.async_engine import NUM_WORKERS, AsyncEngine
from server.engine.errors import EngineError
from server.engine.generation_defaults import GenerationDefaults
from server.engine.sequence import Composition, PrefixRef
from server.metrics import Metrics

MAX_SESSION = 128  # characters of X-Session-Id
MAX_LABELS = 4096
MAX_REMOTE = NUM_WORKERS // 2  # threads that a hanging registry or hanging files may hold
P = ParamSpec("P")
T = TypeVar("T")
DRAIN_RETRY_S = 5
log = structlog.get_logger()


def refs_of(version: Version) -> tuple[PrefixRef, ...]:
    """The prefix of a version, or those of an ensemble's members."""
    tenant = version.tenant
    if isinstance(version.content, Ensemble):
        return tuple(PrefixRef(member.digest, member.content, tenant) for member in version.content.members)
    return (PrefixRef(version.digest, version.content, tenant),)


def _labels(version: Version) -> dict[str, Label]:
    """By key, of each of `refs_of`."""
    tenant = version.tenant
    if isinstance(version.content, Ensemble):
        members = version.content.members
        labels = [Label(tenant, member.task, member.version) for member in members]
    else:
        labels = [Label(tenant, version.task, version.version)]
    return {ref.key: label for ref, label in zip(refs_of(version), labels, strict=True)}


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
    registry: Registry
    keys: KeyRing
    limits: RateLimits
    meter: Meter
    metrics: Metrics
    defaults: GenerationDefaults
    connections: Connections = field(init=False)
    faults: FaultWatch = field(default_factory=FaultWatch)
    is_draining: bool = False
    is_registry_seen: bool = False
    num_active: int = 0
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    _remote: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_REMOTE))
    _request_ids: itertools.count[int] = field(default_factory=itertools.count)
    _pinned: dict[str, PrefixRef] = field(default_factory=dict)
    _pinning: asyncio.Lock = field(default_factory=asyncio.Lock)
    _evictions: set[asyncio.Task[None]] = field(default_factory=set)
    labels: OrderedDict[str, Label] = field(default_factory=OrderedDict)  # a prefix's key -> its version last in use

    def __post_init__(self) -> None:
        self.connections = Connections(self.settings, self.metrics)

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

    async def resolve_task(self, caller: Caller, name: str | None, session: str | None = None) -> Target:
        """What `T`, `T@V`, `owner/T` or `T,U` means now for the caller; `session` keeps to one version of several.
        Raises the store's NotFoundError, DisabledError or IncompatibleError, RequestError for parts that do not go
        together."""
        if name is None:
            caller.check_task(None)
            return Target()
        parts = name.split(",")
        if len(parts) > MAX_PARTS:
            raise RequestError(422, f"a composition has <= {MAX_PARTS} parts, got {len(parts)}", "task")
        if session is not None and len(session) > MAX_SESSION:
            raise RequestError(422, f"X-Session-Id must be <= {MAX_SESSION} characters, got {len(session)}")
        for part in parts:
            caller.check_task(part.partition("@")[0])
        tenant = caller.tenant.name
        resolve = partial(self.store.resolve, any_owner=caller.is_operator)
        versions = tuple([await asyncio.to_thread(resolve, tenant, part, session) for part in parts])
        task = ",".join(named(version, tenant) for version in versions)
        refs = [refs_of(version) for version in versions]
        if len(versions) == 1 and isinstance(versions[0].content, Ensemble):
            target = Target(task, versions, tuple((ref,) for ref in refs[0]), versions[0].content.rule)
        else:
            check_composition(versions)
            target = Target(task, versions, (tuple(ref for (ref,) in refs),))
        self.label(versions)
        return target

    def label(self, versions: Iterable[Version]) -> None:
        """Remember whose these are, for gauges and usage."""
        for version in versions:
            for key, label in _labels(version).items():
                self.labels[key] = label
                self.labels.move_to_end(key)
        while len(self.labels) > MAX_LABELS:
            self.labels.popitem(last=False)

    async def remotely(self, function: Callable[P, T], *args: P.args, **given: P.kwargs) -> T:
        """Call in a thread what waits for a shared registry or for files elsewhere, so few at once that look-ups, which
        do not, find a thread while these hang."""
        async with self._remote:
            return await asyncio.to_thread(function, *args, **given)

    async def quarantine(self, version: Version) -> None:
        """Take a version that fails out of service, where another can take its place."""
        changed = await self.remotely(self.store.quarantine, version.tenant, version.task, version.version)
        if changed is None:
            return
        log.warning("version_quarantined", tenant=version.tenant, task=version.task, version=version.version)
        self.metrics.quarantined()
        await self.sync_pins()

    async def start(self) -> None:
        """Start the engine, see the registry once and make pinned prefixes resident."""
        await self.engine.start()
        swept = await asyncio.to_thread(self.store.sweep)
        (log.warning if swept.reason else log.info)("files_swept", **vars(swept))
        await self.sync_pins()
        self.metrics.watch(self.engine.stats, self.resident_bytes_by_task)
        self.is_registry_seen = True
        counts = await asyncio.to_thread(self.store.count_tasks)
        if counts.num_incompatible:
            log.warning(
                "tasks_stored_for_another_model_answer_409",
                incompatible=counts.num_incompatible,
                tasks=counts.num_tasks,
                served=self.model_name,
                fingerprint=self.engine.shape.fingerprint[:12],
            )

    async def sync_pins(self) -> None:
        """Hold exactly the active versions of pinned tasks, of each tenant as many as it may."""
        async with self._pinning:
            versions = await asyncio.to_thread(self.store.pinned_versions)
            pinnable = self._pinnable(versions)
            wanted = {ref.key: ref for version in pinnable for ref in refs_of(version)}
            for key in set(self._pinned) - set(wanted):
                await self.engine.unpin(self._pinned.pop(key))
            for key in set(wanted) - set(self._pinned):
                try:
                    await self.engine.pin(wanted[key])
                except EngineError as error:  # it stays pinned in the registry and is tried again at the next change
                    log.warning("pin_failed", key=key[:80], reason=str(error))
                else:
                    self._pinned[key] = wanted[key]
            self.label(pinnable)

    def _pinnable(self, versions: Iterable[Version]) -> list[Version]:
        """A task pinned within its tenant's limit may have a larger version now, or the limit be a lower one."""
        found: dict[str, list[Version]] = {}
        for version in versions:
            own, limit = found.setdefault(version.tenant, []), self.keys.limits(version.tenant).max_pinned_bytes
            if limit is None or self.device_bytes([*own, version], resident=False) <= limit:
                own.append(version)
            else:
                log.warning("not_pinned_beyond_limit", tenant=version.tenant, task=version.task, limit=limit)
        return [version for own in found.values() for version in own]

    async def free(self, versions: Iterable[Version]) -> None:
        """Give back the device memory of deleted versions, of those in use when their last row has finished. An
        ensemble has none of its own: its members are versions too."""
        for version in versions:
            if isinstance(version.content, Ensemble):
                continue
            (ref,) = refs_of(version)
            found = self.labels.get(ref.key)
            if found is not None and found.task == version.task:
                del self.labels[ref.key]
            task = asyncio.create_task(self._evict_when_unused(ref))
            self._evictions.add(task)
            task.add_done_callback(self._evictions.discard)

    async def _evict_when_unused(self, ref: PrefixRef) -> None:
        """Its content may be published again meanwhile: then it stays."""
        while self.engine.residency(ref.key) != "cold":
            with suppress(UnavailableError):  # it is asked again
                if await self.remotely(self.store.has_file, ref.tenant_id, ref.digest):
                    return
                if await self.engine.evict(ref.key):
                    return
            await asyncio.sleep(0.1)

    def residency(self, version: Version) -> str:
        """`resident`, `loading` or `cold`; an ensemble is what the least of its members is."""
        found = {self.engine.residency(ref.key) for ref in refs_of(version)}
        return next(name for name in ("cold", "loading", "resident") if name in found)

    def device_bytes(self, versions: Iterable[Version], *, resident: bool) -> int:
        """Of prefixes, each once: what they take now, or would take."""
        refs = {ref.key: ref for version in versions for ref in refs_of(version)}
        if resident:
            return sum(self.engine.resident_bytes(key) for key in refs)
        return sum(self.engine.bytes_on_device(ref.layout) for ref in refs.values())

    def servable_bytes(self, versions: Iterable[Version]) -> int:
        """What those of the versions that this model can serve would take on the device."""
        return self.device_bytes(filter(self.store.is_compatible, versions), resident=False)

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

    def resident_bytes_by_task(self) -> dict[tuple[str, str], int]:
        """Bytes on the device of the tasks' prefixes that are resident, by tenant and task."""
        found: dict[tuple[str, str], int] = {}
        sizes = self.engine.resident_sizes()
        for key, label in tuple(self.labels.items()):
            if num_bytes := sizes.get(key):
                owner = (label.tenant, label.task)
                found[owner] = found.get(owner, 0) + num_bytes
        return found


def named(version: Version, tenant: str) -> str:
    """What `tenant` calls the task: `owner/T` where it is another's."""
    return version.task if version.tenant == tenant else f"{version.tenant}/{version.task}"


def name_for(tenant: str, task: Task) -> str:
    """What `tenant` calls the task."""
    return task.name if task.tenant == tenant else full_name(task)


def full_name(task: Task) -> str:
    return f"{task.tenant}/{task.name}"


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
