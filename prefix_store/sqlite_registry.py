"""The embedded registry: one SQLite file, WAL, full synchronous."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefix_store.ensemble import KIND, Ensemble, Member
from prefix_store.errors import ConflictError, NotFoundError
from prefix_store.prefix import Layout
from prefix_store.registry import NewVersion, Precondition, Task, Version

SCHEMA = """
CREATE TABLE IF NOT EXISTS revisions (tenant TEXT PRIMARY KEY, revision INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS tasks (
    tenant TEXT NOT NULL, name TEXT NOT NULL, revision INTEGER NOT NULL, last_version INTEGER NOT NULL,
    active INTEGER, previous INTEGER, is_pinned INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS versions (
    tenant TEXT NOT NULL, task TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, kind TEXT NOT NULL,
    num_virtual_tokens INTEGER NOT NULL, num_bytes INTEGER NOT NULL, base TEXT NOT NULL, base_model TEXT NOT NULL,
    fingerprint TEXT NOT NULL, note TEXT NOT NULL, created_at_s REAL NOT NULL, content TEXT NOT NULL DEFAULT '{}',
    PRIMARY KEY (tenant, task, version),
    FOREIGN KEY (tenant, task) REFERENCES tasks (tenant, name) ON DELETE CASCADE) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS versions_by_digest ON versions (digest);
CREATE INDEX IF NOT EXISTS ensembles ON versions (tenant) WHERE kind = 'ensemble';
CREATE INDEX IF NOT EXISTS pinned_tasks ON tasks (tenant, name) WHERE is_pinned = 1;
"""
SCHEMA_VERSION = 2
# A file of schema 1 had decoder-only prefixes only: their kind and length say all that `content` does.
MIGRATION = "ALTER TABLE versions ADD COLUMN content TEXT NOT NULL DEFAULT '{}'"
WAIT_S = 10.0
COLUMNS = (
    "tenant, task, version, digest, kind, num_virtual_tokens, num_bytes, base, base_model, fingerprint, note, "
    "created_at_s, content"
)
PLACES = ", ".join("?" * len(COLUMNS.split(", ")))


class SqliteRegistry:
    """Writes take their turn on one connection; reads have one a thread and never wait for a write."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._writing = threading.Lock()
        self._readers = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._writer = self._connect()
        with self._transaction() as db:
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found > SCHEMA_VERSION:
                raise ConflictError(f"{path}: expected a registry of schema {SCHEMA_VERSION}, got {found}")
            if found == 1:
                db.execute(MIGRATION)
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def add_version(
        self,
        tenant: str,
        task: str,
        new: NewVersion,
        activate: bool | None,
        precondition: Precondition,
        confirm: Callable[[], object],
    ) -> tuple[Task, Version, bool]:
        with self._transaction() as db:
            found = _task(db, tenant, task)
            precondition.check(None if found is None else str(found.revision))
            confirm()
            known = [v for v in found.versions if v.digest == new.digest] if found else []
            if found is not None and known:
                if activate is True and found.active != known[0].version:
                    _point(db, found, known[0].version)
                return _present(db, tenant, task), known[0], False
            revision = _next_revision(db, tenant)
            if found is None:
                db.execute("INSERT INTO tasks VALUES (?, ?, ?, 0, NULL, NULL, 0)", (tenant, task, revision))
            db.execute(
                "UPDATE tasks SET revision = ?, last_version = last_version + 1 WHERE tenant = ? AND name = ?",
                (revision, tenant, task),
            )
            number = db.execute(
                "SELECT last_version FROM tasks WHERE tenant = ? AND name = ?", (tenant, task)
            ).fetchone()[0]
            for member in new.content.members if isinstance(new.content, Ensemble) else ():
                if _present(db, tenant, member.task).find(str(member.version)).digest != member.digest:
                    raise NotFoundError(f"no version {member} any more: it was deleted and made anew")
            version = Version(**vars(new), tenant=tenant, task=task, version=number, created_at_s=time.time())
            db.execute(f"INSERT INTO versions ({COLUMNS}) VALUES ({PLACES})", _values(version))
            if activate is not False:
                _point(db, _present(db, tenant, task), number)
            return _present(db, tenant, task), version, True

    def get_task(self, tenant: str, task: str) -> Task | None:
        with self._snapshot() as db:
            return _task(db, tenant, task)

    def list_tasks(self, tenant: str, limit: int, after: str) -> list[Task]:
        with self._snapshot() as db:
            names = db.execute(
                "SELECT name FROM tasks WHERE tenant = ? AND name > ? ORDER BY name LIMIT ?", (tenant, after, limit)
            ).fetchall()
            return [_present(db, tenant, name) for (name,) in names]

    def activate(self, tenant: str, task: str, version: str, precondition: Precondition) -> Task:
        with self._transaction() as db:
            found = _present(db, tenant, task)
            precondition.check(str(found.revision))
            number = found.find(version).version
            if number != found.active:
                _point(db, found, number)
            return _present(db, tenant, task)

    def set_pinned(self, tenant: str, task: str, is_pinned: bool) -> Task:
        with self._transaction() as db:
            found = _present(db, tenant, task)
            if found.is_pinned != is_pinned:
                db.execute(
                    "UPDATE tasks SET is_pinned = ?, revision = ? WHERE tenant = ? AND name = ?",
                    (int(is_pinned), _next_revision(db, tenant), tenant, task),
                )
            return _present(db, tenant, task)

    def pinned_tasks(self) -> list[Task]:
        with self._snapshot() as db:
            names = db.execute("SELECT tenant, name FROM tasks WHERE is_pinned = 1 ORDER BY tenant, name").fetchall()
            return [_present(db, tenant, name) for tenant, name in names]

    def delete_version(self, tenant: str, task: str, version: str, precondition: Precondition) -> Version:
        with self._transaction() as db:
            found = _present(db, tenant, task)
            gone = found.find(version)
            precondition.check(gone.digest)
            if gone.version == found.active:
                raise ConflictError(
                    f"version {gone.version} of task {task!r} is active; activate another or delete the task"
                )
            _refuse_member(db, tenant, task, gone.version)
            db.execute(
                "DELETE FROM versions WHERE tenant = ? AND task = ? AND version = ?", (tenant, task, gone.version)
            )
            db.execute(
                "UPDATE tasks SET revision = ?, previous = nullif(previous, ?) WHERE tenant = ? AND name = ?",
                (_next_revision(db, tenant), gone.version, tenant, task),
            )
            return gone

    def delete_task(self, tenant: str, task: str, precondition: Precondition) -> Task:
        with self._transaction() as db:
            found = _present(db, tenant, task)
            precondition.check(str(found.revision))
            for version in found.versions:
                _refuse_member(db, tenant, task, version.version, but_of=task)
            db.execute("DELETE FROM tasks WHERE tenant = ? AND name = ?", (tenant, task))
            _next_revision(db, tenant)
            return found

    def digests(self) -> set[str]:
        with self._snapshot() as db:
            return {digest for (digest,) in db.execute("SELECT DISTINCT digest FROM versions")}

    def release_unused(self, digests: set[str], drop: Callable[[str], None]) -> None:
        with self._transaction() as db:
            for digest in digests:
                if db.execute("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", (digest,)).fetchone() is None:
                    drop(digest)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        self._connections.append(db)
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        db: sqlite3.Connection | None = getattr(self._readers, "db", None)
        if db is None:
            db = self._readers.db = self._connect()
        db.execute("BEGIN")
        try:
            yield db
        finally:
            db.execute("COMMIT")


def _next_revision(db: sqlite3.Connection, tenant: str) -> int:
    """Counted by tenant, so that a task made anew never repeats one and nobody sees another's pace."""
    row = db.execute(
        "INSERT INTO revisions VALUES (?, 1) ON CONFLICT (tenant) DO UPDATE SET revision = revision + 1 "
        "RETURNING revision",
        (tenant,),
    ).fetchone()
    return int(row[0])


def _point(db: sqlite3.Connection, task: Task, version: int) -> None:
    db.execute(
        "UPDATE tasks SET previous = active, active = ?, revision = ? WHERE tenant = ? AND name = ?",
        (version, _next_revision(db, task.tenant), task.tenant, task.name),
    )


def _task(db: sqlite3.Connection, tenant: str, name: str) -> Task | None:
    row = db.execute(
        "SELECT revision, active, previous, is_pinned FROM tasks WHERE tenant = ? AND name = ?", (tenant, name)
    ).fetchone()
    if row is None:
        return None
    versions = db.execute(
        f"SELECT {COLUMNS} FROM versions WHERE tenant = ? AND task = ? ORDER BY version", (tenant, name)
    ).fetchall()
    return Task(tenant, name, row[0], row[1], row[2], bool(row[3]), tuple(map(_version, versions)))


def _refuse_member(db: sqlite3.Connection, tenant: str, task: str, version: int, but_of: str = "") -> None:
    """Raises ConflictError naming the ensembles that have this version, those of the task `but_of` apart."""
    users = db.execute(
        "SELECT DISTINCT task, version FROM versions, json_each(content, '$.members') AS member "
        "WHERE tenant = ? AND kind = 'ensemble' AND task != ? "
        "AND json_extract(member.value, '$.task') = ? AND json_extract(member.value, '$.version') = ?",
        (tenant, but_of, task, version),
    ).fetchall()
    if users:
        named = ", ".join(f"{user}@{number}" for user, number in users)
        raise ConflictError(f"version {version} of task {task!r} is a member of {named}; delete that first")


def _values(version: Version) -> tuple[object, ...]:
    given = [getattr(version, name) for name in COLUMNS.split(", ")[:-1]]
    return (*given, json.dumps(asdict(version.content), sort_keys=True))


def _version(row: tuple[Any, ...]) -> Version:
    fields = dict(zip(COLUMNS.split(", "), row, strict=True))
    kind, num_virtual_tokens = fields.pop("kind"), fields.pop("num_virtual_tokens")
    content = json.loads(fields.pop("content")) or {"kind": kind, "num_decoder_tokens": num_virtual_tokens}
    if kind == KIND:
        members = [Member(**member | {"content": Layout(**member["content"])}) for member in content["members"]]
        return Version(**fields, content=Ensemble(tuple(members), content["rule"]))
    return Version(**fields, content=Layout(**content))


def _present(db: sqlite3.Connection, tenant: str, name: str) -> Task:
    found = _task(db, tenant, name)
    if found is None:
        raise NotFoundError(f"no task {name!r}")
    return found
