"""One SQLite file in WAL mode: its tables, its transactions, and files of earlier schemas."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefix_store.documents import read_content, write_task
from prefix_store.entries import entries_of
from prefix_store.errors import ConflictError, StorageFullError, UnavailableError
from prefix_store.private_files import make_file, make_folder
from prefix_store.task import Task, Version
from prefix_store.usage import COUNTS, FLOAT_COUNT

USAGE_COLUMNS = ", ".join(f"{name} {'REAL' if name == FLOAT_COUNT else 'INTEGER'} NOT NULL" for name in COUNTS)
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS tenant_counts (
    tenant TEXT PRIMARY KEY, revision INTEGER NOT NULL, num_versions INTEGER NOT NULL, num_bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS task_documents (
    tenant TEXT NOT NULL, name TEXT NOT NULL, document TEXT NOT NULL, PRIMARY KEY (tenant, name));
CREATE TABLE IF NOT EXISTS entries (
    entry TEXT NOT NULL, tenant TEXT NOT NULL, task TEXT NOT NULL, PRIMARY KEY (entry, tenant, task)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tenants (name TEXT PRIMARY KEY, document TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tenants_revision (revision INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS audit (
    number INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, document TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS audit_by_tenant ON audit (tenant, number);
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL, tenant TEXT NOT NULL, task TEXT NOT NULL, version INTEGER NOT NULL, {USAGE_COLUMNS},
    PRIMARY KEY (day, tenant, task, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS usage_batches (batch TEXT PRIMARY KEY, at_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS copied (identity TEXT NOT NULL, event TEXT NOT NULL);
"""
SCHEMA_VERSION = 4
WAIT_S = 10.0
UNAVAILABLE = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
)
# What rows of schemas 1 and 2 say. Schema 1 had decoder-only prefixes only: their kind and length are their content.
OLD_TASKS = "SELECT tenant, name, revision, last_version, active, previous, is_pinned FROM tasks"
OLD_VERSIONS = (
    "SELECT version, digest, kind, num_virtual_tokens, num_bytes, base, base_model, fingerprint, note, created_at_s, "
    "{content} AS content FROM versions WHERE tenant = ? AND task = ? ORDER BY version"
)


class SqliteFile:
    """Writes take their turn on one connection; reads have one a thread and never wait for a write. Raises
    StorageFullError where the disk is full, UnavailableError where the file cannot be read or written.

    A file that is not `is_durable` may lose its last writes, never its consistency, when the machine stops.
    """

    def __init__(self, path: Path, *, is_durable: bool = True) -> None:
        make_folder(path.parent)
        self._path = path
        self._synchronous = "FULL" if is_durable else "NORMAL"
        self._writing = threading.Lock()
        self._readers = threading.local()
        self._connections: list[sqlite3.Connection] = []
        with suppress(OSError):  # SQLite says better what is wrong with this place
            make_file(path)  # and SQLite makes the files beside it with the same mode
        with _named(path):
            self._writer = self._connect()
        with self.transaction() as db:
            found = db.execute("PRAGMA user_version").fetchone()[0]
            if found > SCHEMA_VERSION:
                raise ConflictError(f"{path}: expected a registry of schema {SCHEMA_VERSION}, got {found}")
            if found == SCHEMA_VERSION:
                return  # nothing is written, so that a server starts on a full disk
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            if db.execute("SELECT 1 FROM tenants_revision").fetchone() is None:
                db.execute("INSERT INTO tenants_revision VALUES (0)")
            if found in (1, 2):
                _migrate(db, found)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """No other write of any process happens meanwhile."""
        with self._writing, _named(self._path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """All reads see one state."""
        with _named(self._path):
            db: sqlite3.Connection | None = getattr(self._readers, "db", None)
            if db is None:
                db = self._readers.db = self._connect()
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.execute("COMMIT")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {self._synchronous}")
        self._connections.append(db)
        return db


def has_tables(path: Path) -> bool:
    """Whether the file has a registry's tables, or is SQLite and cannot be read: opening it says why. It is not
    changed."""
    if not path.is_file() or not path.stat().st_size:
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            tables = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name IN ('task_documents', 'tasks')"
            return db.execute(tables).fetchone() is not None
    except sqlite3.Error as error:
        return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) != sqlite3.SQLITE_NOTADB


def put_task(db: sqlite3.Connection, task: Task) -> None:
    db.execute("INSERT OR REPLACE INTO task_documents VALUES (?, ?, ?)", (task.tenant, task.name, write_task(task)))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        code = extended & 0xFF  # the rest says where it came about
        if code == sqlite3.SQLITE_FULL:
            raise StorageFullError(f"the registry has no room: {error}", detail=path) from error
        if extended == sqlite3.SQLITE_IOERR_SHMSIZE:  # the first to open it takes 32 KiB beside it
            raise StorageFullError("the registry has no room: database or disk is full", detail=path) from error
        if code in UNAVAILABLE:
            raise UnavailableError(f"expected to read and write the registry, got: {error}", detail=path) from error
        raise


def _migrate(db: sqlite3.Connection, schema: int) -> None:
    """Rows become documents. The counters go on from where they were."""
    db.execute("INSERT INTO tenant_counts SELECT tenant, revision, 0, 0 FROM revisions")
    db.row_factory = sqlite3.Row
    select_versions = OLD_VERSIONS.format(content="'{}'" if schema == 1 else "content")
    for row in db.execute(OLD_TASKS).fetchall():
        task = Task(**dict(row) | {"is_pinned": bool(row["is_pinned"]), "versions": ()})
        rows = db.execute(select_versions, (task.tenant, task.name))
        task = replace(task, versions=tuple(_old_version(task, dict(row)) for row in rows))
        put_task(db, task)
        entries = [(entry, task.tenant, task.name) for entry in entries_of(task)]
        db.executemany("INSERT INTO entries VALUES (?, ?, ?)", entries)
        db.execute(
            "UPDATE tenant_counts SET num_versions = num_versions + ?, num_bytes = num_bytes + ? WHERE tenant = ?",
            (len(task.versions), sum(version.num_bytes for version in task.versions), task.tenant),
        )
    db.row_factory = None
    for table in ("versions", "tasks", "revisions"):
        db.execute(f"DROP TABLE {table}")


def _old_version(task: Task, row: dict[str, Any]) -> Version:
    kind, num_virtual_tokens = row.pop("kind"), row.pop("num_virtual_tokens")
    content = json.loads(row.pop("content")) or {"kind": kind, "num_decoder_tokens": num_virtual_tokens}
    return Version(**row, content=read_content(content), tenant=task.tenant, task=task.name)
