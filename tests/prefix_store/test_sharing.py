"""What other tenants may use, and that nothing else of a tenant can be told; the same on both registries."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefix_store.blobs import Blobs
from prefix_store.draft import Stored
from prefix_store.errors import (
    ArtefactTooLargeError,
    ConflictError,
    DamagedBlobError,
    InvalidArtefactError,
    InvalidChangeError,
    InvalidTenantError,
    NotFoundError,
    QuotaError,
)
from prefix_store.registry import Registry
from prefix_store.store import PrefixStore
from prefix_store.task_changes import Published
from prefix_store.tenants import Limits, Tenant
from tests.prefix_store.small_prefixes import OURS, SHAPE, THEIRS, ensemble, make_tenants, publish, soft


def names(tasks: list) -> list[str]:  # type: ignore[type-arg]
    return [f"{task.tenant}/{task.name}" for task in tasks]


def test_shared_task_is_found_by_those_it_is_shared_with(store: PrefixStore, registry: Registry) -> None:
    make_tenants(registry, OURS, "more")
    for seed in (1, 2):
        publish(store, "t", seed, tenant=THEIRS)
    store.share(THEIRS, "t", [OURS, "more"])
    assert (store.resolve(OURS, "theirs/t").version, store.resolve(OURS, "theirs/t").tenant) == (2, THEIRS)
    assert store.resolve("more", "theirs/t@1").version == 1
    assert store.resolve(OURS, "theirs/t@previous").version == 1
    for tenant, ref in ((OURS, "t"), ("other", "theirs/t"), ("other", "t")):
        with pytest.raises(NotFoundError):
            store.resolve(tenant, ref)
    assert store.resolve(THEIRS, "theirs/t") == store.resolve(THEIRS, "t")
    store.share(THEIRS, "t", ["more"])
    with pytest.raises(NotFoundError, match="no task 'theirs/t'"):
        store.resolve(OURS, "theirs/t")


def test_task_shared_with_all_is_found_by_all(store: PrefixStore, registry: Registry) -> None:
    make_tenants(registry, "more")
    publish(store, "t", 1, tenant=THEIRS)
    assert store.share(THEIRS, "t", ["*", "more"]).shared_with == ("*", "more")
    assert store.resolve(OURS, "theirs/t").version == 1
    store.share(THEIRS, "t", [])
    with pytest.raises(NotFoundError):
        store.resolve(OURS, "theirs/t")


def test_not_shared_and_not_there_read_the_same(store: PrefixStore, registry: Registry) -> None:
    make_tenants(registry, "somebody")
    publish(store, "private", 1, tenant=THEIRS)
    publish(store, "shared", 2, tenant=THEIRS)
    store.share(THEIRS, "shared", ["somebody"])
    texts = set()
    for ref in ("theirs/private", "theirs/shared", "theirs/nothing", "theirs/private@7", "nobody/private"):
        with pytest.raises(NotFoundError) as caught:
            store.resolve(OURS, ref)
        texts.add(str(caught.value).replace(ref.partition("@")[0], "OWNER/T"))
    assert texts == {"no task 'OWNER/T'"}


def test_shared_tasks_are_listed_by_owner_and_page(store: PrefixStore, registry: Registry) -> None:
    make_tenants(registry, OURS, "somebody")
    for owner in ("b", "a", "a-b", OURS):
        for name in ("y", "x", "z"):
            publish(store, name, tenant=owner)
            store.share(owner, name, {"x": [OURS], "y": ["*"], "z": ["somebody"]}[name])
    assert store.get_task(OURS, "x").shared_with == ()
    expected = sorted(f"{owner}/{name}" for owner in ("a", "a-b", "b") for name in ("x", "y"))
    assert names(store.list_shared(OURS)) == expected
    listed: list[str] = []
    while page := store.list_shared(OURS, 2, listed[-1] if listed else ""):
        listed += names(page)
    assert listed == expected
    assert names(store.list_shared("a")) == ["a-b/y", "b/y", "ours/y"]
    store.delete_task("a", "x")
    assert names(store.list_shared(OURS)) == [name for name in expected if name != "a/x"]


@pytest.mark.parametrize("tenant", ["", "A", "a b", "**", "../x", "a" * 65])
def test_share_with_what_is_no_tenant_is_refused(store: PrefixStore, tenant: str) -> None:
    publish(store, "t")
    with pytest.raises(InvalidTenantError):
        store.share(OURS, "t", [tenant])


def test_shares_are_bounded(store: PrefixStore) -> None:
    publish(store, "t")
    with pytest.raises(InvalidChangeError, match="<= 256 tenants, or with \\*, got 257"):
        store.share(OURS, "t", [f"t{i}" for i in range(257)])


def test_ensemble_has_members_of_its_own_tenant_only(store: PrefixStore) -> None:
    publish(store, "t", 1, tenant=THEIRS)
    publish(store, "t", 1)
    store.share(THEIRS, "t", ["*"])
    for other in ("theirs/t", "theirs/nothing"):
        with pytest.raises(InvalidArtefactError, match=r"members\[1\]: expected a task of this tenant, got 'theirs/"):
            store.make_ensemble(OURS, ["t", other], "vote")
    assert ensemble(store, "e", "t", "ours/t").is_new


def test_same_content_of_two_tenants_is_stored_and_loaded_apart(store: PrefixStore) -> None:
    mine = publish(store, "t", 1).version
    theirs = publish(store, "t", 1, tenant=THEIRS).version
    assert mine.digest == theirs.digest
    store.load(OURS, mine.digest)
    store.delete_task(THEIRS, "t")
    assert store.has_file(OURS, mine.digest)
    assert not store.has_file(THEIRS, mine.digest)
    with pytest.raises(DamagedBlobError):
        store.load(THEIRS, mine.digest)
    store.delete_task(OURS, "t")
    with pytest.raises(DamagedBlobError):
        store.load(OURS, mine.digest)


def test_limits_on_what_is_stored_hold(store: PrefixStore, registry: Registry, tmp_path: Path) -> None:
    def publish_within(task: str, seed: int, tenant: str = OURS, **limits: int) -> Published:
        make_tenants(registry, tenant, limits=Limits(**limits))  # type: ignore[arg-type]
        return publish(store, task, seed, tenant=tenant, within_limits=True)

    first = publish_within("t", 1, max_prefixes=1).version
    files = sorted((tmp_path / "blobs").rglob("*.safetensors"))
    assert store.stored(OURS) == Stored(1, first.num_bytes)
    with pytest.raises(QuotaError, match="max_prefixes of this tenant is 1, it stores 1; delete a version first"):
        publish_within("u", 2, max_prefixes=1)
    with pytest.raises(QuotaError, match=f"it stores {first.num_bytes} and the file has {first.num_bytes}"):
        publish_within("u", 2, max_stored_bytes=2 * first.num_bytes - 1)
    with pytest.raises(ArtefactTooLargeError, match="max_virtual_tokens of this tenant is 3, got 4"):
        publish_within("u", 2, max_virtual_tokens=3)
    assert sorted((tmp_path / "blobs").rglob("*.safetensors")) == files
    assert not store.has_task(OURS, "u")
    assert publish_within("t", 1, max_prefixes=0).is_new is False
    assert publish_within("u", 2, max_stored_bytes=2 * first.num_bytes).is_new
    whole = store.make_ensemble(OURS, ["t", "u"], "vote")
    make_tenants(registry, OURS, limits=Limits(max_prefixes=2))
    with pytest.raises(QuotaError, match="max_prefixes"):
        store.publish_ensemble(OURS, "e", whole, within_limits=True)
    make_tenants(registry, OURS, limits=Limits(max_prefixes=3, max_virtual_tokens=4))
    store.publish_ensemble(OURS, "e", whole, within_limits=True)
    assert store.stored(OURS) == Stored(3, 2 * first.num_bytes)
    assert publish_within("t", 3, THEIRS, max_stored_bytes=2 * first.num_bytes).is_new
    store.delete_task(OURS, "e")
    store.delete_task(OURS, "u")
    assert store.stored(OURS) == Stored(1, first.num_bytes)


def test_nothing_is_stored_for_a_tenant_that_is_gone(store: PrefixStore, registry: Registry, tmp_path: Path) -> None:
    """As by an upload that was let in before. `default` needs not be made."""
    registry.update_tenant(OURS, lambda _: Tenant(OURS))
    publish(store, "t", 1, within_limits=True)
    whole = store.make_ensemble(OURS, ["t", "t"], "vote")
    store.delete_tenant(OURS)
    with pytest.raises(NotFoundError, match="no tenant 'ours'"):
        publish(store, "t", 1, within_limits=True)
    with pytest.raises(NotFoundError):
        store.publish_ensemble(OURS, "e", whole, within_limits=True)
    assert store.list_tasks(OURS) == []
    assert not list((tmp_path / "blobs").rglob("*.safetensors"))
    assert publish(store, "t", 1, tenant="default", within_limits=True).is_new


def test_tenant_goes_with_all_that_it_stores(store: PrefixStore, registry: Registry, tmp_path: Path) -> None:
    make_tenants(registry, OURS, THEIRS, "third")
    for tenant in (OURS, THEIRS):
        for i in range(3):
            publish(store, f"t{i}", i, tenant=tenant)
        ensemble(store, "e", "t0", "t1", tenant=tenant)
    store.share(THEIRS, "t0", [OURS])
    for task, shared_with in (("t0", [THEIRS]), ("t1", [THEIRS, "third"]), ("t2", ["*"])):
        store.share(OURS, task, shared_with)
    revision = store.get_task(THEIRS, "t0").revision
    gone = store.delete_tenant(THEIRS)
    assert sorted(version.task for version in gone) == ["e", "t0", "t1", "t2"]
    assert registry.get_tenant(THEIRS) is None
    assert (store.list_tasks(THEIRS), store.list_shared(OURS), store.stored(THEIRS)) == ([], [], Stored())
    assert set(Blobs(tmp_path / "blobs").digests()) == {OURS}
    assert len(store.list_tasks(OURS)) == 4
    assert [store.get_task(OURS, task).shared_with for task in ("t0", "t1", "t2")] == [(), ("third",), ("*",)]
    assert [task.name for task in store.list_shared(THEIRS)] == ["t2"]
    with pytest.raises(NotFoundError, match="no tenant 'theirs'"):
        store.delete_tenant(THEIRS)
    with pytest.raises(ConflictError, match="tenant 'default' cannot be deleted"):
        store.delete_tenant("default")
    with pytest.raises(InvalidTenantError):
        store.delete_tenant("../x")
    assert publish(store, "t0", tenant=THEIRS).task.revision > revision


@pytest.mark.parametrize("ref", ["a/b/c", "/t", "theirs/", "Theirs/t", "theirs/t@", "theirs/t@x", "../t", "theirs//t"])
def test_name_that_cannot_be_is_not_there(store: PrefixStore, ref: str) -> None:
    with pytest.raises(NotFoundError, match="a task is"):
        store.resolve(OURS, ref)


def test_host_memory_is_bounded(registry: Registry, tmp_path: Path) -> None:
    one = soft(0).num_bytes
    store = PrefixStore(registry, Blobs(tmp_path / "blobs"), SHAPE, max_host_bytes=2 * one)
    digests = [publish(store, f"t{i}", i).version.digest for i in range(3)]
    first = store.load(OURS, digests[0])
    second = store.load(OURS, digests[1])
    assert store.load(OURS, digests[0]) is first
    store.load(OURS, digests[2])
    assert store.load(OURS, digests[0]) is first
    assert store.load(OURS, digests[1]) is not second
