"""A version goes live only if its base model was matched, or accepted as it is; on every registry."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from prefix_store.documents import read_task, write_task
from prefix_store.errors import BaseMismatchError, InvalidChangeError, UnverifiedBaseError
from prefix_store.registry import Registry
from prefix_store.store import PrefixStore
from prefix_store.task_changes import Published
from tests.prefix_store.small_prefixes import OURS, SHAPE, ensemble, soft
from tests.prefix_store.small_prefixes import publish as publish_named

OTHER = "0" * 64


def publish(
    store: PrefixStore,
    task: str,
    seed: int,
    *,
    base_model: str | None = "/models/other",
    activate: bool | None = None,
    accept_base: bool = False,
    base_fingerprint: str | None = None,
    note: str = "",
) -> Published:
    """As an upload does."""
    prefix = replace(soft(seed), base_model=base_model)
    base = store.match_base(prefix, accept_base, base_fingerprint)
    return store.publish(OURS, task, prefix, base=base, accept_base=accept_base, activate=activate, note=note)


def actions(registry: Registry) -> list[str]:
    return [f"{entry.action} {entry.subject}" for entry in reversed(registry.list_audit(OURS, 100, None))]


@pytest.mark.parametrize("base_model", [None, "/models/other", "other", "~/other", "a/b/c"])
def test_unverified_upload_is_stored_and_not_live(store: PrefixStore, base_model: str | None) -> None:
    made = publish(store, "t", 1, base_model=base_model)
    assert (made.version.base, made.version.claimed_base, made.task.active) == ("unverified", base_model, None)
    assert store.get_task(OURS, "t") == made.task
    publish_named(store, "t", 2)
    assert publish(store, "t", 3).task.active == 2
    assert store.resolve(OURS, "t@3").version == 3


def test_unverified_upload_that_is_to_go_live_stores_nothing(store: PrefixStore) -> None:
    with pytest.raises(UnverifiedBaseError, match=r"names '/models/other'.*base_fingerprint= .*accept_base=1"):
        publish(store, "t", 1, activate=True)
    assert not store.has_task(OURS, "t")
    assert store.stored(OURS).num_versions == 0


@pytest.mark.parametrize("said", [{"accept_base": True}, {"base_fingerprint": SHAPE.fingerprint}])
def test_what_is_said_at_the_upload_lets_it_go_live(store: PrefixStore, said: dict[str, bool | str]) -> None:
    made = publish(store, "t", 1, **said)  # type: ignore[arg-type]
    assert made.task.active == 1
    assert (made.version.base, made.version.is_base_accepted) == (
        ("unverified", True) if "accept_base" in said else ("verified", False)
    )


@pytest.mark.parametrize("said", [{"accept_base": True}, {"base_fingerprint": SHAPE.fingerprint}])
@pytest.mark.parametrize("route", ["activate", "weights", "upload", "upload-live"])
def test_stored_version_goes_live_by_every_route_once_it_is_known(
    registry: Registry, store: PrefixStore, route: str, said: dict[str, bool | str]
) -> None:
    publish_named(store, "t", 1)
    publish(store, "t", 2)
    if route == "activate":
        with pytest.raises(UnverifiedBaseError):
            store.activate(OURS, "t", "2")
        task = store.activate(OURS, "t", "2", **said)  # type: ignore[arg-type]
    elif route == "weights":
        with pytest.raises(UnverifiedBaseError):
            store.set_weights(OURS, "t", {"1": 1, "2": 1})
        task = store.set_weights(OURS, "t", {"1": 1, "2": 1}, **said)  # type: ignore[arg-type]
    else:
        activate = True if route == "upload-live" else None
        made = publish(store, "t", 2, activate=activate, **said)  # type: ignore[arg-type]
        assert (made.is_new, made.version.version) == (False, 2)
        task = made.task
    assert 2 in {version.version for version in task.in_service}
    assert store.get_task(OURS, "t") == task
    found = "accept-base" if "accept_base" in said else "match-base"
    assert actions(registry).count(f"{found} t@2") == 1
    assert store.activate(OURS, "t", "1").active == 1
    assert store.activate(OURS, "t", "2").active == 2


def test_refused_activation_changes_nothing(registry: Registry, store: PrefixStore) -> None:
    publish_named(store, "t", 1)
    publish(store, "t", 2)
    before, told = store.get_task(OURS, "t"), actions(registry)
    for fingerprint in (None, OTHER):
        with pytest.raises((UnverifiedBaseError, BaseMismatchError)):
            store.activate(OURS, "t", "2", base_fingerprint=fingerprint)
        with pytest.raises((UnverifiedBaseError, BaseMismatchError)):
            store.set_weights(OURS, "t", {"1": 9, "2": 1}, base_fingerprint=fingerprint)
    assert (store.get_task(OURS, "t"), actions(registry)) == (before, told)


def test_other_fingerprint_is_a_mismatch_wherever_it_is_said(store: PrefixStore) -> None:
    for base_model in (None, "/models/other", "tiny"):
        with pytest.raises(BaseMismatchError, match="trained for fingerprint 000000000000…, served is ffffffffffff…"):
            publish(store, "t", 1, base_model=base_model, base_fingerprint=OTHER)
    made = publish(store, "t", 1, base_fingerprint=OTHER, accept_base=True)
    assert (made.version.base, made.task.active) == ("mismatch", 1)
    publish(store, "u", 1)
    task = store.activate(OURS, "u", "1", base_fingerprint=OTHER, accept_base=True)
    assert (task.versions[0].base, task.active) == ("mismatch", 1)


def test_later_upload_of_known_content_never_knows_less(store: PrefixStore) -> None:
    publish(store, "t", 1, base_fingerprint=SHAPE.fingerprint)
    again = publish(store, "t", 1)
    assert (again.version.base, again.task.active, again.is_new) == ("verified", 1, False)
    named = publish(store, "u", 2, base_model="tiny")
    assert publish(store, "u", 2, base_model=None, accept_base=True).version == named.version


def test_known_content_that_may_go_live_stays_where_it_is(store: PrefixStore) -> None:
    for seed in (1, 2):
        publish_named(store, "t", seed)
    assert publish(store, "t", 1, base_model="tiny").task.active == 2
    assert publish(store, "t", 1, base_model="tiny", activate=True).task.active == 1


def test_note_of_known_content_is_kept(registry: Registry, store: PrefixStore) -> None:
    publish(store, "t", 1, note="first")
    assert publish(store, "t", 1).version.note == "first"
    again = publish(store, "t", 1, note="second")
    assert store.get_task(OURS, "t") == again.task
    assert again.task.versions[0].note == "second"
    assert actions(registry) == ["publish t@1", "publish-known t@1", "publish-known t@1", "note t@1"]


def test_accepting_a_stored_version_amid_weights_leaves_them(store: PrefixStore) -> None:
    publish_named(store, "t", 1)
    publish(store, "t", 2)
    store.set_weights(OURS, "t", {"1": 1})
    task = publish(store, "t", 2, accept_base=True).task
    assert (task.active, task.weights) == (1, ((1, 1),))


def test_ensemble_of_an_unverified_member_is_not_live(store: PrefixStore) -> None:
    publish_named(store, "good", 1)
    publish(store, "bad", 2)
    made = ensemble(store, "both", "good", "bad@1")
    assert (made.version.base, made.task.active) == ("unverified", None)
    with pytest.raises(UnverifiedBaseError, match="a member's is unverified"):
        store.activate(OURS, "both", "1")
    store.activate(OURS, "bad", "1", accept_base=True)
    assert store.activate(OURS, "both", "1").active == 1
    again = ensemble(store, "again", "bad", "good")
    assert (again.version.base, again.version.is_base_accepted, again.task.active) == ("unverified", True, 1)


def test_ensemble_made_again_of_verified_members_goes_live(store: PrefixStore) -> None:
    publish_named(store, "good", 1)
    publish(store, "bad", 2)
    ensemble(store, "both", "good", "bad@1")
    publish(store, "bad", 2, base_fingerprint=SHAPE.fingerprint)
    again = ensemble(store, "both", "good", "bad@1")
    assert (again.is_new, again.version.base, again.task.active) == (False, "name-match", 1)


def test_versions_that_a_release_before_made_live_stay_so(registry: Registry, store: PrefixStore) -> None:
    """Its documents say nothing of acceptance, nor of what a file claimed."""
    for seed in (1, 2, 3):
        publish(store, "t", seed)
    task = replace(store.get_task(OURS, "t"), active=2, previous=1)
    fields = json.loads(write_task(task))
    del fields["live_before"]
    for version in fields["versions"]:
        del version["claimed_base"], version["is_base_accepted"]
    old = read_task(json.dumps(fields))
    registry.change(OURS, lambda draft: draft.put(old))
    found = store.resolve(OURS, "t")
    assert (found.version, found.base, found.claimed_base) == (2, "unverified", None)
    assert store.activate(OURS, "t", "previous").active == 1
    store.set_weights(OURS, "t", {"1": 9, "2": 1})
    assert store.activate(OURS, "t", "previous").active == 1
    with pytest.raises(UnverifiedBaseError):
        store.activate(OURS, "t", "3")


def test_a_fingerprint_verifies_a_file_and_no_ensemble(store: PrefixStore) -> None:
    publish_named(store, "good", 1)
    publish(store, "bad", 2)
    ensemble(store, "both", "good", "bad@1")
    for change in (
        lambda: store.activate(OURS, "both", "1", base_fingerprint=SHAPE.fingerprint),
        lambda: store.set_weights(OURS, "both", {"1": 1}, base_fingerprint=SHAPE.fingerprint),
    ):
        with pytest.raises(InvalidChangeError, match="an ensemble's members have theirs"):
            change()
    assert store.get_task(OURS, "both").active is None
    store.activate(OURS, "bad", "1", base_fingerprint=SHAPE.fingerprint)
    assert store.activate(OURS, "both", "1").active == 1
