"""A registry's file that is damaged is named in one line, with what to do, wherever it is opened or read."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefix_store.blobs import Blobs
from prefix_store.errors import DamagedRegistryError, in_full
from prefix_store.mirror import Mirror
from prefix_store.redis_registry import RedisRegistry
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from prefix_store.tenants import Tenant
from server.cli import app
from server.start import open_registry
from tests.conftest import settings_for
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.small_prefixes import OURS, SHAPE, publish


def change(path: Path, *statements: str) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA writable_schema = 1")
    for statement in statements:
        db.execute(statement)
    db.close()


def of_another_program(path: Path) -> None:
    path.unlink()
    change(path, "CREATE TABLE bookmarks (url TEXT)")


def with_a_column_less(path: Path) -> None:
    change(path, "DROP TABLE task_documents", "CREATE TABLE task_documents (tenant TEXT, name TEXT)")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "no SQLite": lambda path: path.write_bytes(b"not a database at all, but long enough to be one\n" * 200),
    "one byte": lambda path: path.write_bytes(b"S"),
    "text of a page": lambda path: path.write_text("x" * 4096),
    "cut to a page": lambda path: os.truncate(path, 4096),
    "cut by half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeros behind the header": lambda path: path.write_bytes(
        path.read_bytes()[:100] + bytes(path.stat().st_size - 100)
    ),
    "a table less": lambda path: change(path, "DROP TABLE tenants"),
    "a column less": with_a_column_less,
    "a broken schema": lambda path: change(path, "UPDATE sqlite_master SET sql = 'CREATE nonsense' WHERE rowid = 1"),
    "of another program": of_another_program,
}


def make(folder: Path) -> Path:
    registry = SqliteRegistry(folder / "registry.sqlite")
    registry.update_tenant(OURS, lambda _: Tenant(OURS))
    store = PrefixStore(registry, Blobs(folder / "blobs"), SHAPE)
    for seed in range(3):
        publish(store, "t", seed)
    store.close()
    return folder / "registry.sqlite"


def run(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_command_names_the_damaged_file_and_what_to_do(
    damage: str, model_path: Path, redis_process: RedisProcess, tmp_path: Path
) -> None:
    path = make(tmp_path / "data")
    DAMAGES[damage](path)
    before = path.read_bytes()
    shared = RedisRegistry(redis_process.url)
    shared.update_tenant(OURS, lambda _: Tenant(OURS))
    shared.close()
    at = ("--data-dir", tmp_path / "data")
    for words in (
        ("serve", "--model", model_path, *at),
        ("registry", "copy", tmp_path / "data", redis_process.url),
        ("registry", "copy", redis_process.url, tmp_path / "data"),
        ("registry", "take-over", *at),
        ("registry", "sweep", *at),
        ("tenant", "create", "north", *at),
        ("tenant", "list", *at),
        ("tenant", "limits", OURS, *at),
        ("tenant", "rotate", OURS, *at),
        ("tenant", "suspend", OURS, *at),
        ("tenant", "rm", OURS, *at),
    ):
        code, output = run(*words)
        assert (code, output.count("\n")) == (1, 1), (words, output)
        assert f"{path}: expected a registry's SQLite file" in output
        assert "put a backup of the file back" in output
    assert path.read_bytes() == before or damage == "of another program"  # which is in WAL mode then


@pytest.mark.parametrize("damage", ["empty", "no SQLite", "cut by half", "a table less"])
def test_damaged_copy_of_a_shared_registry_is_read_anew(
    damage: str, redis_process: RedisProcess, tmp_path: Path
) -> None:
    path = tmp_path / "mirror.sqlite"
    settings = settings_for(tmp_path, redis_url=redis_process.url)
    mirror = open_registry(settings)
    publish(PrefixStore(mirror, Blobs(tmp_path / "blobs"), SHAPE), "t")
    mirror.close()
    DAMAGES[damage](path)
    mirror = open_registry(settings)
    assert isinstance(mirror, Mirror)
    assert mirror.get_task(OURS, "t") is not None
    mirror.close()


@pytest.mark.parametrize("document", ["", "{", "[]", "{}", "null", '{"versions": 1}', "[" * 100_000])
def test_document_that_is_damaged_is_told_of(document: str, redis_process: RedisProcess, tmp_path: Path) -> None:
    path = make(tmp_path / "data")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("UPDATE task_documents SET document = ?", (document,))
    db.execute("UPDATE tenants SET document = ?", (document,))
    db.close()
    registry = SqliteRegistry(path)
    shared = RedisRegistry(redis_process.url)
    publish(PrefixStore(shared, Blobs(tmp_path / "shared"), SHAPE), "t")
    with redis_process.client() as client:
        client.hset("{prefixserve}:tasks:ours", "t", document)
    for read in (
        lambda: registry.get_task(OURS, "t"),
        lambda: registry.list_tasks(OURS, 9, ""),
        lambda: registry.list_tenants(),
        lambda: shared.get_task(OURS, "t"),
    ):
        with pytest.raises(DamagedRegistryError, match="the registry is damaged") as found:
            read()
        assert "put a backup" in in_full(found.value)
    registry.close()
    shared.close()


def test_bytes_that_are_no_text_are_told_of(tmp_path: Path) -> None:
    path = make(tmp_path / "data")
    change(path, "UPDATE task_documents SET document = CAST(x'ff80' AS TEXT)")
    registry = SqliteRegistry(path)
    with pytest.raises(DamagedRegistryError):
        registry.get_task(OURS, "t")
    registry.close()


def test_processes_that_make_a_registry_at_once_make_one(tmp_path: Path) -> None:
    """Only a whole file appears under the name."""
    registries = [SqliteRegistry(tmp_path / "registry.sqlite") for _ in range(3)]
    assert len({registry.identity().id for registry in registries}) == 1
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"registry.sqlite"}
    for registry in registries:
        registry.close()
