"""The shared registry's tenants, audit, usage and buckets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace

from prefix_store import redis_keys as keys
from prefix_store.accounts import Accounts
from prefix_store.audit import SERVER, AuditEntry, Author, no_entries
from prefix_store.buckets import Taken
from prefix_store.documents import read_audit, read_tenant, write_audit, write_tenant
from prefix_store.errors import UnavailableError
from prefix_store.redis_scripts import ADD_USAGE, APPEND_AUDIT, TAKE, UPDATE_TENANT
from prefix_store.redis_server import RedisServer
from prefix_store.tenants import Tenant, changed_from
from prefix_store.usage import BATCH_REMEMBERED_S, COUNTS, FLOAT_COUNT, Usage

MAX_EVENTS = 10_000
MAX_TRIES = 50


class RedisAccounts:
    """Implements these methods of `Registry`. `bucket_server` is the same server, with patience for what a request
    waits for."""

    def __init__(self, server: RedisServer, bucket_server: RedisServer) -> None:
        self._server = server
        self._bucket_server = bucket_server
        self._update_tenant = server.script(UPDATE_TENANT)
        self._append_audit = server.script(APPEND_AUDIT)
        self._add_usage = server.script(ADD_USAGE)
        self._take = bucket_server.script(TAKE)

    def get_tenant(self, name: str) -> Tenant | None:
        with self._server.answering() as client:
            document = client.hget(keys.TENANTS, name)
        return None if document is None else read_tenant(document)

    def list_tenants(self) -> list[Tenant]:
        with self._server.answering() as client:
            documents = client.hgetall(keys.TENANTS)
        return [read_tenant(documents[name]) for name in sorted(documents)]

    def update_tenant(
        self,
        name: str,
        change: Callable[[Tenant | None], Tenant | None],
        record: Callable[[Tenant | None], Iterable[AuditEntry]] = no_entries,
        *,
        by: Author = SERVER,
        leaves_a_key: bool = False,
    ) -> Tenant | None:
        accounts = Accounts(self.get_tenant, self.list_tenants)
        for _ in range(MAX_TRIES):
            revision = self.tenants_revision()  # what is read later than it was read is found out by the script
            accounts.check_author(by)
            before = accounts.get(name)
            after = change(before)
            if leaves_a_key:
                accounts.check_key_left(name, after)
            entries = tuple(record(after))
            if after == before and not entries:
                return before
            after = before if after == before else changed_from(before, after)
            document = "" if after is None else write_tenant(after)
            with self._server.answering() as client:
                is_done = self._update_tenant(
                    keys=[keys.TENANTS, keys.TENANTS_REVISION, keys.EVENTS, *keys.appended(name)],
                    args=[name, revision, document, keys.HINTS, MAX_EVENTS, json.dumps([*map(write_audit, entries)])],
                    client=client,
                )
            if is_done:
                return after
        raise UnavailableError(f"tenants were changed {MAX_TRIES} times while {name!r} was to be changed")

    def tenants_revision(self) -> int:
        with self._server.answering() as client:
            return int(client.get(keys.TENANTS_REVISION) or 0)

    def append_audit(self, entry: AuditEntry) -> AuditEntry:
        with self._server.answering() as client:
            number = self._append_audit(keys=keys.appended(entry.tenant), args=[write_audit(entry)], client=client)
        return replace(entry, number=int(number))

    def list_audit(self, tenant: str | None, limit: int, before: int | None) -> list[AuditEntry]:
        last = "+inf" if before is None else f"({before}"
        with self._server.answering() as client:
            lines = client.zrevrangebyscore(keys.audit(tenant), last, "-inf", 0, limit)
        found = (line.split(" ", 1) for line in lines)
        return [read_audit(int(number), document) for number, document in found]

    def add_usage(self, rows: Iterable[Usage], batch: str) -> None:
        counts = [
            (" ".join(map(str, row.key)), {name: str(count) for name in COUNTS if (count := getattr(row, name))})
            for row in rows
        ]
        if counts:
            with self._server.answering() as client:
                self._add_usage(
                    keys=[keys.USAGE_ROWS, keys.usage_batch(batch), *(keys.usage(line) for line, _ in counts)],
                    args=[json.dumps(counts), FLOAT_COUNT, BATCH_REMEMBERED_S],
                    client=client,
                )

    def usage(self, tenant: str | None, first_day: str, last_day: str) -> list[Usage]:
        with self._server.answering() as client:
            lines = client.zrangebylex(keys.USAGE_ROWS, f"[{first_day} ", f"({last_day}!")
            if tenant is not None:
                lines = [line for line in lines if line.split(" ")[1] == tenant]
            with client.pipeline(transaction=False) as pipeline:
                for line in lines:
                    pipeline.hgetall(keys.usage(line))
                counts = pipeline.execute()
        return sorted(map(_usage, lines, counts), key=lambda row: row.key)

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
        """By Redis' clock: `now` is not used."""
        with self._bucket_server.answering() as client:
            taken, remaining, wait_s = self._take(
                keys=[keys.bucket(tenant, bucket)], args=[amount, capacity, per_s, int(may_owe)], client=client
            )
        return Taken(bool(taken), float(remaining), float(wait_s))


def _usage(line: str, counts: dict[str, str]) -> Usage:
    day, tenant, task, version = line.split(" ")
    numbers = {name: (float if name == FLOAT_COUNT else int)(count) for name, count in counts.items()}
    return Usage(day, tenant, task, int(version), **numbers)  # type: ignore[arg-type]  # the float is the one field
