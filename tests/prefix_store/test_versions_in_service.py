"""Which version a request gets: weights, quarantine, tasks switched off; the same on both registries."""

from __future__ import annotations

from collections import Counter

import pytest

from prefix_store.errors import ConflictError, DisabledError, InvalidChangeError, NotFoundError
from prefix_store.store import PrefixStore
from tests.prefix_store.small_prefixes import OURS, publish


@pytest.fixture
def three(store: PrefixStore) -> PrefixStore:
    """A task `t` of three versions, the third active."""
    for seed in (1, 2, 3):
        publish(store, "t", seed)
    return store


def shares(store: PrefixStore, num_sessions: int = 2000) -> dict[int, float]:
    task = store.get_task(OURS, "t")
    counts = Counter(task.choose(f"session {i}").version for i in range(num_sessions))
    return {version: count / num_sessions for version, count in counts.items()}


def test_weights_divide_the_sessions(three: PrefixStore) -> None:
    task = three.set_weights(OURS, "t", {"3": 90, "1": 10})
    assert (task.weights, task.active, task.previous) == (((1, 10), (3, 90)), 3, 2)
    assert three.get_task(OURS, "t") == task
    found = shares(three)
    assert found[1] == pytest.approx(0.1, abs=0.03)
    assert found[3] == pytest.approx(0.9, abs=0.03)


def test_a_session_keeps_its_version(three: PrefixStore) -> None:
    three.set_weights(OURS, "t", {"1": 1, "2": 1, "3": 1})
    first = {i: three.resolve(OURS, "t", f"s{i}").version for i in range(30)}
    assert set(first.values()) == {1, 2, 3}
    assert {i: three.resolve(OURS, "t", f"s{i}").version for i in range(30)} == first
    assert {three.resolve(OURS, "t").version for _ in range(60)} == {1, 2, 3}
    assert three.resolve(OURS, "t@2", "s0").version == 2


def test_upload_is_stored_only_while_weights_are_set(three: PrefixStore) -> None:
    three.set_weights(OURS, "t", {"1": 1, "2": 3})
    stored = publish(three, "t", 4).task
    assert (stored.active, stored.weights, len(stored.versions)) == (2, ((1, 1), (2, 3)), 4)
    live = publish(three, "t", 5, activate=True).task
    assert (live.active, live.previous, live.weights) == (5, 3, ())
    assert publish(three, "t", 6).task.active == 6


def test_activation_clears_the_weights(three: PrefixStore) -> None:
    for version in ("3", "2"):
        three.set_weights(OURS, "t", {"3": 1, "1": 1})
        task = three.activate(OURS, "t", version)
        assert (task.active, task.weights) == (int(version), ())
    assert [version.version for version in task.in_service] == [2]


def test_active_version_without_a_weight_gives_way_to_the_heaviest(three: PrefixStore) -> None:
    task = three.set_weights(OURS, "t", {"1": 5, "2": 5})
    assert (task.active, task.rollback_version) == (1, 3)
    assert [version.version for version in task.in_service] == [1, 2]


def test_version_with_a_weight_cannot_be_deleted(three: PrefixStore) -> None:
    three.set_weights(OURS, "t", {"3": 9, "1": 1})
    with pytest.raises(ConflictError, match="version 1 of task 't' has a weight"):
        three.delete_version(OURS, "t", "1")
    with pytest.raises(ConflictError, match="version 3 of task 't' is active"):
        three.delete_version(OURS, "t", "3")


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        ({}, InvalidChangeError, "1 to 4 versions, got 0"),
        ({str(i): 1 for i in range(1, 6)}, InvalidChangeError, "1 to 4 versions, got 5"),
        ({"1": 0}, InvalidChangeError, "1 to 1000000, got 0 for '1'"),
        ({"1": -1}, InvalidChangeError, "got -1"),
        ({"1": True}, InvalidChangeError, "got True"),
        ({"1": 1.5}, InvalidChangeError, "got 1.5"),
        ({"1": 10**7}, InvalidChangeError, "got 10000000"),
        ({"4": 1}, NotFoundError, "no version '4' of task 't'"),
        ({"x": 1}, NotFoundError, "no version 'x' of task 't'"),
        ({"2": 1, "previous": 1}, InvalidChangeError, "each version once, got 2, previous"),
    ],
)
def test_wrong_weights_are_refused(
    three: PrefixStore, weights: dict[str, int], error: type[Exception], text: str
) -> None:
    before = three.get_task(OURS, "t")
    with pytest.raises(error, match=text):
        three.set_weights(OURS, "t", weights)
    assert three.get_task(OURS, "t") == before


def test_quarantined_version_gives_way_to_the_previous(three: PrefixStore) -> None:
    task = three.quarantine(OURS, "t", 3)
    assert (task.active, task.previous, task.quarantined) == (2, 3, (3,))
    assert three.quarantine(OURS, "t", 3) is None
    assert three.get_task(OURS, "t") == task
    assert three.resolve(OURS, "t@3").version == 3
    stays = three.quarantine(OURS, "t", 2)
    assert (stays.active, stays.quarantined) == (2, (3, 2))
    back = three.activate(OURS, "t", "previous")
    assert (back.active, back.previous, back.quarantined) == (3, 2, (2,))
    three.delete_version(OURS, "t", "2")
    assert three.get_task(OURS, "t").quarantined == ()
    with pytest.raises(NotFoundError):
        three.quarantine(OURS, "t", 2)


def test_quarantined_version_gives_its_weight_to_the_remaining(three: PrefixStore) -> None:
    three.set_weights(OURS, "t", {"3": 8, "2": 1, "1": 1})
    task = three.quarantine(OURS, "t", 3)
    assert (task.weights, task.active, task.quarantined) == (((1, 1), (2, 1)), 1, (3,))
    task = three.quarantine(OURS, "t", 1)
    assert (task.weights, task.active) == (((2, 1),), 2)
    assert shares(three, 20) == {2: 1.0}
    last = three.quarantine(OURS, "t", 2)
    assert (last.weights, last.active) == (((2, 1),), 2)
    again = three.set_weights(OURS, "t", {"2": 1, "3": 1})
    assert again.quarantined == (1,)


def test_only_version_stays_in_quarantine(store: PrefixStore) -> None:
    publish(store, "t", 1)
    assert store.quarantine(OURS, "t", 1).active == 1
    assert store.resolve(OURS, "t").version == 1


def test_disabled_task_answers_nobody_until_it_is_enabled(three: PrefixStore) -> None:
    assert three.set_enabled(OURS, "t", False).is_disabled
    for ref in ("t", "t@1", "t@previous"):
        with pytest.raises(DisabledError, match="task 't' is disabled"):
            three.resolve(OURS, ref)
    assert three.get_version(OURS, "t", "1").version == 1
    assert publish(three, "t", 4).task.is_disabled
    assert not three.set_enabled(OURS, "t", True).is_disabled
    assert three.resolve(OURS, "t").version == 4
