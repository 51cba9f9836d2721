"""One SQLite file in WAL mode: its tables, its transactions, and files of earlier schemas."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefix_store.documents import read_content, read_task, write_task
from prefix_store.entries import entries_of
from prefix_store.errors import ConflictError, DamagedRegistryError, StorageFullError, UnavailableError
from prefix_store.new_file import FULL, appear
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
    number INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, document TEXT NOT NULL,
    tenant_number INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL, tenant TEXT NOT NULL, task TEXT NOT NULL, version INTEGER NOT NULL, {USAGE_COLUMNS},
    PRIMARY KEY (day, tenant, task, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS usage_batches (batch TEXT PRIMARY KEY, at_s REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS copied (identity TEXT NOT NULL, event TEXT NOT NULL);
"""
AUDIT_INDEX = "CREATE UNIQUE INDEX IF NOT EXISTS audit_by_tenant_number ON audit (tenant, tenant_number)"
SCHEMA_VERSION = 5
WAIT_S = 10.0
MIN_BYTES = 512  # of the smallest page
SHARED_BYTES = 32 * 1024  # of the file beside it that the first to open it makes
UNAVAILABLE = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
)
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
NOT_OURS = ("no such ", "table ", "Could not decode")  # what SQLite says of tables and texts that are not as expected
COLUMNS = (
    "SELECT tables.name, columns.name FROM sqlite_master AS tables JOIN pragma_table_info(tables.name) AS columns "
    "WHERE tables.type = 'table'"
)
NO_ROOM = "the registry has no room: database or disk is full"
REMEDY = "put a backup of the file back, or move it away to begin without tasks and tenants"
# What rows of schemas 1 and 2 say. Schema 1 had decoder-only prefixes only: their kind and length are their content.
OLD_TASKS = "SELECT tenant, name, revision, last_version, active, previous, is_pinned FROM tasks"
OLD_VERSIONS = (
    "SELECT version, digest, kind, num_virtual_tokens, num_bytes, base, base_model, fingerprint, note, created_at_s, "
    "{content} AS content FROM versions WHERE tenant = ? AND task = ? ORDER BY version"
)


class SqliteFile:
    """Writes take their turn on one connection; reads have one a thread and never wait for a write. Raises
    StorageFullError where the disk is full, UnavailableError where the file cannot be read or written, and
    DamagedRegistryError, now or at any call, where it is no registry's file or not as it was written; `remedy` says
    what to do then.

    A file that is not `is_durable` may lose its last writes, never its consistency, when the machine stops.
    """

    def __init__(self, path: Path, *, is_durable: bool = True, remedy: str = REMEDY) -> None:
        make_folder(path.parent)
        self._path = path
        self._remedy = remedy
        self._synchronous = "FULL" if is_durable else "NORMAL"
        self._writing = threading.Lock()
        self._readers = threading.local()
        self._connections: list[sqlite3.Connection] = []
        with self._named():
            if not path.exists():
                self._create()
            elif path.is_file() and path.stat().st_size < MIN_BYTES:  # SQLite would begin a new one in it
                raise self._damaged(f"{path.stat().st_size} bytes")
            self._writer = self._connect(path)
        with self.transaction() as db:
            _prepare(db, path)

    def _create(self) -> None:
        """The file appears whole, so that an empty one is damage."""
        part = self._path.with_name(f"{self._path.name}.part-{uuid.uuid4().hex}")
        try:
            with suppress(OSError):  # SQLite says better what is wrong with this place
                make_file(part)  # and SQLite makes the files beside it with the same mode
            with closing(self._connect(part)) as db:
                db.execute("BEGIN")
                _prepare(db, self._path)
                db.execute("COMMIT")
            self._connections.remove(db)
            appear(part, self._path)
        finally:
            for rest in self._path.parent.glob(f"{part.name}*"):
                rest.unlink()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """No other write of any process happens meanwhile."""
        with self._writing, self._named():
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
        with self._named():
            db: sqlite3.Connection | None = getattr(self._readers, "db", None)
            if db is None:
                db = self._readers.db = self._connect(self._path)
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.execute("COMMIT")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _connect(self, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        self._connections.append(db)
        _refuse_others(db)  # before anything is changed in the file
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {self._synchronous}")
        return db

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the rest says where it came about
            if code in DAMAGED or (code == sqlite3.SQLITE_ERROR and str(error).startswith(NOT_OURS)):
                raise self._damaged(str(error)) from error
            if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and not self._has_room()):
                raise StorageFullError(NO_ROOM, detail=self._path) from error
            if code in UNAVAILABLE:
                reason = f"expected to read and write the registry, got: {error}"
                raise UnavailableError(reason, detail=self._path) from error
            raise

    def _has_room(self) -> bool:
        """Whether as much as SQLite needs at its first opening can be written beside the file, as far from a file's
        beginning as SQLite writes. To SQLite, a quota or a limit on the size of files is an error like any other."""
        paths = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        longest = max((path.stat().st_size for path in paths if path.exists()), default=0)
        try:
            with tempfile.TemporaryFile(dir=self._path.parent) as file:
                return os.pwrite(file.fileno(), bytes(SHARED_BYTES), longest) == SHARED_BYTES
        except OSError as error:
            return error.errno not in FULL

    def _damaged(self, found: str) -> DamagedRegistryError:
        detail = f"{self._path}: expected a registry's SQLite file, got: {found}; {self._remedy}"
        return DamagedRegistryError("the registry is damaged", detail=detail)


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables in a new file, bring those of an earlier schema to this one, and check those of this schema.
    Raises ConflictError for a file of a later schema."""
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found > SCHEMA_VERSION:
        raise ConflictError(f"{path}: expected a registry of schema {SCHEMA_VERSION}, got {found}")
    if found == SCHEMA_VERSION:  # nothing is written, so that a server starts on a full disk
        missing = _expected_columns() - set(db.execute(COLUMNS).fetchall())
        if missing:
            table, column = min(missing)
            raise sqlite3.OperationalError(f"no such column: {table}.{column}")
        return
    for statement in SCHEMA.split(";"):
        db.execute(statement)
    if db.execute("SELECT 1 FROM tenants_revision").fetchone() is None:
        db.execute("INSERT INTO tenants_revision VALUES (0)")
    if found in (1, 2):
        _migrate(db, found)
    elif found in (3, 4):
        _number_by_tenant(db)
        _index_models(db)
    db.execute(AUDIT_INDEX)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _refuse_others(db: sqlite3.Connection) -> None:
    """Raises sqlite3.OperationalError for a file with tables and without a schema's number."""
    has_number = db.execute("PRAGMA user_version").fetchone()[0]
    if not has_number and db.execute("SELECT 1 FROM sqlite_master").fetchone() is not None:
        raise sqlite3.OperationalError("table of another program")


def _expected_columns() -> set[tuple[str, str]]:
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        return set(db.execute(COLUMNS).fetchall())


def put_task(db: sqlite3.Connection, task: Task) -> None:
    db.execute("INSERT OR REPLACE INTO task_documents VALUES (?, ?, ?)", (task.tenant, task.name, write_task(task)))


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


def _number_by_tenant(db: sqlite3.Connection) -> None:
    """The audit's entries were numbered over all tenants. They keep their numbers, and each tenant's go on from its
    last."""
    db.execute("ALTER TABLE audit ADD COLUMN tenant_number INTEGER NOT NULL DEFAULT 0")
    db.execute("UPDATE audit SET tenant_number = number")
    db.execute("DROP INDEX IF EXISTS audit_by_tenant")


def _index_models(db: sqlite3.Connection) -> None:
    """Schemas 3 and 4 had no entries of models."""
    tasks = (read_task(document) for (document,) in db.execute("SELECT document FROM task_documents"))
    entries = ((entry, task.tenant, task.name) for task in tasks for entry in entries_of(task))
    db.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?, ?)", entries)


def _old_version(task: Task, row: dict[str, Any]) -> Version:
    kind, num_virtual_tokens = row.pop("kind"), row.pop("num_virtual_tokens")
    content = json.loads(row.pop("content")) or {"kind": kind, "num_decoder_tokens": num_virtual_tokens}
    return Version(**row, content=read_content(content), tenant=task.tenant, task=task.name)
