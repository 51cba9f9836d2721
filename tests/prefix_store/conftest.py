"""Every registry, and both kinds with as many openings as a test wants; a real Redis behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefix_store.blobs import Blobs
from prefix_store.mirror import Mirror
from prefix_store.redis_registry import RedisRegistry
from prefix_store.registry import Registry
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.small_prefixes import SHAPE, Open


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    process.start()
    yield process
    process.kill()


@pytest.fixture
def redis_process(shared_redis: RedisProcess) -> RedisProcess:
    """Empty. A test that stops it starts it again."""
    with shared_redis.client() as client:
        client.flushall()
    return shared_redis


@contextmanager
def opening(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[Open]:
    opened: list[Registry] = []

    def open_registry() -> Registry:
        if kind == "sqlite":
            found: Registry = SqliteRegistry(folder / "registry.sqlite")
        else:
            process: RedisProcess = request.getfixturevalue("redis_process")
            found = RedisRegistry(process.url)
            if kind == "mirror":
                found = Mirror(found, folder / f"copy-{len(opened)}.sqlite")
                found.start()
        opened.append(found)
        return found

    yield open_registry
    for registry in opened:
        registry.close()


@pytest.fixture(params=["sqlite", "redis"])
def open_registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same registry again, as another process would."""
    with opening(request.param, request, tmp_path) as found:
        yield found


@pytest.fixture(params=["sqlite", "redis", "mirror"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    with opening(request.param, request, tmp_path) as found:
        yield found()


@pytest.fixture
def store(registry: Registry, tmp_path: Path) -> PrefixStore:
    return PrefixStore(registry, Blobs(tmp_path / "blobs"), SHAPE)
