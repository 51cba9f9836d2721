"""A registry moves to another kind with everything it has, and goes on there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prefix_store.blobs import Blobs
from prefix_store.errors import ConflictError
from prefix_store.redis_registry import RedisRegistry
from prefix_store.registry import Registry
from prefix_store.registry_copy import contents, copy
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from prefix_store.tenants import SCOPES, Tenant, new_key
from prefix_store.usage import Usage
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.small_prefixes import OURS, SHAPE, THEIRS, ensemble, make_tenants, publish


@pytest.fixture(params=["to redis", "to sqlite"])
def both(request: pytest.FixtureRequest, redis_process: RedisProcess, tmp_path: Path) -> Iterator[list[Registry]]:
    found: list[Registry] = [SqliteRegistry(tmp_path / "registry.sqlite"), RedisRegistry(redis_process.url)]
    yield found if request.param == "to redis" else found[::-1]
    for registry in found:
        registry.close()


def fill(registry: Registry, tmp_path: Path) -> PrefixStore:
    store = PrefixStore(registry, Blobs(tmp_path / "blobs"), SHAPE)
    make_tenants(registry, OURS, THEIRS)
    for tenant in (OURS, THEIRS):
        made = Tenant(tenant, keys=(new_key(SCOPES, 1.5)[1],))
        registry.update_tenant(tenant, lambda _, made=made: made)  # type: ignore[misc]
        for seed in (1, 2, 3):
            publish(store, "t", seed, tenant=tenant)
        publish(store, "gone", 4, tenant=tenant)
        store.delete_task(tenant, "gone")
        ensemble(store, "e", "t@1", "t@2", tenant=tenant)
        store.set_weights(tenant, "t", {"2": 1, "3": 9})
        store.quarantine(tenant, "t", 1)
        registry.add_usage([Usage("2026-11-25", tenant, "t", 1, num_requests=3, resident_byte_s=0.25)], tenant)
    store.share(OURS, "t", [THEIRS, "*"])
    store.set_pinned(OURS, "t", True)
    return store


def test_everything_is_there_and_goes_on(both: list[Registry], tmp_path: Path) -> None:
    source, target = both
    fill(source, tmp_path)
    made = copy(source, target)
    assert (made.num_tasks, len(made.tenants), len(made.audit), len(made.usage)) == (4, 2, 18, 2)
    assert replace(contents(target), tenants={}) == replace(contents(source), tenants={})
    for tenant_name in (OURS, THEIRS):
        assert target.list_audit(tenant_name, 99, None) == source.list_audit(tenant_name, 99, None)
    for tenant in source.list_tenants():
        assert replace(tenant, revision=0) == replace(target.get_tenant(tenant.name) or tenant, revision=0)
    assert target.pinned_tasks() == source.pinned_tasks()
    assert target.list_shared(THEIRS, 9, "") == source.list_shared(THEIRS, 9, "") != []
    assert target.digests() == source.digests()
    assert target.stored(OURS) == source.stored(OURS)
    store = PrefixStore(target, Blobs(tmp_path / "blobs"), SHAPE)
    with pytest.raises(ConflictError, match="is a member of e@1"):
        store.delete_task(OURS, "t")
    before = store.get_task(OURS, "t")
    assert publish(store, "t", 9).version.version == 4
    assert store.get_task(OURS, "t").revision > before.revision


def test_copy_that_was_cut_off_goes_on(both: list[Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = both
    fill(source, tmp_path)
    for method, after in (("adopt", 1), ("update_tenant", 1), ("append_audit", 2), ("add_usage", 0)):
        calls: list[int] = []

        def cut(*given: object, real: object = getattr(target, method), after: int = after, **named: object) -> object:
            calls.append(1)  # noqa: B023
            if len(calls) > after:  # noqa: B023
                raise KeyboardInterrupt
            return real(*given, **named)  # type: ignore[operator]

        with monkeypatch.context() as patched:
            patched.setattr(target, method, cut)
            with pytest.raises(KeyboardInterrupt):
                copy(source, target)
    copy(source, target)
    copy(source, target)
    assert replace(contents(target), tenants={}) == replace(contents(source), tenants={})


def test_target_that_has_something_else_is_left_alone(both: list[Registry], tmp_path: Path) -> None:
    source, target = both
    fill(source, tmp_path)
    store = PrefixStore(target, Blobs(tmp_path / "other"), SHAPE)
    publish(store, "t", 7)
    before = contents(target)
    with pytest.raises(ConflictError, match="expected an empty registry, found task 't' of 'ours'"):
        copy(source, target)
    assert contents(target) == before
    store.delete_task(OURS, "t")
    target.update_tenant("more", lambda _: Tenant("more"))
    with pytest.raises(ConflictError, match="found tenant 'more'"):
        copy(source, target)
    target.update_tenant("more", lambda _: None)
    with pytest.raises(ConflictError, match="found 2 audit entries"):
        copy(source, target)
