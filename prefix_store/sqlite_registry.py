"""The embedded registry: documents in one SQLite file, each change a transaction."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from prefix_store.audit import SERVER, Author
from prefix_store.documents import read_task
from prefix_store.draft import Draft, Stored, Write
from prefix_store.entries import FILES, MODELS, PINNED, file_entry, model_entry, shared_entry
from prefix_store.registry import Identity, NewFile, Registry, TaskCounts
from prefix_store.sqlite_accounts import SqliteAccounts, accounts_in, put_audit, put_tenant
from prefix_store.sqlite_file import REMEDY, SqliteFile, put_task
from prefix_store.task import EVERYONE, Task

T = TypeVar("T")
# The registry's own id is number 0, those of its predecessors come after it. Files of this schema may lack the table.
IDENTITIES = "CREATE TABLE IF NOT EXISTS identities (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE)"
COUNTS = "SELECT revision, num_versions, num_bytes FROM tenant_counts WHERE tenant = ?"


class SqliteRegistry(SqliteAccounts, Registry):
    """Implements `Registry` for one server. A change and a release never run at once, in whatever process, so a change
    that puts its file again (most often it is there) refers to a file that is there."""

    max_upload_s = 0.0

    def __init__(self, path: Path, *, is_durable: bool = True, remedy: str = REMEDY) -> None:
        super().__init__(SqliteFile(path, is_durable=is_durable, remedy=remedy))

    def identity(self) -> Identity:
        with self._file.snapshot() as db:
            found = _identities(db)
        if not found:
            with self._file.transaction() as db:
                db.execute(IDENTITIES)
                if not _identities(db):
                    db.execute("INSERT INTO identities VALUES (0, ?)", (uuid.uuid4().hex,))
                found = _identities(db)
        return Identity(found[0], tuple(found[1:]))

    def add_predecessors(self, ids: Iterable[str]) -> None:
        known = self.identity()
        with self._file.transaction() as db:
            new = [(each,) for each in ids if each not in (known.id, *known.predecessors)]
            db.executemany("INSERT INTO identities (id) VALUES (?)", new)

    @staticmethod
    def is_there(path: Path) -> bool:
        """Whether there is a file: opening it says what is wrong with one that is no registry."""
        return path.exists()

    def change(
        self, tenant: str, decide: Callable[[Draft], T], file: NewFile | None = None, *, by: Author = SERVER
    ) -> T:
        if file is not None:
            file.put()  # most of the time that it takes, before others have to wait
        with self._file.transaction() as db:
            draft = _draft(db, tenant, by)
            draft.check_author()
            result = decide(draft)
            if file is not None:
                file.put()
            if draft.is_changed:
                _apply(db, draft.write())
            for entry in draft.audit:
                put_audit(db, entry)
            return result

    def adopt(self, tenant: str, revision: int, tasks: Mapping[str, Task | None], *, are_all: bool = False) -> None:
        with self._file.transaction() as db:
            draft = _draft(db, tenant)
            for name in _names(db, tenant) if are_all else ():
                draft.adopt(name, tasks.get(name))
            for name, task in tasks.items():
                draft.adopt(name, task)
            _apply(db, replace(draft.write(), revision=revision))

    def revisions(self) -> dict[str, int]:
        with self._file.snapshot() as db:
            return dict(db.execute("SELECT tenant, revision FROM tenant_counts").fetchall())

    def revision(self, tenant: str) -> int:
        with self._file.snapshot() as db:
            return _counts(db, tenant)[0]

    def get_task(self, tenant: str, task: str) -> Task | None:
        with self._file.snapshot() as db:
            return _task(db, tenant, task)

    def list_tasks(self, tenant: str, limit: int, after: str) -> list[Task]:
        with self._file.snapshot() as db:
            rows = db.execute(
                "SELECT document FROM task_documents WHERE tenant = ? AND name > ? ORDER BY name LIMIT ?",
                (tenant, after, limit),
            ).fetchall()
        return [read_task(document) for (document,) in rows]

    def count_tasks(self, fingerprint: str, tenant: str | None = None) -> TaskCounts:
        of_tenant, given = ("", ()) if tenant is None else (" AND tenant = ?", (tenant,))
        with self._file.snapshot() as db:
            (num_tasks,) = db.execute(f"SELECT count(*) FROM task_documents WHERE true{of_tenant}", given).fetchone()
            (num_incompatible,) = db.execute(
                f"SELECT count(*) FROM entries WHERE entry > ? AND entry < ? AND entry != ?{of_tenant}",
                (f"{MODELS} ", f"{MODELS}!", model_entry(fingerprint), *given),
            ).fetchone()
        return TaskCounts(num_tasks, num_incompatible)

    def is_shared(self, owner: str, task: str, tenant: str) -> bool:
        with self._file.snapshot() as db:
            found = db.execute(
                "SELECT count(*) FROM entries WHERE entry IN (?, ?) AND tenant = ? AND task = ?",
                (shared_entry(tenant), shared_entry(EVERYONE), owner, task),
            ).fetchone()
        return bool(found[0])

    def list_shared(self, tenant: str, limit: int, after: str) -> list[Task]:
        with self._file.snapshot() as db:
            rows = db.execute(
                "SELECT document FROM (SELECT DISTINCT tenant, task FROM entries WHERE entry IN (?, ?) "
                "AND tenant != ? AND (tenant || '/' || task) > ?) AS shared JOIN task_documents AS found "
                "ON found.tenant = shared.tenant AND found.name = shared.task "
                "ORDER BY shared.tenant || '/' || shared.task LIMIT ?",
                (shared_entry(tenant), shared_entry(EVERYONE), tenant, after, limit),
            ).fetchall()
        return [read_task(document) for (document,) in rows]

    def pinned_tasks(self) -> list[Task]:
        with self._file.snapshot() as db:
            rows = db.execute(
                "SELECT document FROM entries JOIN task_documents AS found ON found.tenant = entries.tenant "
                "AND found.name = entries.task WHERE entry = ? ORDER BY entries.tenant, entries.task",
                (PINNED,),
            ).fetchall()
        return [read_task(document) for (document,) in rows]

    def stored(self, tenant: str) -> Stored:
        with self._file.snapshot() as db:
            return _counts(db, tenant)[1]

    def digests(self) -> dict[str, set[str]]:
        with self._file.snapshot() as db:
            rows = db.execute(
                "SELECT DISTINCT entry FROM entries WHERE entry >= ? AND entry < ?", (f"{FILES} ", f"{FILES}!")
            ).fetchall()
        found: dict[str, set[str]] = {}
        for (entry,) in rows:
            _, tenant, digest = entry.split(" ")
            found.setdefault(tenant, set()).add(digest)
        return found

    def release_unused(self, tenant: str, digests: Iterable[str], drop: Callable[[str], None]) -> None:
        with self._file.transaction() as db:
            for digest in digests:
                if not _holders(db, tenant, file_entry(tenant, digest)):
                    drop(digest)

    def close(self) -> None:
        self._file.close()


def _draft(db: sqlite3.Connection, tenant: str, by: Author = SERVER) -> Draft:
    revision, stored = _counts(db, tenant)
    read, holders = partial(_task, db, tenant), partial(_holders, db, tenant)
    return Draft(tenant, revision, stored, read, holders, partial(_names, db, tenant), accounts_in(db), by)


def _identities(db: sqlite3.Connection) -> list[str]:
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'identities'").fetchone() is None:
        return []
    return [each for (each,) in db.execute("SELECT id FROM identities ORDER BY number").fetchall()]


def _counts(db: sqlite3.Connection, tenant: str) -> tuple[int, Stored]:
    """The tenant's revision: counted by tenant, so that a task made anew never repeats one and nobody sees another's
    pace."""
    revision, num_versions, num_bytes = db.execute(COUNTS, (tenant,)).fetchone() or (0, 0, 0)
    return revision, Stored(num_versions, num_bytes)


def _task(db: sqlite3.Connection, tenant: str, name: str) -> Task | None:
    row = db.execute("SELECT document FROM task_documents WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
    return None if row is None else read_task(row[0])


def _holders(db: sqlite3.Connection, tenant: str, entry: str) -> list[str]:
    rows = db.execute("SELECT task FROM entries WHERE entry = ? AND tenant = ?", (entry, tenant)).fetchall()
    return [name for (name,) in rows]


def _names(db: sqlite3.Connection, tenant: str) -> list[str]:
    rows = db.execute("SELECT name FROM task_documents WHERE tenant = ? ORDER BY name", (tenant,)).fetchall()
    return [name for (name,) in rows]


def _apply(db: sqlite3.Connection, write: Write) -> None:
    for name, task in write.tasks.items():
        if task is None:
            db.execute("DELETE FROM task_documents WHERE tenant = ? AND name = ?", (write.tenant, name))
        else:
            put_task(db, task)
    if write.removes_tenant:
        put_tenant(db, write.tenant, None)
    gone = [(entry, write.tenant, name) for entry, name in write.removed]
    db.executemany("DELETE FROM entries WHERE entry = ? AND tenant = ? AND task = ?", gone)
    come = [(entry, write.tenant, name) for entry, name in write.added]
    db.executemany("INSERT INTO entries VALUES (?, ?, ?)", come)
    db.execute(
        "INSERT INTO tenant_counts VALUES (?, ?, ?, ?) ON CONFLICT (tenant) DO UPDATE SET "
        "revision = excluded.revision, num_versions = num_versions + excluded.num_versions, "
        "num_bytes = num_bytes + excluded.num_bytes",
        (write.tenant, write.revision, write.grown.num_versions, write.grown.num_bytes),
    )
