"""The embedded registry's tenants, audit and usage."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from prefix_store.accounts import Accounts
from prefix_store.audit import SERVER, AuditEntry, Author, no_entries
from prefix_store.buckets import Taken, TokenBuckets
from prefix_store.documents import read_audit, read_tenant, write_audit, write_tenant
from prefix_store.sqlite_file import SqliteFile
from prefix_store.tenants import Tenant, changed_from
from prefix_store.usage import BATCH_REMEMBERED_S, COUNTS, Usage

USAGE = f"day, tenant, task, version, {', '.join(COUNTS)}"
ADD_USAGE = (
    f"INSERT INTO usage ({USAGE}) VALUES ({', '.join('?' * (4 + len(COUNTS)))}) "
    f"ON CONFLICT (day, tenant, task, version) DO UPDATE SET {', '.join(f'{n} = {n} + excluded.{n}' for n in COUNTS)}"
)


class SqliteAccounts:
    """Implements these methods of `Registry`. Buckets are the process's own: one server has the file."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._buckets = TokenBuckets()

    def get_tenant(self, name: str) -> Tenant | None:
        with self._file.snapshot() as db:
            return _tenant(db, name)

    def list_tenants(self) -> list[Tenant]:
        with self._file.snapshot() as db:
            return _tenants(db)

    def update_tenant(
        self,
        name: str,
        change: Callable[[Tenant | None], Tenant | None],
        record: Callable[[Tenant | None], Iterable[AuditEntry]] = no_entries,
        *,
        by: Author = SERVER,
        leaves_a_key: bool = False,
    ) -> Tenant | None:
        with self._file.transaction() as db:
            accounts = accounts_in(db)
            accounts.check_author(by)
            before = accounts.get(name)
            after = change(before)
            if leaves_a_key:
                accounts.check_key_left(name, after)
            for entry in record(after):
                put_audit(db, entry)
            if after == before:
                return before
            after = changed_from(before, after)
            put_tenant(db, name, after)
            return after

    def tenants_revision(self) -> int:
        with self._file.snapshot() as db:
            return _revision(db)

    def append_audit(self, entry: AuditEntry) -> AuditEntry:
        with self._file.transaction() as db:
            return put_audit(db, entry)

    def list_audit(self, tenant: str | None, limit: int, before: int | None) -> list[AuditEntry]:
        number, whose = ("number", "") if tenant is None else ("tenant_number", " AND tenant = ?")
        given = (before, limit) if tenant is None else (before, tenant, limit)
        with self._file.snapshot() as db:
            rows = db.execute(
                f"SELECT {number}, document FROM audit WHERE {number} < coalesce(?, 9223372036854775807){whose} "
                f"ORDER BY {number} DESC LIMIT ?",
                given,
            ).fetchall()
        return [read_audit(number, document) for number, document in rows]

    def add_usage(self, rows: Iterable[Usage], batch: str) -> None:
        values = [(*row.key, *(getattr(row, name) for name in COUNTS)) for row in rows]
        now = time.time()
        with self._file.transaction() as db:
            db.execute("DELETE FROM usage_batches WHERE at_s < ?", (now - BATCH_REMEMBERED_S,))
            if db.execute("INSERT OR IGNORE INTO usage_batches VALUES (?, ?)", (batch, now)).rowcount:
                db.executemany(ADD_USAGE, values)

    def usage(self, tenant: str | None, first_day: str, last_day: str) -> list[Usage]:
        with self._file.snapshot() as db:
            rows = db.execute(
                f"SELECT {USAGE} FROM usage WHERE day BETWEEN ? AND ? AND tenant = coalesce(?, tenant) "
                "ORDER BY day, tenant, task, version",
                (first_day, last_day, tenant),
            ).fetchall()
        return [Usage(*row) for row in rows]

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
        return self._buckets.take(tenant, bucket, amount, capacity, per_s, now, may_owe=may_owe)


def put_audit(db: sqlite3.Connection, entry: AuditEntry) -> AuditEntry:
    """The entry with its number in its tenant's audit."""
    (last,) = db.execute(
        "SELECT coalesce(max(tenant_number), 0) FROM audit WHERE tenant = ?", (entry.tenant,)
    ).fetchone()
    row = (entry.tenant, last + 1, write_audit(entry))
    db.execute("INSERT INTO audit (tenant, tenant_number, document) VALUES (?, ?, ?)", row)
    return replace(entry, number=last + 1)


def put_tenant(db: sqlite3.Connection, name: str, tenant: Tenant | None) -> None:
    """The tenant as it is from now on; None: it is gone."""
    db.execute("UPDATE tenants_revision SET revision = revision + 1")
    if tenant is None:
        db.execute("DELETE FROM tenants WHERE name = ?", (name,))
    else:
        db.execute("INSERT OR REPLACE INTO tenants VALUES (?, ?)", (name, write_tenant(tenant)))


def accounts_in(db: sqlite3.Connection) -> Accounts:
    return Accounts(partial(_tenant, db), partial(_tenants, db))


def _tenants(db: sqlite3.Connection) -> list[Tenant]:
    rows = db.execute("SELECT document FROM tenants ORDER BY name").fetchall()
    return [read_tenant(document) for (document,) in rows]


def _tenant(db: sqlite3.Connection, name: str) -> Tenant | None:
    row = db.execute("SELECT document FROM tenants WHERE name = ?", (name,)).fetchone()
    return None if row is None else read_tenant(row[0])


def _revision(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT revision FROM tenants_revision").fetchone()[0])
