"""How many tasks a model cannot serve, on every registry and after every change."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from prefix_store.blobs import Blobs
from prefix_store.registry import Registry, TaskCounts
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from tests.prefix_store.small_prefixes import OURS, SHAPE, THEIRS, publish


@pytest.fixture
def other(registry: Registry, tmp_path: Path) -> PrefixStore:
    """Another model on the same data folder."""
    return PrefixStore(registry, Blobs(tmp_path / "blobs"), replace(SHAPE, fingerprint="0" * 64))


def test_tasks_of_another_model_are_counted_after_every_change(store: PrefixStore, other: PrefixStore) -> None:
    assert store.count_tasks() == TaskCounts(0, 0)
    for task, tenant in (("a", OURS), ("b", OURS), ("a", THEIRS)):
        publish(store, task, 1, tenant=tenant)
    publish(store, "stored", 1, activate=False)
    assert (store.count_tasks(), other.count_tasks()) == (TaskCounts(4, 0), TaskCounts(4, 3))
    assert (other.count_tasks(OURS), other.count_tasks(THEIRS)) == (TaskCounts(3, 2), TaskCounts(1, 1))
    publish(other, "a", 2)
    assert (store.count_tasks(), other.count_tasks()) == (TaskCounts(4, 1), TaskCounts(4, 2))
    other.activate(OURS, "a", "previous")
    assert (store.count_tasks(), other.count_tasks()) == (TaskCounts(4, 0), TaskCounts(4, 3))
    other.set_weights(OURS, "a", {"2": 1})
    assert (store.count_tasks(), other.count_tasks()) == (TaskCounts(4, 1), TaskCounts(4, 2))
    other.delete_task(OURS, "a")
    other.delete_task(THEIRS, "a")
    assert (store.count_tasks(), other.count_tasks()) == (TaskCounts(2, 0), TaskCounts(2, 1))
    assert other.count_tasks("nobody") == TaskCounts(0, 0)


def test_file_of_the_fourth_schema_is_counted_as_well(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    store = PrefixStore(SqliteRegistry(path), Blobs(tmp_path / "blobs"), SHAPE)
    for task in ("a", "b"):
        publish(store, task, 1)
    store.close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("DELETE FROM entries WHERE entry >= 'model ' AND entry < 'model!'")
    db.execute("DROP INDEX audit_by_tenant_number")
    db.execute("ALTER TABLE audit DROP COLUMN tenant_number")
    db.execute("PRAGMA user_version = 4")
    db.close()
    registry = SqliteRegistry(path)
    assert registry.count_tasks(SHAPE.fingerprint) == TaskCounts(2, 0)
    assert registry.count_tasks("0" * 64) == TaskCounts(2, 2)
    registry.close()
