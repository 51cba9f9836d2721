"""What goes on beside requests: keys, limits and pins are read again, usage is kept, the hottest prefixes are
remembered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import structlog

from prefix_store.errors import PrefixStoreError, UnavailableError, in_full
from prefix_store.task import Version
from prefix_store.usage import Usage
from server.api.metering import today
from server.api.state import AppState, refs_of
from server.api.warm_start import Label, WarmStart
from server.engine.errors import EngineError
from server.engine.tenant_policy import TenantPolicy

POLL_S = 0.25  # keys and limits take effect within a second
PINS_S = 1.0
FLUSH_S = 5.0
SAVE_S = 30.0
RESIDENTS_FILE = "residents.json"
log = structlog.get_logger()


@dataclass(frozen=True)
class Seen:
    """Revisions that pins follow: of each tenant's tasks, and of all tenants."""

    tasks: dict[str, int]
    tenants: int


class Upkeep:
    """Runs from the server's start to its end."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._warm_start = WarmStart(state.settings.data_dir / RESIDENTS_FILE)
        self._policies: dict[str, TenantPolicy] = {}
        self._applied: int | None = None  # the key ring's revision
        self._followed: Seen | None = None
        self._sampled_s = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._apply_policies()
        repeated = (
            (self._refresh_keys, POLL_S),
            (self._follow_pins, PINS_S),
            (self._flush, FLUSH_S),
            (self._save, SAVE_S),
        )
        works = [self._warm_up(), *(_repeat(work, every_s) for work, every_s in repeated)]
        self._tasks = [asyncio.create_task(work) for work in works]

    async def stop(self) -> None:
        """Keep what was used until now and what was resident."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._flush()
        await self._save()

    async def _refresh_keys(self) -> None:
        try:
            await asyncio.to_thread(self._state.keys.refresh)
        except UnavailableError:  # the keys stay as they were last seen
            return
        self._apply_policies()

    async def _follow_pins(self) -> None:
        """Of tasks that others changed, on the registry itself or through another replica, and as limits are now."""
        revisions = await asyncio.to_thread(self._state.registry.revisions)
        seen = Seen(revisions, self._state.keys.revision)
        if seen != self._followed:
            before = self._followed.tasks if self._followed is not None else {}
            for tenant, _ in revisions.items() - before.items():  # another replica may have put a file right
                self._state.engine.forget_failures(tenant)
            await self._state.sync_pins()
            self._followed = seen

    def _apply_policies(self) -> None:
        """As the tenants' limits say, where these were read anew, here or by a request that changed them."""
        if self._state.keys.revision == self._applied:
            return
        self._applied = self._state.keys.revision
        wanted = {
            tenant.name: TenantPolicy(
                weight=tenant.limits.weight,
                max_rows=tenant.limits.max_rows,
                max_queued=tenant.limits.max_queued,
                max_resident_bytes=tenant.limits.max_resident_bytes,
            )
            for tenant in self._state.keys.tenants.values()
        }
        for name in set(self._policies) - set(wanted):
            self._state.engine.set_policy(name, None)
        for name, policy in wanted.items():
            if self._policies.get(name) != policy:
                self._state.engine.set_policy(name, policy)
        self._policies = wanted

    async def _flush(self) -> None:
        self._sample_residency()
        try:
            await self._state.meter.flush()
        except PrefixStoreError as error:  # usage of this while is kept; the next time is soon
            log.warning("usage_not_kept", reason=in_full(error))
        except Exception:
            log.exception("usage_failed")

    def _sample_residency(self) -> None:
        """Bytes times seconds since the last sample, for whom they are resident."""
        now = time.monotonic()
        seconds, self._sampled_s = now - self._sampled_s, now
        day = today()
        for key, num_bytes in self._state.engine.resident_sizes().items():
            label = self._state.labels.get(key)
            if label is not None:
                usage = Usage(day, label.tenant, label.task, label.version, resident_byte_s=num_bytes * seconds)
                self._state.meter.add([usage])

    async def _save(self) -> None:
        labels = [self._state.labels.get(key) for key in reversed(self._state.engine.resident_sizes())]
        try:
            await asyncio.to_thread(self._warm_start.save, [label for label in labels if label is not None])
        except OSError as error:
            log.warning("residents_not_saved", reason=str(error))

    async def _warm_up(self) -> None:
        """Load the hottest of what was resident, as many as there is room for that nobody has asked for; the hottest
        last, so that it is the last to be evicted."""
        stats = self._state.engine.stats()
        room = stats.prefix_bytes_total - stats.prefix_bytes_used
        found: list[Version] = []
        for label in await asyncio.to_thread(self._warm_start.saved):
            version = await self._known(label)
            if version is None:
                continue
            room -= self._state.device_bytes([version], resident=False)
            if room < 0:
                break
            found.append(version)
        for version in reversed(found):
            self._state.label([version])
            try:
                await self._state.engine.preload(refs_of(version))
            except EngineError as error:
                log.info("not_warmed", task=version.task, version=version.version, reason=str(error)[:200])

    async def _known(self, label: Label) -> Version | None:
        """None: deleted meanwhile, or stored for another model."""
        store = self._state.store
        try:
            version = await asyncio.to_thread(store.get_version, label.tenant, label.task, str(label.version))
        except PrefixStoreError:
            return None
        return version if store.is_compatible(version) else None


async def _repeat(work: Callable[[], Coroutine[None, None, None]], every_s: float) -> None:
    """Each for itself: a load that hangs keeps pins waiting, not keys."""
    while True:
        await asyncio.sleep(every_s)
        try:
            await work()
        except PrefixStoreError as error:
            log.warning("upkeep_waits", work=work.__name__, reason=in_full(error))
        except Exception:  # whatever it is, the next round goes on
            log.exception("upkeep_failed", work=work.__name__)
