"""The registry's contract where versions are ensembles, and where several write at once.

One class for every registry: a test that another one fails is the contract broken.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from prefix_store.blobs import Blobs
from prefix_store.draft import Draft
from prefix_store.ensemble import Ensemble, Member
from prefix_store.errors import ConflictError, InvalidArtefactError, NotFoundError, PreconditionFailedError
from prefix_store.prefix import Layout
from prefix_store.registry import Registry
from prefix_store.store import PrefixStore
from prefix_store.task import Precondition
from tests.prefix_store.small_prefixes import AT_ONCE, OURS, SHAPE, THEIRS, Open, add, ensemble, new_version, publish

CONTENTS = (
    Layout("kv", num_decoder_tokens=20),
    Layout("kv", "infix", separator=0, num_decoder_tokens=3),
    Layout("soft", "infix", num_decoder_tokens=4),
    Layout("soft", num_encoder_tokens=9),
    Layout("kv", num_decoder_tokens=1, num_encoder_tokens=2, num_cross_tokens=3),
)


def members_of(store: PrefixStore, ref: str) -> list[str]:
    content = store.resolve(OURS, ref).content
    assert isinstance(content, Ensemble)
    return [str(member) for member in content.members]


def together(*works: threading.Thread) -> None:
    for work in works:
        work.start()
    for work in works:
        work.join()


class TestContract:
    @pytest.mark.parametrize("content", CONTENTS)
    def test_layout_is_kept(self, registry: Registry, content: Layout) -> None:
        made = add(registry, "t", new_version("a" * 64, content)).version
        task = registry.get_task(OURS, "t")
        assert task is not None
        assert task.versions == (made,)
        assert made.content == content
        assert (made.kind, made.num_virtual_tokens) == (content.kind, content.num_virtual_tokens)

    def test_ensemble_is_kept_with_the_layouts_of_its_members(self, registry: Registry) -> None:
        members = []
        for i, content in enumerate(CONTENTS):
            made = add(registry, f"t{i}", new_version(f"{i:064x}", content)).version
            members.append(Member(made.task, made.version, made.digest, made.content))  # type: ignore[arg-type]
        whole = Ensemble(tuple(members), "vote")
        published = add(registry, "e", new_version(whole.digest, whole))
        made = published.version
        task = registry.get_task(OURS, "e")
        assert task is not None
        assert published.is_new
        assert task.versions[0].content == made.content == whole
        assert (made.kind, made.num_virtual_tokens) == ("ensemble", 20 + 3 + 4 + 9 + 3)

    def test_members_are_frozen_when_published(self, store: PrefixStore) -> None:
        for seed in (1, 2):
            publish(store, "a", seed)
            publish(store, "b", 10 + seed)
        store.activate(OURS, "a", "1")
        by_digest = f"b@{store.get_version(OURS, 'b', '2').digest[:12]}"
        made = ensemble(store, "both", "a", "b@1", "b@previous", by_digest)
        assert members_of(store, "both") == ["a@1", "b@1", "b@1", "b@2"]
        before = store.resolve(OURS, "both")
        store.activate(OURS, "a", "2")
        publish(store, "b", 99)
        assert store.resolve(OURS, "both") == before
        assert before.digest == made.version.digest
        assert ensemble(store, "both", "a@1", "b@1", "b@1", "b@2").is_new is False
        assert ensemble(store, "both", "a", "b@1", "b@1", "b@2").version.version == 2

    def test_an_ensemble_is_a_version_like_any_other(self, store: PrefixStore) -> None:
        publish(store, "t", 1)
        publish(store, "u", 2, n=7)
        assert ensemble(store, "t", "t@1", "u").task.active == 2
        assert store.resolve(OURS, "t").num_virtual_tokens == 11
        assert store.activate(OURS, "t", "previous").active == 1
        with pytest.raises(NotFoundError, match="is an ensemble: its members have files"):
            store.file_bytes(store.resolve(OURS, "t@2"))
        digest = store.resolve(OURS, "t@2").digest
        assert store.resolve(OURS, f"t@{digest[:12]}").version == 2
        rule = ensemble(store, "t", "t@1", "u", rule="vote")
        assert (rule.is_new, rule.version.digest != digest) == (True, True)

    def test_member_cannot_be_deleted_and_the_users_are_named(self, store: PrefixStore) -> None:
        publish(store, "a", 1)
        publish(store, "b", 2)
        ensemble(store, "first", "a@1", "b@1")
        ensemble(store, "first", "b@1", "b@1")
        ensemble(store, "second", "a@1", "a@1")
        publish(store, "a", 3)
        with pytest.raises(ConflictError, match=r"version 1 of task 'a' is a member of first@1, second@1; delete that"):
            store.delete_version(OURS, "a", "1")
        with pytest.raises(ConflictError, match=r"version 1 of task 'a' is a member of first@1, second@1"):
            store.delete_task(OURS, "a")
        with pytest.raises(ConflictError, match=r"version 1 of task 'b' is a member of first@1, first@2"):
            store.delete_task(OURS, "b")
        assert len(store.get_task(OURS, "a").versions) == 2
        store.delete_task(OURS, "second")
        store.delete_version(OURS, "first", "1")
        store.delete_version(OURS, "a", "1")
        store.delete_task(OURS, "a")
        with pytest.raises(ConflictError, match=r"is a member of first@2;"):
            store.delete_task(OURS, "b")
        store.delete_task(OURS, "first")
        store.delete_task(OURS, "b")
        assert store.list_tasks(OURS) == []

    def test_version_beside_a_member_can_be_deleted(self, store: PrefixStore) -> None:
        for seed in (1, 2):
            publish(store, "a", seed)
        ensemble(store, "e", "a@2", "a@2")
        assert store.delete_version(OURS, "a", "1").version == 1

    def test_task_goes_with_its_own_ensembles(self, store: PrefixStore) -> None:
        publish(store, "t", 1)
        publish(store, "u", 2)
        ensemble(store, "t", "t@1", "u@1")
        with pytest.raises(ConflictError, match=r"is a member of t@2"):
            store.delete_version(OURS, "t", "1")
        store.delete_task(OURS, "t")
        store.delete_task(OURS, "u")

    def test_members_file_stays_while_the_ensemble_does(self, store: PrefixStore) -> None:
        one = publish(store, "a", 1).version
        ensemble(store, "e", "a@1", "a@1")
        publish(store, "a", 2)
        with pytest.raises(ConflictError):
            store.delete_version(OURS, "a", "1")
        store.sweep(AT_ONCE)
        assert store.has_file(OURS, one.digest)
        store.delete_task(OURS, "e")
        store.delete_version(OURS, "a", "1")
        assert not store.has_file(OURS, one.digest)

    def test_member_that_goes_before_publishing_is_refused(self, store: PrefixStore) -> None:
        publish(store, "a", 1)
        publish(store, "b", 2)
        made = store.make_ensemble(OURS, ["a", "b"], "vote")
        store.delete_task(OURS, "b")
        with pytest.raises(NotFoundError, match="no task 'b'"):
            store.publish_ensemble(OURS, "e", made)
        publish(store, "b", 3)
        with pytest.raises(NotFoundError, match="no version b@1 any more: it was deleted and made anew"):
            store.publish_ensemble(OURS, "e", made)
        assert not store.has_task(OURS, "e")
        assert publish(store, "c", 4).version.version == 1

    def test_wrong_members_are_refused_by_place(self, store: PrefixStore) -> None:
        publish(store, "a", 1)
        publish(store, "theirs", 2, tenant=THEIRS)
        ensemble(store, "e", "a", "a")
        for members, error, text in (
            (["a", "nothing"], InvalidArtefactError, r"members\[1\]: no task 'nothing'"),
            (["theirs", "a"], InvalidArtefactError, r"members\[0\]: no task 'theirs'"),
            (["a@2", "a"], InvalidArtefactError, r"members\[0\]: no version '2'"),
            (["a", "a", "e"], InvalidArtefactError, r"members\[2\]: 'e' is an ensemble itself; name its members"),
            (["a"], InvalidArtefactError, "has 2 to 32 members, got 1"),
            (["a"] * 33, InvalidArtefactError, "has 2 to 32 members, got 33"),
        ):
            with pytest.raises(error, match=text):
                store.make_ensemble(OURS, members, "vote")
        with pytest.raises(InvalidArtefactError, match="rule must be one of mean_probs, vote, got 'sum'"):
            store.make_ensemble(OURS, ["a", "a"], "sum")

    def test_tenants_do_not_hold_each_others_versions(self, store: PrefixStore) -> None:
        for tenant in (OURS, THEIRS):
            publish(store, "a", 1, tenant=tenant)
        ensemble(store, "e", "a", "a", tenant=THEIRS)
        store.delete_task(OURS, "a")
        with pytest.raises(ConflictError):
            store.delete_task(THEIRS, "a")

    def test_delete_and_publish_at_once_leave_no_ensemble_without_members(self, store: PrefixStore) -> None:
        started = threading.Barrier(2)

        def delete() -> None:
            started.wait()
            with suppress(ConflictError):
                store.delete_task(OURS, "a")

        for i in range(20):
            publish(store, "a", i)
            made = store.make_ensemble(OURS, ["a", "a"], "vote")
            thread = threading.Thread(target=delete)
            thread.start()
            started.wait()
            with suppress(NotFoundError):
                store.publish_ensemble(OURS, "e", made)
            thread.join()
            assert store.has_task(OURS, "a") == store.has_task(OURS, "e")
            for task in ("e", "a"):
                if store.has_task(OURS, task):
                    store.delete_task(OURS, task)

    def test_revisions_and_numbers_are_never_used_again(self, store: PrefixStore) -> None:
        seen: list[int] = []
        for _ in range(3):
            seen.append(publish(store, "t", 1).task.revision)
            seen.append(publish(store, "t", 2).task.revision)
            seen.append(store.activate(OURS, "t", "1").revision)
            assert store.activate(OURS, "t", "1").revision == seen[-1]
            seen.append(store.set_pinned(OURS, "t", True).revision)
            assert store.set_pinned(OURS, "t", True).revision == seen[-1]
            store.delete_version(OURS, "t", "2")
            assert publish(store, "t", 2).version.version == 3
            store.delete_task(OURS, "t")
        assert seen == sorted(set(seen))
        assert publish(store, "t", tenant=THEIRS).task.revision == 1

    def test_preconditions_hold(self, store: PrefixStore) -> None:
        revision = publish(store, "t", 1).task.revision
        old = Precondition(frozenset({str(revision)}))
        digest = publish(store, "t", 2).version.digest
        for refused in (
            lambda: store.activate(OURS, "t", "1", old),
            lambda: store.set_weights(OURS, "t", {"1": 1}, old),
            lambda: store.share(OURS, "t", ["*"], old),
            lambda: store.delete_task(OURS, "t", old),
            lambda: store.delete_version(OURS, "t", "1", Precondition(frozenset({digest}))),
        ):
            with pytest.raises(PreconditionFailedError):
                refused()
        now = store.get_task(OURS, "t").revision
        assert store.activate(OURS, "t", "1", Precondition(frozenset({str(now)}))).active == 1

    def test_tasks_are_listed_by_name_and_page(self, store: PrefixStore) -> None:
        names = ["b", "a.b", "a", "a-b", "a_b", "0", "ab"]
        for name in names:
            publish(store, name)
            publish(store, name, tenant=THEIRS)
        listed: list[str] = []
        while page := store.list_tasks(OURS, 2, listed[-1] if listed else ""):
            listed += [task.name for task in page]
        assert listed == sorted(names)
        store.delete_task(OURS, "ab")
        assert [task.name for task in store.list_tasks(OURS)] == sorted(set(names) - {"ab"})

    def test_pinned_tasks_of_all_tenants_are_found(self, store: PrefixStore, registry: Registry) -> None:
        for tenant in (THEIRS, OURS):
            for name in ("b", "a", "c"):
                publish(store, name, tenant=tenant)
                store.set_pinned(tenant, name, name != "c")
        store.set_pinned(OURS, "a", False)
        store.delete_task(THEIRS, "b")
        assert [(task.tenant, task.name) for task in registry.pinned_tasks()] == [(OURS, "b"), (THEIRS, "a")]
        assert [version.task for version in store.pinned_versions()] == ["b", "a"]

    def test_change_that_raises_leaves_everything_as_it_was(self, registry: Registry) -> None:
        before = add(registry, "t", new_version("a" * 64, CONTENTS[0])).task

        def fail(draft: Draft) -> None:
            draft.remove("t")
            draft.record("delete", "t")
            raise ConflictError("no")

        with pytest.raises(ConflictError, match="no"):
            registry.change(OURS, fail)
        assert registry.get_task(OURS, "t") == before
        assert registry.stored(OURS).num_versions == 1
        assert [entry.action for entry in registry.list_audit(None, 9, None)] == ["publish"]

    def test_two_writers_lose_nothing(self, open_registry: Open, tmp_path: Path) -> None:
        stores = [PrefixStore(open_registry(), Blobs(tmp_path / "blobs"), SHAPE) for _ in range(3)]
        found: list[tuple[int, int]] = []

        def write(store: PrefixStore, seeds: Iterable[int]) -> None:
            for seed in seeds:
                made = publish(store, "t", seed)
                found.append((made.version.version, made.task.revision))
                store.set_pinned(OURS, "t", seed % 2 == 0)

        together(*(threading.Thread(target=write, args=(store, range(i, 45, 3))) for i, store in enumerate(stores)))
        numbers, revisions = zip(*sorted(found), strict=True)
        assert numbers == tuple(range(1, 46))
        assert len(set(revisions)) == 45
        assert [version.version for version in stores[0].get_task(OURS, "t").versions] == list(numbers)
        made = [entry for entry in stores[0]._registry.list_audit(OURS, 1000, None) if entry.action == "publish"]
        assert [entry.subject for entry in reversed(made)] == [f"t@{number}" for number in numbers]
        assert stores[0].stored(OURS).num_versions == 45

    def test_file_of_a_version_is_there_whoever_deletes_the_same_content(
        self, open_registry: Open, tmp_path: Path
    ) -> None:
        registries = [open_registry() for _ in range(2)]
        for registry in registries:
            registry.max_upload_s = 60.0  # a sweep leaves the parts of those who write meanwhile
        stores = [PrefixStore(registry, Blobs(tmp_path / "blobs"), SHAPE) for registry in registries]
        missing: list[str] = []

        def churn(store: PrefixStore, task: str) -> None:
            for _ in range(60):
                digest = publish(store, task, seed=7).version.digest
                if not store.has_file(OURS, digest):
                    missing.append(task)
                store.delete_task(OURS, task)

        def sweep(store: PrefixStore) -> None:
            for _ in range(30):
                store.sweep(AT_ONCE)

        together(
            *(threading.Thread(target=churn, args=(stores[i % 2], f"t{i}")) for i in range(4)),
            threading.Thread(target=sweep, args=(stores[1],)),
        )
        assert missing == []
        stores[0].sweep(AT_ONCE)
        assert Blobs(tmp_path / "blobs").digests() == {}
