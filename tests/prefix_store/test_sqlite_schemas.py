"""SQLite files of earlier schemas are read, those of later ones refused."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from prefix_store.blobs import Blobs
from prefix_store.draft import Stored
from prefix_store.ensemble import Ensemble, Member
from prefix_store.errors import ConflictError, IncompatibleError
from prefix_store.native_format import digest_of, write_native
from prefix_store.prefix import Layout, Prefix
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from prefix_store.usage import Usage
from tests.prefix_store.small_prefixes import DIM, HEADS, HIDDEN, OURS, SHAPE, THEIRS, ensemble, publish

# What the first schema's file was made with.
SCHEMA_1 = """
CREATE TABLE revisions (tenant TEXT PRIMARY KEY, revision INTEGER NOT NULL);
CREATE TABLE tasks (
    tenant TEXT NOT NULL, name TEXT NOT NULL, revision INTEGER NOT NULL, last_version INTEGER NOT NULL,
    active INTEGER, previous INTEGER, is_pinned INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant, name)) WITHOUT ROWID;
CREATE TABLE versions (
    tenant TEXT NOT NULL, task TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, kind TEXT NOT NULL,
    num_virtual_tokens INTEGER NOT NULL, num_bytes INTEGER NOT NULL, base TEXT NOT NULL, base_model TEXT NOT NULL,
    fingerprint TEXT NOT NULL, note TEXT NOT NULL, created_at_s REAL NOT NULL,
    PRIMARY KEY (tenant, task, version),
    FOREIGN KEY (tenant, task) REFERENCES tasks (tenant, name) ON DELETE CASCADE) WITHOUT ROWID;
CREATE INDEX versions_by_digest ON versions (digest);
CREATE INDEX pinned_tasks ON tasks (tenant, name) WHERE is_pinned = 1;
PRAGMA user_version = 1;
"""


def make_schema_1(path: Path, blobs: Blobs) -> dict[tuple[str, str, int], tuple[str, Layout]]:
    """By hand: two tenants, three tasks, six versions of both kinds, one of them of another model."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(SCHEMA_1)
    db.execute("INSERT INTO revisions VALUES ('ours', 9), ('theirs', 2)")
    db.execute("INSERT INTO tasks VALUES ('ours', 'films', 9, 4, 3, 1, 1), ('ours', 'songs', 6, 1, 1, NULL, 0)")
    db.execute("INSERT INTO tasks VALUES ('theirs', 'films', 2, 1, 1, NULL, 0)")
    wanted = [(OURS, "films", 1, "kv", 3), (OURS, "films", 2, "soft", 5), (OURS, "films", 3, "kv", 20)]
    wanted += [(OURS, "films", 4, "kv", 7), (OURS, "songs", 1, "soft", 1), (THEIRS, "films", 1, "kv", 64)]
    found = {}
    for tenant, task, version, kind, n in wanted:
        tensors = torch.randn(2, 2, HEADS, n, DIM, generator=torch.Generator().manual_seed(version))
        prefix = Prefix("kv", {i: (tensors[i, 0], tensors[i, 1]) for i in range(2)}, base_model="tiny")
        if kind == "soft":
            prefix = Prefix("soft", embeddings=torch.full((n, HIDDEN), float(version)), base_model="tiny")
        body = write_native(prefix)
        digest = blobs.put(tenant, body)
        fingerprint = ("0" if version == 4 else "f") * 64
        row = (tenant, task, version, digest, kind, n, len(body), "verified", "tiny", fingerprint, "note", 1.5)
        db.execute(f"INSERT INTO versions VALUES ({', '.join('?' * len(row))})", row)
        found[tenant, task, version] = (digest, prefix.layout)
    db.close()
    return found


def test_file_of_the_first_schema_keeps_every_version(tmp_path: Path) -> None:
    path, blobs = tmp_path / "registry.sqlite", Blobs(tmp_path / "blobs")
    expected = make_schema_1(path, blobs)
    for _ in range(2):  # the second time it is of this schema
        store = PrefixStore(SqliteRegistry(path), blobs, SHAPE)
        store.sweep()
        films = store.get_task(OURS, "films")
        assert (films.revision, films.active, films.previous, films.is_pinned) == (9, 3, 1, True)
        tasks = [task for tenant in (OURS, THEIRS) for task in store.list_tasks(tenant)]
        listed = {(v.tenant, v.task, v.version): v for task in tasks for v in task.versions}
        assert {key: (v.digest, v.content) for key, v in listed.items()} == expected
        for version in listed.values():
            assert (version.note, version.created_at_s, version.base) == ("note", 1.5, "verified")
            assert store.load(version.tenant, version.digest).layout == version.content
            assert len(store.file_bytes(version)) == version.num_bytes
        with pytest.raises(IncompatibleError):
            store.resolve(OURS, "films@4")
        assert [v.version for v in store.pinned_versions()] == [3]
        store.close()
    store = PrefixStore(SqliteRegistry(path), blobs, SHAPE)
    made = ensemble(store, "both", "films@1", "films@2", "songs")
    assert made.task.revision == 10
    assert made.version.num_virtual_tokens == 3 + 5 + 1
    with pytest.raises(ConflictError, match="is a member of both@1"):
        store.delete_version(OURS, "films", "1")
    assert publish(store, "films", 5).version.version == 5
    store.delete_task(THEIRS, "films")
    store.close()


def test_file_of_a_later_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    SqliteRegistry(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 6")
    db.close()
    with pytest.raises(ConflictError, match="expected a registry of schema 5, got 6"):
        SqliteRegistry(path)


def test_file_of_the_third_schema_goes_on(tmp_path: Path) -> None:
    """It had no batches of usage."""
    path = tmp_path / "registry.sqlite"
    row = Usage("2026-11-25", OURS, "t", 1, num_requests=1)
    registry = SqliteRegistry(path)
    registry.add_usage([row], "before")
    registry.close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("DROP TABLE usage_batches")
    db.execute("PRAGMA user_version = 3")
    db.close()
    registry = SqliteRegistry(path)
    registry.add_usage([row], "after")
    assert registry.usage(OURS, row.day, row.day) == [row + row]
    registry.close()


def test_file_of_the_second_schema_keeps_layouts_ensembles_and_untenanted_files(tmp_path: Path) -> None:
    path, root = tmp_path / "registry.sqlite", tmp_path / "blobs"
    body = write_native(Prefix("soft", embeddings=torch.ones(3, HIDDEN), placement="infix"))
    digest = digest_of(body)
    layout = Layout("soft", "infix", num_decoder_tokens=3)
    whole = Ensemble((Member("a", 1, digest, layout), Member("a", 1, digest, layout)), "vote")
    (root / digest[:2]).mkdir(parents=True)
    (root / digest[:2] / f"{digest}.safetensors").write_bytes(body)
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript(SCHEMA_1)
    db.execute("ALTER TABLE versions ADD COLUMN content TEXT NOT NULL DEFAULT '{}'")
    db.execute("PRAGMA user_version = 2")
    db.execute("INSERT INTO revisions VALUES ('default', 5)")
    db.execute("INSERT INTO tasks VALUES ('default', 'a', 2, 3, 1, NULL, 0), ('default', 'both', 5, 1, 1, NULL, 0)")
    for task, of, content in (("a", digest, layout), ("both", whole.digest, whole)):
        kind, num_bytes = ("soft", len(body)) if content is layout else ("ensemble", 0)
        row = ("default", task, 1, of, kind, 3, num_bytes, "verified", "tiny", "f" * 64, "", 1.5)
        db.execute(
            f"INSERT INTO versions VALUES ({', '.join('?' * 13)})", (*row, json.dumps(asdict(content), sort_keys=True))
        )
    db.close()
    for _ in range(2):
        store = PrefixStore(SqliteRegistry(path), Blobs(root), SHAPE)
        store.sweep()
        assert store.resolve("default", "a").content == layout
        assert store.resolve("default", "both").content == whole
        assert store.load("default", digest).layout == layout
        assert [str(file.relative_to(root)) for file in root.rglob("*.safetensors")] == [
            f"default/{digest[:2]}/{digest}.safetensors"
        ]
        assert store.stored("default") == Stored(2, len(body))
        with pytest.raises(ConflictError, match="is a member of both@1"):
            store.delete_task("default", "a")
        store.close()
    store = PrefixStore(SqliteRegistry(path), Blobs(root), SHAPE)
    made = publish(store, "a", 1, tenant="default")
    assert (made.version.version, made.task.revision) == (4, 6)
    store.delete_task("default", "both")
    store.delete_task("default", "a")
    assert not store.has_file("default", digest)
    store.close()
