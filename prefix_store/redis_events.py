"""What changed in a shared registry, and its documents as they are: what a replica follows."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from prefix_store import redis_keys as keys
from prefix_store.documents import read_task, read_tenant
from prefix_store.redis_scripts import BEAT
from prefix_store.redis_server import RedisServer
from prefix_store.task import Task
from prefix_store.tenants import Tenant

MAX_READ = 1000
REPLICA_S = 15.0
FIRST = "0-0"


@dataclass(frozen=True)
class Event:
    """`tenant`'s tasks `names` changed when it got this revision; without a tenant, the tenants of these names did."""

    id: str
    tenant: str | None
    revision: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class TenantTasks:
    """All of one tenant, at one moment."""

    revision: int
    tasks: dict[str, Task]


@dataclass(frozen=True)
class Tenants:
    """All, at one moment."""

    revision: int
    tenants: dict[str, Tenant]


class RedisEvents:
    """All methods raise UnavailableError."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._beat = server.script(BEAT)

    def identity(self) -> str:
        """Of the data: another one where the server was emptied or is another."""
        with self._server.answering() as client:
            client.set(keys.IDENTITY, uuid.uuid4().hex, nx=True)
            found: str = client.get(keys.IDENTITY)
        return found

    def read(self, after: str, block_s: float) -> list[Event]:
        """The events after that one's id, oldest first; waits so long for the first, 0: not at all. Older ones may be
        gone."""
        block_ms = int(block_s * 1000) or None
        with self._server.answering() as client:
            found = client.xread({keys.EVENTS: after}, count=MAX_READ, block=block_ms)
        return [_event(number, fields) for _, entries in found for number, fields in entries]

    def has(self, event: str) -> bool:
        """Whether the stream still has it; never `FIRST`, which is before all."""
        with self._server.answering() as client:
            return bool(client.xrange(keys.EVENTS, event, event))

    def last(self) -> str:
        """The last event's id."""
        with self._server.answering() as client:
            found = client.xrevrange(keys.EVENTS, count=1)
        return str(found[0][0]) if found else FIRST

    def tasks(self, tenant: str, names: Iterable[str]) -> dict[str, Task | None]:
        """As they are now."""
        wanted = tuple(names)
        with self._server.answering() as client:
            documents = client.hmget(keys.tasks(tenant), wanted) if wanted else []
        return {name: found and read_task(found) for name, found in zip(wanted, documents, strict=True)}

    def all_tasks(self, tenant: str) -> TenantTasks:
        with self._server.answering() as client, client.pipeline(transaction=True) as pipeline:
            pipeline.hget(keys.REVISIONS, tenant)
            pipeline.hgetall(keys.tasks(tenant))
            revision, documents = pipeline.execute()
        return TenantTasks(int(revision or 0), {name: read_task(found) for name, found in documents.items()})

    def tenant(self, name: str) -> Tenant | None:
        with self._server.answering() as client:
            document = client.hget(keys.TENANTS, name)
        return None if document is None else read_tenant(document)

    def all_tenants(self) -> Tenants:
        with self._server.answering() as client, client.pipeline(transaction=True) as pipeline:
            pipeline.get(keys.TENANTS_REVISION)
            pipeline.hgetall(keys.TENANTS)
            revision, documents = pipeline.execute()
        return Tenants(int(revision or 0), {name: read_tenant(found) for name, found in documents.items()})

    def beat(self, replica: str) -> int:
        """Say that this replica is there; how many are."""
        with self._server.answering() as client:
            return int(self._beat(keys=[keys.REPLICAS], args=[replica, int(REPLICA_S * 1000)], client=client))


def _event(number: str, fields: dict[str, str]) -> Event:
    if "tenants" in fields:
        return Event(number, None, int(fields["revision"]), (fields["tenants"],))
    return Event(number, fields["tenant"], int(fields["revision"]), tuple(json.loads(fields["names"])))
