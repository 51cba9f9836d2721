"""Tenants, audit, usage and buckets: the same on both registries."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prefix_store.audit import AuditEntry, Author
from prefix_store.blobs import Blobs
from prefix_store.errors import ConflictError
from prefix_store.registry import Registry
from prefix_store.store import PrefixStore
from prefix_store.tenants import SCOPES, Key, Limits, Tenant, new_key
from prefix_store.usage import Usage
from tests.prefix_store.small_prefixes import OURS, SHAPE, THEIRS, Open, make_tenants, soft


def entry(tenant: str, subject: str) -> AuditEntry:
    return AuditEntry(tenant, "operator", "publish", subject, 1.5, "request")


def used(day: str, tenant: str = OURS, task: str = "t", version: int = 1, **counts: float) -> Usage:
    return Usage(day, tenant, task, version, **counts)  # type: ignore[arg-type]


class TestTenants:
    def test_tenant_is_kept_with_its_keys_and_limits(self, open_registry: Open) -> None:
        registry = open_registry()
        _, key = new_key(SCOPES, 1.5, tasks=["films-*"], expires_at_s=7.25)
        made = registry.update_tenant(OURS, lambda _: Tenant(OURS, Limits(weight=2.5, max_rows=3), (key,), True))
        assert made is not None
        assert (made.keys, made.limits.weight, made.is_suspended, made.revision) == ((key,), 2.5, True, 1)
        assert registry.get_tenant(OURS) == open_registry().get_tenant(OURS) == made
        assert registry.get_tenant(THEIRS) is None
        other = registry.update_tenant(THEIRS, lambda _: Tenant(THEIRS))
        assert registry.list_tenants() == [made, other]

    def test_revision_rises_with_every_change_of_any_tenant(self, open_registry: Open) -> None:
        registry = open_registry()
        poll = open_registry().tenants_revision
        seen = [poll()]
        for name in (OURS, THEIRS):
            registry.update_tenant(name, lambda _, name=name: Tenant(name))  # type: ignore[misc]
            seen.append(poll())
        registry.update_tenant(OURS, lambda tenant: tenant and replace(tenant, is_suspended=True))
        seen.append(poll())
        assert registry.update_tenant(OURS, lambda tenant: tenant) == registry.get_tenant(OURS)
        assert registry.update_tenant("nobody", lambda tenant: tenant) is None
        assert poll() == seen[-1]
        assert registry.update_tenant(OURS, lambda _: None) is None
        seen.append(poll())
        again = registry.update_tenant(OURS, lambda _: Tenant(OURS))
        assert seen == sorted(set(seen))
        assert poll() > seen[-1]
        assert again is not None
        assert again.revision == 1

    def test_change_that_raises_leaves_everything_as_it_was(self, registry: Registry) -> None:
        made = registry.update_tenant(OURS, lambda _: Tenant(OURS))

        def refuse(tenant: Tenant | None) -> Tenant | None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            registry.update_tenant(OURS, refuse, lambda _: [entry(OURS, "t")])
        assert registry.list_audit(None, 9, None) == []
        assert registry.get_tenant(OURS) == made
        assert registry.tenants_revision() == 1

    def test_changes_at_once_are_all_kept(self, open_registry: Open) -> None:
        registries = [open_registry() for _ in range(3)]
        registries[0].update_tenant(OURS, lambda _: Tenant(OURS))

        def add_keys(registry: Registry, first: int) -> None:
            for i in range(first, 30, 3):
                key = Key(str(i), "0" * 64, SCOPES, 0.0)
                registry.update_tenant(OURS, lambda tenant, key=key: tenant and tenant.with_key(key, 1.0))

        threads = [threading.Thread(target=add_keys, args=(each, i)) for i, each in enumerate(registries)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = registries[0].get_tenant(OURS)
        assert found is not None
        assert sorted(int(key.id) for key in found.keys) == list(range(30))
        assert registries[1].tenants_revision() == 31


class TestAudit:
    def test_entries_come_newest_first_by_tenant_and_page(self, open_registry: Open) -> None:
        registry = open_registry()
        made = [registry.append_audit(entry((OURS, THEIRS)[i % 2], f"t{i}")) for i in range(12)]
        assert [each.number for each in made] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6], "each tenant's are counted"
        other = open_registry()
        everything = [replace(each, number=i + 1) for i, each in enumerate(made)][::-1]
        assert other.list_audit(None, 100, None) == everything
        assert other.list_audit(OURS, 3, None) == [made[10], made[8], made[6]]
        assert other.list_audit(OURS, 3, made[6].number) == [made[4], made[2], made[0]]
        assert other.list_audit(None, 2, 5) == everything[8:10]
        assert other.list_audit("nobody", 3, None) == []

    def test_a_change_and_its_entry_are_one(self, open_registry: Open, tmp_path: Path) -> None:
        registry, by = open_registry(), Author("key-1", "request-1")
        make_tenants(registry, OURS, THEIRS)
        store = PrefixStore(registry, Blobs(tmp_path / "blobs"), SHAPE)
        for seed in (1, 2, 2):
            store.publish(OURS, "t", soft(seed), base="name-match", by=by)
        store.activate(OURS, "t", "previous", by=by)
        store.set_weights(OURS, "t", {"2": 30, "1": 70}, by=by)
        store.quarantine(OURS, "t", 2)
        assert store.quarantine(OURS, "t", 2) is None
        store.share(OURS, "t", [THEIRS, OURS], by=by)
        store.set_pinned(OURS, "t", True, by=by)
        store.set_pinned(OURS, "t", True, by=by)
        store.set_enabled(OURS, "t", False, by=by)
        store.publish(OURS, "other", soft(3), base="name-match")
        with pytest.raises(ConflictError):
            store.delete_version(OURS, "t", "1", by=by)
        store.delete_version(OURS, "t", "2", by=by)
        store.delete_task(OURS, "t", by=by)
        found = registry.list_audit(OURS, 100, None)[::-1]
        assert [each.number for each in found] == list(range(1, 14))
        assert [(each.actor, each.request_id, each.action, each.subject) for each in found] == [
            ("key-1", "request-1", "publish", "t@1"),
            ("key-1", "request-1", "publish", "t@2"),
            ("key-1", "request-1", "publish-known", "t@2"),
            ("key-1", "request-1", "activate", "t@1"),
            ("key-1", "request-1", "activate", "t@1:70,2:30"),
            ("server", "", "quarantine", "t@2"),
            ("key-1", "request-1", "share", f"t with {THEIRS}"),
            ("key-1", "request-1", "pin", "t"),
            ("key-1", "request-1", "pin", "t"),
            ("key-1", "request-1", "disable", "t"),
            ("server", "", "publish", "other@1"),
            ("key-1", "request-1", "delete", "t@2"),
            ("key-1", "request-1", "delete", "t"),
        ]
        created = by.entry(OURS, "create-tenant", OURS)
        registry.update_tenant(OURS, lambda _: Tenant(OURS), lambda _: [created])
        registry.delete_tenant(OURS, by=by)
        assert [each.action for each in open_registry().list_audit(OURS, 2, None)] == ["delete-tenant", "create-tenant"]
        assert registry.list_audit(THEIRS, 9, None) == []

    def test_a_deletion_of_a_tenant_that_is_cut_off_has_its_entry(
        self, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry.update_tenant(OURS, lambda _: Tenant(OURS))

        def cut(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(registry, "change", cut)
            with pytest.raises(KeyboardInterrupt):
                registry.delete_tenant(OURS, by=Author("key-1"))
        left = registry.get_tenant(OURS)
        assert left is not None
        assert left.is_suspended
        (told,) = registry.list_audit(OURS, 9, None)
        assert (told.actor, told.action) == ("key-1", "delete-tenant")

    def test_the_same_twice_is_two_entries(self, registry: Registry) -> None:
        for _ in range(2):
            registry.append_audit(entry(OURS, "t"))
        assert [each.number for each in registry.list_audit(OURS, 9, None)] == [2, 1]


class TestUsage:
    def test_rows_are_summed(self, open_registry: Open) -> None:
        registry = open_registry()
        row = used("2026-11-25", num_requests=2, generated_tokens=2**40, resident_byte_s=0.5)
        registry.add_usage([row, used("2026-11-25", task="", version=0, num_requests=1)], "a")
        open_registry().add_usage([row, row], "b")
        registry.add_usage([], "c")
        assert registry.usage(OURS, "2026-11-25", "2026-11-25") == [
            used("2026-11-25", task="", version=0, num_requests=1),
            used("2026-11-25", num_requests=6, generated_tokens=3 * 2**40, resident_byte_s=1.5),
        ]

    def test_batch_that_is_given_again_counts_once(self, open_registry: Open) -> None:
        registry = open_registry()
        row = used("2026-11-25", num_requests=2)
        for each in (registry, open_registry(), registry):
            each.add_usage([row], "a")
        assert registry.usage(OURS, row.day, row.day) == [row]
        registry.add_usage([row], "b")
        assert registry.usage(OURS, row.day, row.day) == [row + row]

    def test_rows_are_found_by_tenant_and_days_in_order(self, registry: Registry) -> None:
        rows = [
            used(day, tenant, task, version, num_requests=1)
            for day in ("2026-11-24", "2026-11-25", "2026-11-26")
            for tenant in (OURS, THEIRS)
            for task, version in (("owner/t", 2), ("owner/t", 10), ("u", 1))
        ]
        registry.add_usage(reversed(rows), "a")
        assert registry.usage(None, "2026-11-24", "2026-11-26") == rows
        assert registry.usage(None, "2026-11-25", "2026-11-25") == rows[6:12]
        assert registry.usage(THEIRS, "2026-11-25", "2027-01-01") == rows[9:12] + rows[15:]
        assert registry.usage(None, "2026-11-27", "2026-12-31") == []


class TestBuckets:
    def test_bucket_empties_and_refills(self, registry: Registry) -> None:
        def take(amount: float, bucket: str = "requests", **more: bool) -> tuple[bool, float, float]:
            return registry.take(OURS, bucket, amount, 5, 10, time.monotonic(), **more)

        assert take(4)[0]
        taken, remaining, wait_s = take(3)
        assert not taken
        assert 1 <= remaining < 3
        assert 0 < wait_s <= 0.2
        time.sleep(wait_s)
        assert take(3)[0]
        assert take(5, "tokens") == (True, 0, 0)
        assert registry.take(THEIRS, "tokens", 5, 5, 10, time.monotonic()).taken

    def test_debt_is_made_good_first_and_what_is_given_back_counts(self, registry: Registry) -> None:
        def take(amount: float, may_owe: bool = False) -> tuple[bool, float, float]:
            return registry.take(OURS, "b", amount, 10, 0.001, time.monotonic(), may_owe=may_owe)

        assert take(25, may_owe=True)[:2] == (True, 0)
        taken, remaining, wait_s = take(1)
        assert (taken, remaining) == (False, 0)
        assert wait_s == pytest.approx(16_000, rel=0.01)
        assert take(-7)[:2] == (True, 0)
        assert take(-10)[1] == pytest.approx(2, abs=0.1)
        assert take(-100)[1] == 10

    def test_amount_that_never_fits_waits_for_ever(self, registry: Registry) -> None:
        assert registry.take(OURS, "b", 11, 10, 1, time.monotonic()) == (False, 10, math.inf)
        assert registry.take(OURS, "b", 10, 10, 0, time.monotonic()).taken
        assert registry.take(OURS, "b", 1, 10, 0, time.monotonic()).wait_s == math.inf

    def test_lower_capacity_counts_at_once(self, registry: Registry) -> None:
        assert registry.take(OURS, "b", 0, 100, 1, time.monotonic()).remaining == 100
        assert registry.take(OURS, "b", 3, 2, 1, time.monotonic()) == (False, 2, math.inf)

    @pytest.mark.parametrize("step_s", [-30 * 86400, -3600, 3600, 30 * 86400])
    def test_a_callers_clock_that_steps_gives_at_most_a_full_bucket_and_takes_nothing(
        self, registry: Registry, step_s: int
    ) -> None:
        def take(amount: float, now: float) -> tuple[bool, float, float]:
            return registry.take(OURS, "b", amount, 10, 0.001, now)

        assert take(6, 5e6)[0]
        taken, remaining, _ = take(0, 5e6 + step_s)
        assert taken
        assert 4 <= remaining <= 10
        assert take(4, 5e6 + step_s)[0], "it holds at least what it held"
        assert take(0, 5e6)[1] <= 10
