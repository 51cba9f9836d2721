"""A rollback ends weights, and all traffic goes to the version that was live when they were set; on every registry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefix_store.errors import ConflictError, NotFoundError
from prefix_store.registry import Registry
from prefix_store.store import PrefixStore
from prefix_store.task import Task
from tests.prefix_store.small_prefixes import OURS, publish


def store_versions(store: PrefixStore, *active: int) -> None:
    """Three versions of the task `t`, made live in this order."""
    for seed in (1, 2, 3):
        publish(store, "t", seed, activate=False)
    for version in active:
        store.activate(OURS, "t", str(version))


def rolled_back(store: PrefixStore) -> Task:
    named = store.resolve(OURS, "t@previous").version
    task = store.activate(OURS, "t", "previous")
    assert (task.active, task.weights, task.live_before) == (named, (), None)
    assert {store.resolve(OURS, "t", f"s{i}").version for i in range(20)} == {named}
    assert store.get_task(OURS, "t") == task
    return task


@pytest.mark.parametrize("history", [(2,), (1, 2), (3, 2), (1, 3, 2)])
@pytest.mark.parametrize("weights", [{"2": 90, "3": 10}, {"2": 10, "3": 90}, {"1": 50, "3": 50}, {"3": 1}, {"2": 1}])
def test_rollback_of_weights_ends_at_the_version_that_was_live(
    store: PrefixStore, history: tuple[int, ...], weights: dict[str, int]
) -> None:
    store_versions(store, *history)
    before = store.get_task(OURS, "t")
    store.set_weights(OURS, "t", weights)
    task = rolled_back(store)
    assert replace(task, revision=before.revision) == before


def test_weights_after_weights_keep_what_a_rollback_goes_back_to(store: PrefixStore) -> None:
    store_versions(store, 1)
    for weights in ({"1": 90, "2": 10}, {"1": 50, "2": 50}, {"2": 50, "3": 50}, {"2": 50, "3": 50}):
        store.set_weights(OURS, "t", weights)
    assert rolled_back(store).active == 1


def test_version_with_the_only_weight_is_live_for_the_next_weights(store: PrefixStore) -> None:
    store_versions(store, 1)
    for weights in ({"1": 50, "2": 50}, {"2": 100}, {"2": 1}):
        store.set_weights(OURS, "t", weights)
        assert store.resolve(OURS, "t@previous").version == 1
    store.set_weights(OURS, "t", {"2": 90, "3": 10})
    assert rolled_back(store).active == 2
    assert rolled_back(store).active == 1


def test_first_weights_of_a_task_without_a_live_version_end_at_the_heaviest(store: PrefixStore) -> None:
    store_versions(store)
    store.set_weights(OURS, "t", {"1": 10, "3": 90})
    store.set_weights(OURS, "t", {"1": 90, "2": 10})
    assert rolled_back(store).active == 3


def test_second_rollback_goes_back_as_before_the_weights(store: PrefixStore) -> None:
    store_versions(store, 1, 2)
    store.set_weights(OURS, "t", {"2": 90, "3": 10})
    assert [rolled_back(store).active for _ in range(3)] == [2, 1, 2]
    store.delete_version(OURS, "t", "1")
    store.set_weights(OURS, "t", {"2": 90, "3": 10})
    assert rolled_back(store).active == 2
    with pytest.raises(NotFoundError, match="no version 'previous'"):
        store.activate(OURS, "t", "previous")


def test_version_that_weights_promote_has_the_live_one_before_it(store: PrefixStore) -> None:
    store_versions(store, 1)
    store.set_weights(OURS, "t", {"2": 50, "3": 50})
    promoted = store.activate(OURS, "t", "3")
    assert (promoted.active, promoted.previous) == (3, 1)
    store.set_weights(OURS, "t", {"2": 50, "3": 50})
    uploaded = publish(store, "t", 4, activate=True).task
    assert (uploaded.active, uploaded.previous, uploaded.weights) == (4, 3, ())


def test_upload_amid_weights_changes_no_rollback(store: PrefixStore) -> None:
    store_versions(store, 1)
    store.set_weights(OURS, "t", {"1": 90, "2": 10})
    assert publish(store, "t", 4).task.weights
    assert rolled_back(store).active == 1


def test_version_that_a_rollback_goes_back_to_is_not_deleted(store: PrefixStore) -> None:
    store_versions(store, 3, 1)
    store.set_weights(OURS, "t", {"2": 50, "3": 50})
    for ref in ("1", "previous"):
        with pytest.raises(ConflictError, match="version 1 of task 't' is what a rollback goes back to"):
            store.delete_version(OURS, "t", ref)
    assert rolled_back(store).active == 1
    assert store.delete_version(OURS, "t", "previous").version == 3


def test_quarantine_amid_weights_changes_no_rollback(store: PrefixStore) -> None:
    store_versions(store, 3, 1)
    store.set_weights(OURS, "t", {"1": 50, "2": 50})
    left = store.quarantine(OURS, "t", 1)
    assert left is not None
    assert (left.active, left.weights) == (2, ((2, 50),))
    assert rolled_back(store).active == 1


def test_last_weighted_version_that_fails_gives_way_to_the_live_one(store: PrefixStore) -> None:
    store_versions(store, 3, 1)
    store.set_weights(OURS, "t", {"2": 1})
    task = store.quarantine(OURS, "t", 2)
    assert task is not None
    assert (task.active, task.previous, task.weights, task.live_before) == (1, 2, (), None)


def test_weights_stored_without_what_was_live_before_end_at_the_active(registry: Registry, store: PrefixStore) -> None:
    store_versions(store, 1)
    weighted = store.set_weights(OURS, "t", {"1": 90, "2": 10})
    registry.change(OURS, lambda draft: draft.put(replace(weighted, live_before=None)))
    assert rolled_back(store).active == 1
