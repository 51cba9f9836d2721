"""What goes on beside requests: keys, limits and pins are read again, usage is kept, the hottest prefixes are
remembered."""

from __future__ import annotations

import asyncio
import time

import structlog

from prefix_store.errors import PrefixStoreError, UnavailableError
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


class Upkeep:
    """Runs from the server's start to its end."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._warm_start = WarmStart(state.settings.data_dir / RESIDENTS_FILE)
        self._policies: dict[str, TenantPolicy] = {}
        self._applied: int | None = None  # the key ring's revision
        self._revisions: dict[str, int] = {}
        self._sampled_s = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._apply_policies()
        self._tasks = [asyncio.create_task(work) for work in (self._warm_up(), self._run())]

    async def stop(self) -> None:
        """Keep what was used until now and what was resident."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._flush()
        await self._save()

    async def _run(self) -> None:
        pinned_s = flushed_s = saved_s = time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            await self._refresh_keys()
            now = time.monotonic()
            if now - pinned_s >= PINS_S:
                pinned_s = now
                await self._follow_pins()
            if now - flushed_s >= FLUSH_S:
                flushed_s = now
                await self._flush()
            if now - saved_s >= SAVE_S:
                saved_s = now
                await self._save()

    async def _refresh_keys(self) -> None:
        try:
            await asyncio.to_thread(self._state.keys.refresh)
        except UnavailableError:  # the keys stay as they were last seen
            return
        except Exception:  # whatever it is, usage and the next poll go on
            log.exception("keys_not_refreshed")
            return
        self._apply_policies()

    async def _follow_pins(self) -> None:
        """Of tasks that others changed, on the registry itself or through another replica."""
        try:
            revisions = await asyncio.to_thread(self._state.registry.revisions)
            if revisions != self._revisions:
                await self._state.sync_pins()
                self._revisions = revisions
        except Exception:  # whatever it is, usage and the next poll go on
            log.exception("pins_not_followed")

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
        except Exception:  # usage of this while is kept; the next time is soon
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
