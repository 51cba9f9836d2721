"""A replica's view of a shared registry: read here, written there, and read on while the shared one is away."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from prefix_store.audit import SERVER, AuditEntry, Author, no_entries
from prefix_store.buckets import Taken
from prefix_store.draft import Draft
from prefix_store.errors import DamagedRegistryError, StorageFullError, UnavailableError, in_full
from prefix_store.local_copy import LocalCopy, Position
from prefix_store.redis_events import FIRST, Event
from prefix_store.redis_registry import RedisRegistry
from prefix_store.registry import Identity, NewFile
from prefix_store.tenants import Tenant
from prefix_store.usage import Usage

T = TypeVar("T")
BLOCK_S = 1.0
BEAT_S = 5.0
RETRY_S = 0.5
RECONCILE_S = 30.0


class Mirror(LocalCopy):
    """Implements `Registry`. Reads answer from a copy on this replica's disk; what is written through this mirror is in
    the copy when the call returns, what others write a moment later. While the shared registry is away, or the copy
    cannot be written (`is_degraded`), reads go on with what was seen last, keys that were revoked since among it;
    writes raise UnavailableError, StorageFullError on a full disk, and a bucket has this replica's part of the limit.

    A thread follows the stream of events from the last one seen. Where this one is no longer in the stream, which keeps
    only so many, or was emptied or replaced by an older one, all is read anew. Every `reconcile_s`, and when the
    shared registry is back, all revisions are compared, and what differs is read anew.
    """

    def __init__(self, shared: RedisRegistry, path: Path, *, reconcile_s: float = RECONCILE_S) -> None:
        super().__init__(path)
        self.max_upload_s = shared.max_upload_s
        self._trouble: Exception | None = UnavailableError("not started")
        self._shared = shared
        self._events = shared.events
        self._reconcile_s = reconcile_s
        self._replica = uuid.uuid4().hex
        self._num_replicas = 1
        self._next_beat_s = self._next_reconcile_s = 0.0
        self._position = self.position() or Position("", FIRST)
        self._adopting = threading.RLock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)

    def start(self) -> None:
        """Catch up with the shared registry, or go on from what was seen last. Raises UnavailableError or
        StorageFullError where nothing ever was, DamagedRegistryError where the copy cannot be read."""
        try:
            self._reconcile()
            self._trouble = None
        except DamagedRegistryError:
            raise
        except (UnavailableError, StorageFullError) as error:
            if not self._position.identity:
                raise
            self._trouble = error
        self._thread.start()

    @property
    def is_degraded(self) -> bool:
        return self._trouble is not None

    def identity(self) -> Identity:
        """Of the shared registry; while that is away, of the data that was seen last."""
        return Identity(self._position.identity) if self.is_degraded else self._shared.identity()

    def add_predecessors(self, ids: Iterable[str]) -> None:
        self._shared.add_predecessors(ids)

    def change(
        self, tenant: str, decide: Callable[[Draft], T], file: NewFile | None = None, *, by: Author = SERVER
    ) -> T:
        self._check_followed()
        result = self._shared.change(tenant, decide, file, by=by)
        self._catch_up()
        return result

    def release_unused(self, tenant: str, digests: Iterable[str], drop: Callable[[str], None]) -> None:
        self._check_followed()
        self._shared.release_unused(tenant, digests, drop)

    def update_tenant(
        self,
        name: str,
        change: Callable[[Tenant | None], Tenant | None],
        record: Callable[[Tenant | None], Iterable[AuditEntry]] = no_entries,
        *,
        by: Author = SERVER,
        leaves_a_key: bool = False,
    ) -> Tenant | None:
        self._check_followed()
        result = self._shared.update_tenant(name, change, record, by=by, leaves_a_key=leaves_a_key)
        self._catch_up()
        return result

    def append_audit(self, entry: AuditEntry) -> AuditEntry:
        return self._shared.append_audit(entry)

    def list_audit(self, tenant: str | None, limit: int, before: int | None) -> list[AuditEntry]:
        return self._shared.list_audit(tenant, limit, before)

    def add_usage(self, rows: Iterable[Usage], batch: str) -> None:
        self._shared.add_usage(rows, batch)

    def usage(self, tenant: str | None, first_day: str, last_day: str) -> list[Usage]:
        return self._shared.usage(tenant, first_day, last_day)

    def take(
        self,
        tenant: str,
        bucket: str,
        amount: float,
        capacity: float,
        per_s: float,
        now: float,
        *,
        may_owe: bool = False,
    ) -> Taken:
        if not self.is_degraded:
            try:
                return self._shared.take(tenant, bucket, amount, capacity, per_s, now, may_owe=may_owe)
            except UnavailableError as error:
                self._trouble = error  # until the thread reaches it again, so that no other request waits for it
        part = self._num_replicas
        return self._buckets.take(tenant, bucket, amount, capacity / part, per_s / part, now, may_owe=may_owe)

    def close(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._shared.close()
        super().close()

    def _follow(self) -> None:
        while not self._stopping.is_set():
            try:
                if self.is_degraded or time.monotonic() >= self._next_reconcile_s:
                    self._reconcile()
                if time.monotonic() >= self._next_beat_s:
                    self._num_replicas = self._events.beat(self._replica)
                    self._next_beat_s = time.monotonic() + BEAT_S
                    with self._adopting:
                        self.move(self._position)  # so that a full disk is known before a change
                self._trouble = None
                self._advance(BLOCK_S)
            except Exception as error:  # whatever it is, what was seen last is served, and it is tried again
                self._trouble = error
                self._stopping.wait(RETRY_S)

    def _check_followed(self) -> None:
        """Nobody changes what they would not see changed."""
        trouble = self._trouble
        if isinstance(trouble, StorageFullError):
            raise StorageFullError(str(trouble), detail=trouble.detail)
        if trouble is not None:
            raise UnavailableError("the registry is not followed", detail=in_full(trouble))

    def _catch_up(self) -> None:
        """With what was written just now. Where that fails the thread sees to it."""
        with suppress(UnavailableError, StorageFullError), self._adopting:
            while self._advance(0):
                pass

    def _advance(self, block_s: float) -> bool:
        """Adopt the events after the last one seen; whether there were any. While this one is in the stream, none that
        came after it was trimmed, and the data is still the same. Before any was seen, revisions say so."""
        last = self._position.event
        found = self._events.read(last, block_s)
        if self._events.has(last):
            self._adopt(found)
        else:
            self._reconcile()
        return bool(found)

    def _adopt(self, events: Iterable[Event]) -> None:
        with self._adopting:
            for event in events:
                if _place(event.id) > _place(self._position.event):
                    if event.tenant is None:
                        self._adopt_tenants(event)
                    else:
                        self._adopt_tasks(event.tenant, event)
                    self._position = Position(self._position.identity, event.id)
            if self._position != self.position():
                self.move(self._position)

    def _adopt_tasks(self, tenant: str, event: Event) -> None:
        """Documents may be newer than the event: then their own comes later."""
        if event.revision > self.revision(tenant):
            self.adopt(tenant, event.revision, self._events.tasks(tenant, event.names))

    def _adopt_tenants(self, event: Event) -> None:
        if event.revision > self.tenants_revision():
            for name in event.names:
                self.adopt_tenant(name, self._events.tenant(name), event.revision)

    def _reload(self, tenant: str) -> None:
        found = self._events.all_tasks(tenant)
        self.adopt(tenant, found.revision, found.tasks, are_all=True)

    def _reload_tenants(self) -> None:
        found = self._events.all_tenants()
        self.adopt_tenants(found.tenants, found.revision)

    def _reconcile(self) -> None:
        """Compare all revisions. What was written meanwhile comes as an event and is read twice at worst."""
        with self._adopting:
            identity = self._events.identity()
            last = self._position.event
            is_other = identity != self._position.identity or not (last == FIRST or self._events.has(last))
            if is_other:
                position = Position(identity, self._events.last())
            else:
                self._adopt(self._events.read(last, 0))
                position = self._position
            ours, theirs = self.revisions(), self._shared.revisions()
            for tenant in ours.keys() | theirs.keys():
                if is_other or ours.get(tenant, 0) != theirs.get(tenant, 0):
                    self._reload(tenant)
            if is_other or self.tenants_revision() != self._shared.tenants_revision():
                self._reload_tenants()
            self._position = position
            self.move(position)
            self._next_reconcile_s = time.monotonic() + self._reconcile_s


def _place(event: str) -> tuple[int, ...]:
    """Ids as `1700000000000-0` in their order."""
    return tuple(map(int, event.split("-")))
