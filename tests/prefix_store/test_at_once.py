"""Two changes at once: each is decided on what is there when it is written. The same on both registries."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from prefix_store.audit import Author
from prefix_store.blobs import Blobs
from prefix_store.errors import (
    ConflictError,
    InvalidChangeError,
    KeyEndedError,
    NotFoundError,
    PreconditionFailedError,
    PrefixStoreError,
    QuotaError,
    SuspendedError,
)
from prefix_store.registry import Registry
from prefix_store.store import PrefixStore
from prefix_store.task import Precondition
from prefix_store.tenants import MAX_KEYS, SCOPES, Key, Limits, Tenant, new_key
from tests.prefix_store.small_prefixes import OURS, SHAPE, THEIRS, Open, ensemble, make_tenants, publish, soft

NUM_ROUNDS = 12
OPERATOR = Author("operator")
Change = Callable[[], object]


def at_once(*changes: Change) -> list[PrefixStoreError | None]:
    """What each raised, when all were let go together."""
    start = threading.Barrier(len(changes))
    outcomes: list[PrefixStoreError | None] = [None] * len(changes)

    def run(i: int, change: Change) -> None:
        start.wait()
        try:
            change()
        except PrefixStoreError as error:
            outcomes[i] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(changes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def kinds(outcomes: list[PrefixStoreError | None]) -> list[str]:
    return sorted("done" if error is None else type(error).__name__ for error in outcomes)


def keys(num: int) -> tuple[Key, ...]:
    return tuple(new_key(SCOPES, 1.5)[1] for _ in range(num))


def put(registry: Registry, name: str, *held: Key) -> None:
    registry.update_tenant(name, lambda _: Tenant(name, Limits(max_pinned_bytes=None), held))


def end(registry: Registry, name: str, key: Key, **more: bool) -> None:
    registry.update_tenant(name, lambda found: found and found.without_key(key.id), **more)  # type: ignore[arg-type]


def num_keys(registry: Registry) -> int:
    return sum(len(tenant.keys) for tenant in registry.list_tenants())


STOPS: dict[str, Callable[[Tenant, Key], Tenant]] = {
    "ended": lambda tenant, key: tenant.without_key(key.id),
    "suspended": lambda tenant, _: replace(tenant, is_suspended=True),
    "expired": lambda tenant, key: tenant.with_expiry([key.id], 2.0),
}


def stop(registry: Registry, name: str, key: Key, how: str) -> None:
    def stopped(found: Tenant | None) -> Tenant | None:
        return found and STOPS[how](found, key)

    registry.update_tenant(name, stopped, lambda _: [OPERATOR.entry(name, "stop", key.id)])


def go_on(store: PrefixStore, registry: Registry, name: str, by: Author) -> None:
    """Change tasks and the tenant itself until that is refused."""
    for i in range(2000):
        store.share(name, "a", [] if i % 2 else [THEIRS], by=by)
        limits = Limits(weight=1 + i)

        def weighed(found: Tenant | None, limits: Limits = limits) -> Tenant | None:
            return found and replace(found, limits=limits)

        registry.update_tenant(name, weighed, lambda _: [by.entry(name, "set-limits", name)], by=by)
        time.sleep(0.001)  # SQLite gives a lock to whoever asks first after a pause of its own


@pytest.fixture
def both(open_registry: Open) -> tuple[Registry, Registry]:
    """The registry as two processes have it."""
    return open_registry(), open_registry()


@pytest.fixture
def stores(both: tuple[Registry, Registry], tmp_path: Path) -> tuple[PrefixStore, PrefixStore]:
    return PrefixStore(both[0], Blobs(tmp_path / "blobs"), SHAPE), PrefixStore(
        both[1], Blobs(tmp_path / "blobs"), SHAPE
    )


class TestKeys:
    def test_the_last_two_keys_of_a_tenant_do_not_end_together(self, both: tuple[Registry, Registry]) -> None:
        for _ in range(NUM_ROUNDS):
            held = keys(2)
            put(both[0], OURS, *held)
            ends = [partial(end, each, OURS, key, leaves_a_key=True) for each, key in zip(both, held, strict=True)]
            assert kinds(at_once(*ends)) == ["ConflictError", "done"]
            assert num_keys(both[0]) == 1

    def test_the_last_keys_of_two_tenants_do_not_end_together(self, both: tuple[Registry, Registry]) -> None:
        for _ in range(NUM_ROUNDS):
            held = keys(2)
            ends = []
            for each, name, key in zip(both, (OURS, THEIRS), held, strict=True):
                put(each, name, key)
                ends.append(partial(end, each, name, key, leaves_a_key=True))
            assert kinds(at_once(*ends)) == ["ConflictError", "done"]
            assert num_keys(both[0]) == 1

    def test_a_tenant_does_not_go_together_with_the_others_last_key(self, both: tuple[Registry, Registry]) -> None:
        for _ in range(NUM_ROUNDS):
            mine, theirs = keys(2)
            put(both[0], OURS, mine)
            put(both[0], THEIRS, theirs)
            outcomes = at_once(
                partial(both[0].delete_tenant, OURS, by=OPERATOR, leaves_a_key=True),
                partial(end, both[1], THEIRS, theirs, leaves_a_key=True),
            )
            assert kinds(outcomes) == ["ConflictError", "done"]
            assert num_keys(both[0]) == 1

    def test_only_one_makes_the_first_key(self, both: tuple[Registry, Registry]) -> None:
        nobody = Author("local", needs_no_keys=True)
        for _ in range(NUM_ROUNDS):
            put(both[0], OURS)

            def make(registry: Registry, key: Key) -> None:
                registry.update_tenant(OURS, lambda found: found and found.with_key(key, 2.0), by=nobody)

            first, second = keys(2)
            outcomes = at_once(partial(make, both[0], first), partial(make, both[1], second))
            assert kinds(outcomes) == ["KeyEndedError", "done"]

    def test_keys_at_once_stay_within_their_number(self, both: tuple[Registry, Registry]) -> None:
        held = keys(MAX_KEYS - 1)
        for _ in range(NUM_ROUNDS):
            put(both[0], OURS, *held)

            def make(registry: Registry, key: Key) -> None:
                registry.update_tenant(OURS, lambda found: found and found.with_key(key, 2.0))

            outcomes = at_once(*(partial(make, each, key) for each, key in zip(both, keys(2), strict=True)))
            assert kinds(outcomes) == ["ConflictError", "done"]

    @pytest.mark.parametrize("how", sorted(STOPS))
    def test_a_key_changes_nothing_once_it_has_ended(
        self, both: tuple[Registry, Registry], stores: tuple[PrefixStore, PrefixStore], how: str
    ) -> None:
        """The audit has all changes in their order: none by the key comes after its end."""
        make_tenants(both[0], THEIRS)
        for i in range(NUM_ROUNDS):
            name = f"t{i}"
            (key,) = keys(1)
            put(both[0], name, key)
            publish(stores[0], "a", 1, tenant=name)
            outcomes = at_once(
                partial(stop, both[0], name, key, how),
                partial(go_on, stores[1], both[1], name, Author(key.id, holder=name)),
            )
            assert isinstance(outcomes[1], SuspendedError if how == "suspended" else KeyEndedError)
            found = both[0].list_audit(name, 1000, None)
            (place,) = (j for j, entry in enumerate(found) if entry.action == "stop")
            assert [entry.actor for entry in found[:place]] == []


class TestTasks:
    def test_uploads_at_once_stay_within_the_quota(
        self, both: tuple[Registry, Registry], stores: tuple[PrefixStore, PrefixStore]
    ) -> None:
        size = publish(stores[0], "t", tenant=THEIRS).version.num_bytes
        for limits in (Limits(max_prefixes=1), Limits(max_stored_bytes=size)):
            make_tenants(both[0], OURS, limits=limits)
            for i in range(NUM_ROUNDS):
                uploads = [partial(publish, each, f"t{j}", i, within_limits=True) for j, each in enumerate(stores)]
                assert kinds(at_once(*uploads)) == ["QuotaError", "done"]
                for task in stores[0].list_tasks(OURS):
                    stores[0].delete_task(OURS, task.name)

    def test_an_upload_is_within_the_limits_that_hold_when_it_is_written(
        self, both: tuple[Registry, Registry], stores: tuple[PrefixStore, PrefixStore]
    ) -> None:
        for i in range(NUM_ROUNDS):
            name = f"t{i}"
            make_tenants(both[0], name)

            def lower(name: str = name) -> None:
                both[0].update_tenant(
                    name,
                    lambda found: found and replace(found, limits=Limits(max_prefixes=0)),
                    lambda _: [OPERATOR.entry(name, "set-limits", name)],
                )

            def upload(name: str = name) -> None:
                for j in range(400):
                    publish(stores[1], f"a{j}", tenant=name, within_limits=True)

            _, error = at_once(lower, upload)
            assert isinstance(error, QuotaError)
            assert both[0].list_audit(name, 1, None)[0].action == "set-limits", "no upload was written after it"

    def test_nothing_stays_shared_with_a_tenant_that_went(
        self, both: tuple[Registry, Registry], stores: tuple[PrefixStore, PrefixStore]
    ) -> None:
        make_tenants(both[0], OURS)
        publish(stores[0], "t")
        for _ in range(NUM_ROUNDS):
            make_tenants(both[0], THEIRS)
            gone, error = at_once(
                partial(both[0].delete_tenant, THEIRS, by=OPERATOR), partial(stores[1].share, OURS, "t", [THEIRS])
            )
            assert gone is None
            assert error is None or isinstance(error, InvalidChangeError)
            assert stores[0].get_task(OURS, "t").shared_with == ()

    def test_an_upload_and_the_end_of_its_tenant_leave_nothing(
        self, both: tuple[Registry, Registry], stores: tuple[PrefixStore, PrefixStore]
    ) -> None:
        for i in range(NUM_ROUNDS):
            make_tenants(both[0], OURS)
            gone, error = at_once(
                partial(both[0].delete_tenant, OURS, by=OPERATOR),
                partial(publish, stores[1], "t", i, within_limits=True),
            )
            assert gone is None
            assert error is None or isinstance(error, NotFoundError)
            assert (both[0].get_tenant(OURS), stores[0].list_tasks(OURS)) == (None, [])

    def test_pins_at_once_stay_within_their_limit(
        self, both: tuple[Registry, Registry], stores: tuple[PrefixStore, PrefixStore]
    ) -> None:
        for name in ("a", "b"):
            publish(stores[0], name)
        make_tenants(both[0], OURS, limits=Limits(max_pinned_bytes=1))
        for _ in range(NUM_ROUNDS):
            pins = [
                partial(each.set_pinned, OURS, name, True, lambda versions: len(list(versions)))
                for each, name in zip(stores, ("a", "b"), strict=True)
            ]
            assert kinds(at_once(*pins)) == ["QuotaError", "done"]
            for name in ("a", "b"):
                stores[0].set_pinned(OURS, name, False)

    def test_one_of_two_with_the_same_etag_wins(
        self, both: tuple[Registry, Registry], stores: tuple[PrefixStore, PrefixStore]
    ) -> None:
        for seed in (1, 2, 3):
            publish(stores[0], "t", seed)
        for _ in range(NUM_ROUNDS):
            task = stores[0].get_task(OURS, "t")
            others = [str(version.version) for version in task.versions if version.version != task.active]
            seen = Precondition(frozenset([str(task.revision)]))
            changes = [
                partial(each.activate, OURS, "t", number, seen) for each, number in zip(stores, others, strict=True)
            ]
            assert kinds(at_once(*changes)) == ["PreconditionFailedError", "done"]
            new = Precondition(must_be_new=True)
            made = [
                partial(each.publish, OURS, "u", soft(i), base="unverified", precondition=new)
                for i, each in enumerate(stores)
            ]
            assert kinds(at_once(*made)) == [PreconditionFailedError.__name__, "done"]
            stores[0].delete_task(OURS, "u")

    def test_no_ensemble_is_left_without_a_member(
        self, both: tuple[Registry, Registry], stores: tuple[PrefixStore, PrefixStore]
    ) -> None:
        publish(stores[0], "a", 1)
        for i in range(NUM_ROUNDS):
            publish(stores[0], "b", i)
            outcomes = at_once(partial(stores[0].delete_task, OURS, "b"), partial(ensemble, stores[1], "e", "a@1", "b"))
            assert outcomes.count(None) == 1, kinds(outcomes)
            if outcomes[1] is None:
                assert isinstance(outcomes[0], ConflictError)
                stores[0].delete_task(OURS, "e")
                stores[0].delete_task(OURS, "b")
