"""A replica reads on while Redis is away, starts without it, and sees what others do soon."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from prefix_store import redis_keys as keys
from prefix_store.blobs import Blobs
from prefix_store.errors import NotFoundError, UnavailableError
from prefix_store.mirror import Mirror
from prefix_store.redis_registry import RedisRegistry
from prefix_store.store import PrefixStore
from prefix_store.tenants import Tenant
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.small_prefixes import OURS, SHAPE, THEIRS, make_tenants, publish
from tests.waiting import eventually

TIMEOUT_S = 1.5
OpenMirror = Callable[..., Mirror]


@pytest.fixture
def open_mirror(redis_process: RedisProcess, tmp_path: Path) -> Iterator[OpenMirror]:
    """Redis is there again at the end."""
    opened: list[Mirror] = []

    def open_one(name: str, timeout_s: float = TIMEOUT_S, **options: float) -> Mirror:
        opened.append(
            Mirror(RedisRegistry(redis_process.url, timeout_s=timeout_s), tmp_path / f"{name}.sqlite", **options)
        )
        opened[-1].start()
        return opened[-1]

    yield open_one
    if not redis_process.is_running:
        redis_process.start()
    for mirror in opened:
        mirror.close()


def store_of(mirror: Mirror, tmp_path: Path) -> PrefixStore:
    return PrefixStore(mirror, Blobs(tmp_path / "blobs"), SHAPE)


def test_flip_is_seen_by_both(open_mirror: OpenMirror, tmp_path: Path) -> None:
    one, two = (store_of(open_mirror(name), tmp_path) for name in ("one", "two"))
    for seed in (1, 2):
        publish(one, "t", seed)
    eventually(lambda: two.has_task(OURS, "t"))
    for i in range(20):
        here, there = (one, two) if i % 2 else (two, one)
        version = 1 + i % 2
        here.activate(OURS, "t", str(version))
        assert here.resolve(OURS, "t").version == version
        eventually(lambda: there.resolve(OURS, "t").version == version)  # noqa: B023
    one.delete_task(OURS, "t")
    eventually(lambda: not two.has_task(OURS, "t"))


def test_tenants_shares_and_pins_are_seen_by_both(open_mirror: OpenMirror, tmp_path: Path) -> None:
    one, two = open_mirror("one"), open_mirror("two")
    store = store_of(one, tmp_path)
    make_tenants(one, THEIRS, OURS)
    assert one.tenants_revision() == 2
    eventually(lambda: two.get_tenant(OURS) == one.get_tenant(OURS))
    publish(store, "t")
    store.share(OURS, "t", [THEIRS])
    store.set_pinned(OURS, "t", True)
    eventually(lambda: [task.name for task in two.pinned_tasks()] == ["t"])
    assert [task.name for task in two.list_shared(THEIRS, 9, "")] == ["t"]
    assert store_of(two, tmp_path).resolve(THEIRS, "ours/t").version == 1
    one.update_tenant(OURS, lambda _: None)
    eventually(lambda: two.get_tenant(OURS) is None)
    assert two.tenants_revision() == one.tenants_revision() == 3


def test_reads_go_on_without_redis_and_catch_up_with_it(
    open_mirror: OpenMirror, redis_process: RedisProcess, tmp_path: Path
) -> None:
    one, two = open_mirror("one"), open_mirror("two")
    store, other = store_of(one, tmp_path), store_of(two, tmp_path)
    one.update_tenant(OURS, lambda _: Tenant(OURS))
    for seed in (1, 2):
        publish(store, "t", seed)
    eventually(lambda: other.has_task(OURS, "t") and other.resolve(OURS, "t").version == 2)
    for stop, go_on in ((redis_process.kill, redis_process.start), (redis_process.stop, redis_process.go_on)):
        stop()
        eventually(lambda: one.is_degraded and two.is_degraded)
        started_s = time.monotonic()
        for each in (store, other) * 10:
            assert each.resolve(OURS, "t").version == 2
            assert each.list_tasks(OURS)[0].name == "t"
            assert each.load(OURS, each.resolve(OURS, "t").digest).num_virtual_tokens == 4
        assert one.get_tenant(OURS) is not None
        assert time.monotonic() - started_s < 10 * TIMEOUT_S, "they asked Redis, which hangs"
        with pytest.raises(UnavailableError):
            store.activate(OURS, "t", "1")
        with pytest.raises(UnavailableError):
            publish(store, "u", 3)
        go_on()
        eventually(lambda: not (one.is_degraded or two.is_degraded))
        current = store.get_task(OURS, "t").active
        store.activate(OURS, "t", "1")
        eventually(lambda: other.resolve(OURS, "t").version == 1)
        store.activate(OURS, "t", "2")
        eventually(lambda: other.resolve(OURS, "t").version == 2)
        assert current in (1, 2)


def test_replica_starts_without_redis_and_knows_what_it_knew(
    open_mirror: OpenMirror, redis_process: RedisProcess, tmp_path: Path
) -> None:
    first = open_mirror("one")
    store = store_of(first, tmp_path)
    first.update_tenant(OURS, lambda _: Tenant(OURS))
    version = publish(store, "t").version
    first.close()
    redis_process.kill()
    again = open_mirror("one")
    store = store_of(again, tmp_path)
    assert again.is_degraded
    store.sweep()
    assert store.resolve(OURS, "t") == version
    assert again.get_tenant(OURS) is not None
    with pytest.raises(NotFoundError):
        store.resolve(OURS, "u")
    with pytest.raises(UnavailableError):
        open_mirror("never")
    redis_process.start()
    eventually(lambda: not again.is_degraded)
    assert publish(store, "u", 2).is_new


def test_what_the_stream_forgot_is_read_anew(
    open_mirror: OpenMirror, redis_process: RedisProcess, tmp_path: Path
) -> None:
    one, two = open_mirror("one"), open_mirror("two")
    store = store_of(two, tmp_path)
    for name in ("a", "b", "c"):
        publish(store, name)
    eventually(lambda: len(one.list_tasks(OURS, 9, "")) == 3)
    one.close()
    store.delete_task(OURS, "a")
    publish(store, "b", 2)
    publish(store, "d", 3)
    two.update_tenant(OURS, lambda _: Tenant(OURS))
    with redis_process.client() as client:
        client.xtrim(keys.EVENTS, maxlen=0, approximate=False)
    again = open_mirror("one")
    assert again.list_tasks(OURS, 9, "") == two.list_tasks(OURS, 9, "")
    assert again.get_tenant(OURS) == two.get_tenant(OURS)
    assert (again.revisions(), again.tenants_revision()) == (two.revisions(), two.tenants_revision())


def write_beside(redis_process: RedisProcess, tmp_path: Path) -> PrefixStore:
    """As another replica would."""
    return PrefixStore(RedisRegistry(redis_process.url), Blobs(tmp_path / "blobs"), SHAPE)


def test_stream_trimmed_past_a_running_replica(
    open_mirror: OpenMirror, redis_process: RedisProcess, tmp_path: Path
) -> None:
    mirror, other = open_mirror("one"), write_beside(redis_process, tmp_path)
    with mirror._adopting:  # it is slow, and misses all of this
        for seed, name in enumerate(("a", "b", "c")):
            publish(other, name, seed)
        publish(other, "t", tenant=THEIRS)
        other.delete_task(OURS, "a")
        with redis_process.client() as client:
            client.xtrim(keys.EVENTS, maxlen=0, approximate=False)
    eventually(lambda: [task.name for task in mirror.list_tasks(OURS, 9, "")] == ["b", "c"])
    eventually(lambda: mirror.revisions() == {OURS: 4, THEIRS: 1})
    publish(other, "d", 4)
    eventually(lambda: mirror.get_task(OURS, "d") is not None)
    other.close()


def test_running_replica_forgets_what_a_flushed_redis_forgot(
    open_mirror: OpenMirror, redis_process: RedisProcess, tmp_path: Path
) -> None:
    mirror, other = open_mirror("one"), write_beside(redis_process, tmp_path)
    mirror.update_tenant(OURS, lambda _: Tenant(OURS))
    for seed in (1, 2, 3):
        publish(other, "t", seed)
    publish(other, "t", tenant=THEIRS)
    eventually(lambda: mirror.get_task(THEIRS, "t") is not None)
    with redis_process.client() as client:
        client.flushall()
    publish(other, "u")
    eventually(lambda: [task.name for task in mirror.list_tasks(OURS, 9, "")] == ["u"])
    eventually(lambda: (mirror.get_task(THEIRS, "t"), mirror.get_tenant(OURS)) == (None, None))
    assert mirror.revision(OURS) == 1
    other.close()


def test_older_data_that_came_to_the_same_revision_is_told_apart(
    open_mirror: OpenMirror, redis_process: RedisProcess, tmp_path: Path
) -> None:
    mirror, other = open_mirror("one"), write_beside(redis_process, tmp_path)
    publish(other, "t", 1)
    older = dumped(redis_process)
    publish(other, "t", 2)
    eventually(lambda: mirror.revision(OURS) == 2)
    with mirror._adopting:
        restore(redis_process, older)
        publish(other, "u", 3)
    eventually(lambda: mirror.get_task(OURS, "u") is not None)
    assert mirror.list_tasks(OURS, 9, "") == other.list_tasks(OURS)
    assert mirror.revisions() == {OURS: 2}
    other.close()


def dumped(redis_process: RedisProcess) -> dict[bytes, bytes]:
    with redis.Redis.from_url(redis_process.url) as client:
        return {key: client.dump(key) for key in client.scan_iter()}


def restore(redis_process: RedisProcess, older: dict[bytes, bytes]) -> None:
    with redis.Redis.from_url(redis_process.url) as client:
        client.flushall()
        for key, value in older.items():
            client.restore(key, 0, value)


def test_revisions_are_compared_now_and_then(
    open_mirror: OpenMirror, redis_process: RedisProcess, tmp_path: Path
) -> None:
    mirror = open_mirror("one", reconcile_s=0.2)
    publish(store_of(mirror, tmp_path), "t")
    with redis_process.client() as client:  # as if a write had been lost with a Redis that was restored
        client.delete(keys.tasks(OURS), keys.names(OURS))
        client.hset(keys.REVISIONS, OURS, 0)
        client.set(keys.TENANTS_REVISION, 0)
    eventually(lambda: mirror.get_task(OURS, "t") is None)
    assert mirror.revision(OURS) == 0


def test_other_data_under_the_same_revisions_is_told_apart(
    open_mirror: OpenMirror, redis_process: RedisProcess, tmp_path: Path
) -> None:
    first = open_mirror("one")
    publish(store_of(first, tmp_path), "t")
    first.close()
    with redis_process.client() as client:
        client.flushall()
    other = open_mirror("two")
    publish(store_of(other, tmp_path), "u")
    again = open_mirror("one")
    assert again.revisions() == other.revisions() == {OURS: 1}
    assert [task.name for task in again.list_tasks(OURS, 9, "")] == ["u"]


def test_buckets_fall_to_a_replicas_part(open_mirror: OpenMirror, redis_process: RedisProcess) -> None:
    one, two = open_mirror("one"), open_mirror("two")
    eventually(lambda: (one._next_beat_s, two._next_beat_s) > (0, 0))
    one._next_beat_s = 0.0
    eventually(lambda: one._num_replicas == 2)
    assert one.take(OURS, "b", 10, 10, 0.001, time.monotonic()).taken
    assert not two.take(OURS, "b", 1, 10, 0.001, time.monotonic()).taken
    redis_process.kill()
    assert one.take(OURS, "b", 5, 10, 0.001, time.monotonic()) == (True, 0, 0)
    assert one.is_degraded
    assert not one.take(OURS, "b", 1, 10, 0.001, time.monotonic()).taken


def test_server_that_hangs_holds_one_request_only(
    open_mirror: OpenMirror, redis_process: RedisProcess, tmp_path: Path
) -> None:
    mirror = open_mirror("one", timeout_s=30)
    store = store_of(mirror, tmp_path)
    redis_process.stop()
    try:
        started_s = time.monotonic()
        mirror.take(OURS, "b", 1, 10, 1, time.monotonic())
        for _ in range(5):
            assert mirror.take(OURS, "b", 1, 10, 1, time.monotonic()).taken
        for change in (lambda: publish(store, "t"), lambda: mirror.update_tenant(OURS, lambda _: Tenant(OURS))):
            with pytest.raises(UnavailableError, match="not followed"):
                change()
        assert time.monotonic() - started_s < 15
    finally:
        redis_process.go_on()
    eventually(lambda: not mirror.is_degraded)
