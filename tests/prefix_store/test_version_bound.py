"""A task has a bounded number of versions, whoever uploads at once; on every registry."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from prefix_store.errors import QuotaError
from prefix_store.registry import Registry
from prefix_store.store import PrefixStore
from prefix_store.tenants import DEFAULT, Limits
from tests.prefix_store.small_prefixes import OURS, make_tenants, publish


def test_uploads_at_once_stay_within_the_bound(store: PrefixStore, registry: Registry) -> None:
    make_tenants(registry, OURS, limits=Limits(max_versions=5))

    def upload(seed: int) -> bool:
        try:
            return publish(store, "t", seed, within_limits=True).is_new
        except QuotaError:
            return False

    with ThreadPoolExecutor(4) as pool:
        stored = list(pool.map(upload, range(12)))
    assert sum(stored) == len(store.get_task(OURS, "t").versions) == 5
    with pytest.raises(
        QuotaError, match="max_versions of this tenant is 5 for a task, 't' has 5; delete old ones first"
    ):
        publish(store, "t", 99, within_limits=True)


def test_bound_is_of_each_task_and_spares_known_content(store: PrefixStore, registry: Registry) -> None:
    make_tenants(registry, OURS, limits=Limits(max_versions=1))
    for task in ("t", "u"):
        assert publish(store, task, 1, within_limits=True).is_new
    assert not publish(store, "t", 1, within_limits=True).is_new
    with pytest.raises(QuotaError):
        publish(store, "t", 2, within_limits=True)
    make_tenants(registry, OURS, limits=Limits(max_versions=None))
    assert publish(store, "t", 2, within_limits=True).is_new


def test_every_tenant_has_the_bound_unless_it_is_set_otherwise() -> None:
    assert Limits().max_versions == DEFAULT.limits.max_versions == 256
