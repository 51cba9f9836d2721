"""The registry's contract where versions are ensembles, and files of its first schema.

One class for every registry: a test that another one fails is the contract broken.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from prefix_store.blobs import Blobs
from prefix_store.ensemble import Ensemble, Member
from prefix_store.errors import ConflictError, IncompatibleError, InvalidArtefactError, NotFoundError
from prefix_store.native_format import write_native
from prefix_store.prefix import Layout, ModelShape, Prefix
from prefix_store.registry import ANY, NewVersion, Registry
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore, Published

HEADS, DIM, HIDDEN = 2, 8, 32
SHAPE = ModelShape(2, HEADS, DIM, HIDDEN, 100, 512, torch.float32, "tiny", "f" * 64)
OURS, THEIRS = "ours", "theirs"
CONTENTS = (
    Layout("kv", num_decoder_tokens=20),
    Layout("kv", "infix", separator=0, num_decoder_tokens=3),
    Layout("soft", "infix", num_decoder_tokens=4),
    Layout("soft", num_encoder_tokens=9),
    Layout("kv", num_decoder_tokens=1, num_encoder_tokens=2, num_cross_tokens=3),
)


@pytest.fixture(params=[SqliteRegistry])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    opened: Registry = request.param(tmp_path / "registry.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def store(registry: Registry, tmp_path: Path) -> PrefixStore:
    return PrefixStore(registry, Blobs(tmp_path / "blobs"), SHAPE)


def publish(store: PrefixStore, task: str, seed: int = 0, n: int = 4, tenant: str = OURS) -> Published:
    table = torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return store.publish(tenant, task, Prefix("soft", embeddings=table), base="unverified")


def ensemble(store: PrefixStore, task: str, *members: str, rule: str = "mean_probs", tenant: str = OURS) -> Published:
    return store.publish_ensemble(tenant, task, store.make_ensemble(tenant, members, rule))


def members_of(store: PrefixStore, ref: str) -> list[str]:
    content = store.resolve(OURS, ref).content
    assert isinstance(content, Ensemble)
    return [str(member) for member in content.members]


def new_version(digest: str, content: Layout | Ensemble) -> NewVersion:
    return NewVersion(digest, content, 10, "verified", "tiny", "f" * 64, "")


class TestContract:
    @pytest.mark.parametrize("content", CONTENTS)
    def test_layout_is_kept(self, registry: Registry, content: Layout) -> None:
        _, made, _ = registry.add_version(OURS, "t", new_version("a" * 64, content), None, ANY, lambda: None)
        task = registry.get_task(OURS, "t")
        assert task is not None
        assert task.versions == (made,)
        assert made.content == content
        assert (made.kind, made.num_virtual_tokens) == (content.kind, content.num_virtual_tokens)

    def test_ensemble_is_kept_with_the_layouts_of_its_members(self, registry: Registry) -> None:
        members = []
        for i, content in enumerate(CONTENTS):
            digest = f"{i:064x}"
            _, made, _ = registry.add_version(OURS, f"t{i}", new_version(digest, content), None, ANY, lambda: None)
            members.append(Member(made.task, made.version, made.digest, made.content))  # type: ignore[arg-type]
        whole = Ensemble(tuple(members), "vote")
        _, made, is_new = registry.add_version(OURS, "e", new_version(whole.digest, whole), None, ANY, lambda: None)
        task = registry.get_task(OURS, "e")
        assert task is not None
        assert is_new
        assert task.versions[0].content == made.content == whole
        assert (made.kind, made.num_virtual_tokens) == ("ensemble", 20 + 3 + 4 + 9 + 3)

    def test_members_are_frozen_when_published(self, store: PrefixStore) -> None:
        for seed in (1, 2):
            publish(store, "a", seed)
            publish(store, "b", 10 + seed)
        store.activate(OURS, "a", "1")
        by_digest = f"b@{store.get_version(OURS, 'b', '2').digest[:12]}"
        made = ensemble(store, "both", "a", "b@1", "b@previous", by_digest)
        assert members_of(store, "both") == ["a@1", "b@1", "b@1", "b@2"]
        before = store.resolve(OURS, "both")
        store.activate(OURS, "a", "2")
        publish(store, "b", 99)
        assert store.resolve(OURS, "both") == before
        assert before.digest == made.version.digest
        assert ensemble(store, "both", "a@1", "b@1", "b@1", "b@2").is_new is False
        assert ensemble(store, "both", "a", "b@1", "b@1", "b@2").version.version == 2

    def test_an_ensemble_is_a_version_like_any_other(self, store: PrefixStore) -> None:
        publish(store, "t", 1)
        publish(store, "u", 2, n=7)
        assert ensemble(store, "t", "t@1", "u").task.active == 2
        assert store.resolve(OURS, "t").num_virtual_tokens == 11
        assert store.activate(OURS, "t", "previous").active == 1
        with pytest.raises(NotFoundError, match="is an ensemble: its members have files"):
            store.file_bytes(store.resolve(OURS, "t@2"))
        digest = store.resolve(OURS, "t@2").digest
        assert store.resolve(OURS, f"t@{digest[:12]}").version == 2
        rule = ensemble(store, "t", "t@1", "u", rule="vote")
        assert (rule.is_new, rule.version.digest != digest) == (True, True)

    def test_member_cannot_be_deleted_and_the_users_are_named(self, store: PrefixStore) -> None:
        publish(store, "a", 1)
        publish(store, "b", 2)
        ensemble(store, "first", "a@1", "b@1")
        ensemble(store, "first", "b@1", "b@1")
        ensemble(store, "second", "a@1", "a@1")
        publish(store, "a", 3)
        with pytest.raises(ConflictError, match=r"version 1 of task 'a' is a member of first@1, second@1; delete that"):
            store.delete_version(OURS, "a", "1")
        with pytest.raises(ConflictError, match=r"version 1 of task 'a' is a member of first@1, second@1"):
            store.delete_task(OURS, "a")
        with pytest.raises(ConflictError, match=r"version 1 of task 'b' is a member of first@1, first@2"):
            store.delete_task(OURS, "b")
        assert len(store.get_task(OURS, "a").versions) == 2
        store.delete_task(OURS, "second")
        store.delete_version(OURS, "first", "1")
        store.delete_version(OURS, "a", "1")
        store.delete_task(OURS, "a")
        with pytest.raises(ConflictError, match=r"is a member of first@2;"):
            store.delete_task(OURS, "b")
        store.delete_task(OURS, "first")
        store.delete_task(OURS, "b")
        assert store.list_tasks(OURS) == []

    def test_version_beside_a_member_can_be_deleted(self, store: PrefixStore) -> None:
        for seed in (1, 2):
            publish(store, "a", seed)
        ensemble(store, "e", "a@2", "a@2")
        assert store.delete_version(OURS, "a", "1").version == 1

    def test_task_goes_with_its_own_ensembles(self, store: PrefixStore) -> None:
        publish(store, "t", 1)
        publish(store, "u", 2)
        ensemble(store, "t", "t@1", "u@1")
        with pytest.raises(ConflictError, match=r"is a member of t@2"):
            store.delete_version(OURS, "t", "1")
        store.delete_task(OURS, "t")
        store.delete_task(OURS, "u")

    def test_members_file_stays_while_the_ensemble_does(self, store: PrefixStore) -> None:
        one = publish(store, "a", 1).version
        ensemble(store, "e", "a@1", "a@1")
        publish(store, "a", 2)
        with pytest.raises(ConflictError):
            store.delete_version(OURS, "a", "1")
        store.sweep()
        assert store.has_file(one.digest)
        store.delete_task(OURS, "e")
        store.delete_version(OURS, "a", "1")
        assert not store.has_file(one.digest)

    def test_member_that_goes_before_publishing_is_refused(self, store: PrefixStore) -> None:
        publish(store, "a", 1)
        publish(store, "b", 2)
        made = store.make_ensemble(OURS, ["a", "b"], "vote")
        store.delete_task(OURS, "b")
        with pytest.raises(NotFoundError, match="no task 'b'"):
            store.publish_ensemble(OURS, "e", made)
        publish(store, "b", 3)
        with pytest.raises(NotFoundError, match="no version b@1 any more: it was deleted and made anew"):
            store.publish_ensemble(OURS, "e", made)
        assert not store.has_task(OURS, "e")
        assert publish(store, "c", 4).version.version == 1

    def test_wrong_members_are_refused_by_place(self, store: PrefixStore) -> None:
        publish(store, "a", 1)
        publish(store, "theirs", 2, tenant=THEIRS)
        ensemble(store, "e", "a", "a")
        for members, error, text in (
            (["a", "nothing"], InvalidArtefactError, r"members\[1\]: no task 'nothing'"),
            (["theirs", "a"], InvalidArtefactError, r"members\[0\]: no task 'theirs'"),
            (["a@2", "a"], InvalidArtefactError, r"members\[0\]: no version '2'"),
            (["a", "a", "e"], InvalidArtefactError, r"members\[2\]: 'e' is an ensemble itself; name its members"),
            (["a"], InvalidArtefactError, "has 2 to 32 members, got 1"),
            (["a"] * 33, InvalidArtefactError, "has 2 to 32 members, got 33"),
        ):
            with pytest.raises(error, match=text):
                store.make_ensemble(OURS, members, "vote")
        with pytest.raises(InvalidArtefactError, match="rule must be one of mean_probs, vote, got 'sum'"):
            store.make_ensemble(OURS, ["a", "a"], "sum")

    def test_tenants_do_not_hold_each_others_versions(self, store: PrefixStore) -> None:
        for tenant in (OURS, THEIRS):
            publish(store, "a", 1, tenant=tenant)
        ensemble(store, "e", "a", "a", tenant=THEIRS)
        store.delete_task(OURS, "a")
        with pytest.raises(ConflictError):
            store.delete_task(THEIRS, "a")

    def test_delete_and_publish_at_once_leave_no_ensemble_without_members(self, store: PrefixStore) -> None:
        started = threading.Barrier(2)

        def delete() -> None:
            started.wait()
            with suppress(ConflictError):
                store.delete_task(OURS, "a")

        for i in range(20):
            publish(store, "a", i)
            made = store.make_ensemble(OURS, ["a", "a"], "vote")
            thread = threading.Thread(target=delete)
            thread.start()
            started.wait()
            with suppress(NotFoundError):
                store.publish_ensemble(OURS, "e", made)
            thread.join()
            assert store.has_task(OURS, "a") == store.has_task(OURS, "e")
            for task in ("e", "a"):
                if store.has_task(OURS, task):
                    store.delete_task(OURS, task)


# What the first schema's file was made with, and what it held.

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
        digest = blobs.put(body)
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
            assert store.load(version.digest).layout == version.content
            assert len(store.file_bytes(version)) == version.num_bytes
        with pytest.raises(IncompatibleError):
            store.resolve(OURS, "films@4")
        assert [v.version for v in store.pinned_versions()] == [3]
        store.close()
    store = PrefixStore(SqliteRegistry(path), blobs, SHAPE)
    made = ensemble(store, "both", "films@1", "films@2", "songs")
    assert made.task.revision == 11
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
    db.execute("PRAGMA user_version = 3")
    db.close()
    with pytest.raises(ConflictError, match="expected a registry of schema 2, got 3"):
        SqliteRegistry(path)
