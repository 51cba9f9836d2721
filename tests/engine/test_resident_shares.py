"""Whose prefixes stay in device memory: shares of tenants, limits, keys of their own. Prefixes take one block each."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest

from server.engine import recent_evictions, resident_prefixes, resident_shares
from server.engine.errors import PinnedRoomError, PrefixFaultError, PrefixLoadError, TenantPinnedError
from server.engine.kv_blocks import BLOCK_SIZE, BlockAllocator
from server.engine.resident_prefix import ResidentPrefix
from server.engine.resident_prefixes import ResidentPrefixes
from server.engine.resident_shares import ResidentShares
from server.engine.sequence import Layout, PrefixRef
from server.engine.tenant_policy import TenantPolicies, TenantPolicy
from tests.engine.tenants import LateLoads, Tenants, tiny_llama


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def refs_of(tenants: Tenants, tenant_id: str, count: int) -> list[PrefixRef]:
    return [tenants.ref(f"{tenant_id}{i}", tenant_id) for i in range(count)]


def use(tenants: Tenants, *refs: PrefixRef) -> None:
    """One after another, each by its owner."""
    for ref in refs:
        tenants.answer(ref.tenant_id, (ref,), num_out=1)


def test_a_tenant_that_churns_leaves_the_prefixes_of_a_quiet_one(model: Any) -> None:
    tenants = Tenants(model, prefix_blocks=10)
    quiet, loud = refs_of(tenants, "quiet", 5), refs_of(tenants, "loud", 50)
    use(tenants, *quiet, *loud)
    assert tenants.residents(quiet) == [ref.digest for ref in quiet]
    assert tenants.residents(loud) == [ref.digest for ref in loud[-5:]]
    assert tenants.engine.residents.counts.num_evictions == 45


def test_one_tenant_loses_what_it_used_longest_ago(model: Any) -> None:
    tenants = Tenants(model, prefix_blocks=4)
    a = refs_of(tenants, "a", 7)
    use(tenants, *a[:4], a[0], a[4], a[5])
    assert tenants.residents(a) == ["a0", "a3", "a4", "a5"]


def test_who_is_below_its_share_gets_room_and_who_is_at_it_makes_its_own(model: Any) -> None:
    """One alone may fill the pool; what it has above its share goes when another comes."""
    tenants = Tenants(model, prefix_blocks=8)
    a, b = refs_of(tenants, "a", 8), refs_of(tenants, "b", 6)
    use(tenants, *a, *b[:4])
    assert tenants.residents(a) == ["a4", "a5", "a6", "a7"]
    use(tenants, *b[4:])
    assert tenants.residents(a) == ["a4", "a5", "a6", "a7"]
    assert tenants.residents(b) == ["b2", "b3", "b4", "b5"]


def test_shares_are_by_weight(model: Any) -> None:
    tenants = Tenants(model, prefix_blocks=8)
    tenants.engine.policies.set("b", TenantPolicy(weight=3))
    a, b = refs_of(tenants, "a", 8), refs_of(tenants, "b", 8)
    use(tenants, *a, *b)
    assert (len(tenants.residents(a)), len(tenants.residents(b))) == (2, 6)


def test_of_those_above_their_shares_the_one_that_adds_gives_way_to_one_that_has_less(model: Any) -> None:
    """Each of 5 tenants has a share of 2 blocks."""
    tenants = Tenants(model, prefix_blocks=10)
    large, small = refs_of(tenants, "large", 3), [tenants.ref(name, name) for name in "bcd"]
    loud = refs_of(tenants, "loud", 20)
    use(tenants, *large, *small, *loud)
    assert tenants.residents(large) == ["large0", "large1", "large2"]
    assert tenants.residents(small) == ["b", "c", "d"]
    assert len(tenants.residents(loud)) == 4


def test_prefixes_of_tenants_that_ask_for_none_go_first(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before older ones of a tenant that is above its share."""
    monkeypatch.setattr(resident_shares, "ACTIVE_S", 0.2)
    tenants = Tenants(model, prefix_blocks=4)
    a, b = refs_of(tenants, "a", 4), refs_of(tenants, "b", 1)
    use(tenants, *a[:2], *b)
    time.sleep(0.3)
    use(tenants, *a[2:4])
    assert tenants.residents([*a, *b]) == ["a0", "a1", "a2", "a3"]


def test_a_prefix_counts_for_its_owner_whoever_uses_it(model: Any) -> None:
    tenants = Tenants(model, prefix_blocks=4)
    shared, own = refs_of(tenants, "owner", 3), refs_of(tenants, "reader", 2)
    for ref in (*shared, own[0], shared[1], shared[2], own[1]):
        tenants.answer("reader", (ref,), num_out=1)
    assert tenants.residents(shared) == ["owner1", "owner2"]
    assert tenants.residents(own) == ["reader0", "reader1"]
    assert tenants.engine.residents.counts.num_loads == 5  # once for all who use it


def test_a_request_that_needs_more_than_its_tenants_share_is_served(model: Any) -> None:
    """By what the others used longest ago, and from then on by its tenant's own."""
    tenants = Tenants(model, prefix_blocks=8)
    small = [ref for name in "abc" for ref in refs_of(tenants, name, 2)]
    use(tenants, *small)
    large = [tenants.ref(f"large{i}", "d", num_tokens=4 * BLOCK_SIZE) for i in range(5)]
    use(tenants, *large)
    assert tenants.residents(small) == ["b0", "b1", "c0", "c1"]
    assert tenants.residents(large) == ["large4"]


@pytest.mark.parametrize(("prefix_blocks", "num_own", "num_tokens"), [(2, 0, 5), (4, 2, 3 * BLOCK_SIZE)])
def test_prefixes_always_in_use_do_not_keep_a_tenant_from_its_share(
    model: Any, prefix_blocks: int, num_own: int, num_tokens: int
) -> None:
    """No row ever leaves one without another that has it. The tenant may have prefixes that will not be enough."""
    tenants = Tenants(model, prefix_blocks=prefix_blocks)
    use(tenants, *refs_of(tenants, "quiet", num_own))
    hot = refs_of(tenants, "loud", 2)
    for i in range(20):
        tenants.add("loud", (hot[i % 2],))
    for _ in range(3):
        tenants.step()
    quiet = tenants.add("quiet", (tenants.ref("cold", "quiet", num_tokens),))
    num_steps = 0
    while quiet.finish_reason is None:
        for ref in hot:
            tenants.add("loud", (ref,))
        tenants.step()
        num_steps += 1
        assert num_steps < 14, "rows of 4 tokens that ran before it, and its own"
    tenants.finish()
    assert all(sequence.num_generated_tokens == 4 for sequence in tenants.started if sequence.tenant_id == "loud")


@pytest.mark.parametrize("limit", [None, 2])
def test_a_tenants_prefixes_always_in_use_do_not_keep_its_others_out(
    model: Any, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tenant that has the pool alone, or all that it may have of it. They may for a while."""
    tenants = Tenants(model, prefix_blocks=2 if limit is None else 10)
    tenants.engine.policies.set("a", TenantPolicy(max_resident_bytes=limit and limit * tenants.block_bytes))
    *hot, cold = refs_of(tenants, "a", 3)
    for i in range(20):
        tenants.add("a", (hot[i % 2],))
    tenants.step()
    waits = tenants.add("a", (cold,))

    def steps_until_it_ends(max_steps: int) -> int:
        for num_steps in range(max_steps):
            for ref in hot:
                tenants.add("a", (ref,))
            tenants.step()
            if waits.finish_reason is not None:
                return num_steps
        return max_steps

    monkeypatch.setattr(resident_prefixes, "PATIENCE_S", 1e9)
    assert steps_until_it_ends(30) == 30
    monkeypatch.setattr(resident_prefixes, "PATIENCE_S", 0.0)
    assert steps_until_it_ends(20) < 20, "rows of 4 tokens that ran before it, and its own"
    tenants.finish()
    assert all(sequence.num_generated_tokens == 4 for sequence in tenants.started)


def test_who_waits_for_its_own_prefixes_does_not_keep_others_from_loading(model: Any) -> None:
    """`a`, whose turn it is, has more than its share in use."""
    tenants = Tenants(model, prefix_blocks=5)
    a, b = refs_of(tenants, "a", 3), refs_of(tenants, "b", 2)
    use(tenants, b[0])
    running = [tenants.add("a", (ref,), num_out=30) for ref in a]
    tenants.step()
    tenants.engine.charge("b", 1000)
    waits = tenants.add("a", (tenants.ref("large", "a", num_tokens=2 * BLOCK_SIZE),))
    behind = tenants.add("b", (b[1],))
    while behind.finish_reason is None:
        tenants.step()
    assert not any(sequence.finish_reason for sequence in running)
    assert not waits.rows[0].residents
    tenants.finish()
    assert waits.num_generated_tokens == 4


@pytest.mark.parametrize("kind", ["kv", "soft"])
@pytest.mark.parametrize("ahead", [0, 1, 3, 7])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_two_tenants_whose_prefixes_do_not_fit_together_both_start(
    model: Any, kind: str, ahead: int, num_blocks: int
) -> None:
    """A load is charged when it ends, so that just then it is the other's turn."""
    tenants = Tenants(model, prefix_blocks=num_blocks, max_step_tokens=16)
    num_tokens = num_blocks * BLOCK_SIZE - 5
    tenants.engine.charge("b", ahead)
    both = [tenants.add(name, (tenants.ref(name, name, num_tokens, kind=kind),)) for name in "ab"]
    tenants.finish(200)
    assert [sequence.num_generated_tokens for sequence in both] == [4, 4]
    assert tenants.engine.residents.counts.num_loads <= 4


def test_who_waits_for_a_prefix_that_leaves_does_not_keep_others_from_loading(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`a`, whose turn it is, claims its own prefix, which `b` wants too."""
    monkeypatch.setattr(resident_prefixes, "PATIENCE_S", 0.0)
    tenants = Tenants(model, prefix_blocks=10)
    tenants.engine.policies.set("a", TenantPolicy(max_resident_bytes=tenants.block_bytes))
    a0, a1 = refs_of(tenants, "a", 2)
    running = tenants.add("d", (a0,), num_out=60)
    tenants.step()
    for tenant_id, num_tokens in (("b", 100), ("c", 200)):
        tenants.engine.charge(tenant_id, num_tokens)
    others = [tenants.add("a", (a1,)), tenants.add("b", (a0,))]
    behind = tenants.add("c", (tenants.ref("c0", "c"),))
    while behind.finish_reason is None:
        tenants.step()
        assert running.finish_reason is None
    tenants.finish()
    assert all(sequence.num_generated_tokens == 4 for sequence in others)


def test_a_tenants_limit_evicts_its_own_and_waits_for_them(model: Any) -> None:
    tenants = Tenants(model, prefix_blocks=10)
    tenants.engine.policies.set("a", TenantPolicy(max_resident_bytes=2 * tenants.block_bytes + 1))
    a, b = refs_of(tenants, "a", 4), refs_of(tenants, "b", 3)
    use(tenants, *b, *a[:3])
    assert tenants.residents([*a, *b]) == ["a1", "a2", "b0", "b1", "b2"]
    running = [tenants.add("a", (ref,), num_out=6) for ref in a[1:3]]
    tenants.step()
    waits = tenants.add("a", (a[3],))
    while not any(sequence.finish_reason for sequence in running):
        assert not waits.rows[0].residents
        tenants.step()
    tenants.finish()
    assert waits.num_generated_tokens == 4
    tenants.engine.policies.set("a", None)
    use(tenants, *a)
    assert tenants.residents([*a, *b]) == ["a0", "a1", "a2", "a3", "b0", "b1", "b2"]


def test_a_request_beyond_its_tenants_limit_fails_with_the_reason(model: Any) -> None:
    tenants = Tenants(model, prefix_blocks=10)
    limit = 2 * tenants.block_bytes
    tenants.engine.policies.set("a", TenantPolicy(max_resident_bytes=limit))
    a = refs_of(tenants, "a", 3)
    tenants.add("a", tuple(a))
    (failed,) = tenants.step()
    assert isinstance(failed.error, PrefixFaultError)
    assert "more than their tenant may have" in str(failed.error)
    assert tenants.engine.residents.preload(a[:2])
    for ref in a[:2]:
        tenants.engine.residents.pin(ref.key)
    for asked_by, kind in (("a", TenantPinnedError), ("b", PinnedRoomError)):
        tenants.add(asked_by, (a[2],))
        (failed,) = tenants.step()
        assert type(failed.error) is kind
        assert "more than their tenant's pinned ones leave" in str(failed.error)


def test_equal_content_of_two_tenants_is_two_prefixes(model: Any) -> None:
    """The second one's first use is as cold as any, and what becomes of one the other does not notice."""
    tenants = Tenants(model)
    a, b = tenants.ref("same", "a"), tenants.ref("same", "b")
    assert (a.key, b.key, tenants.ref("same").key) == ("a/same", "b/same", "same")
    prompt = [3 + 7 * i % 90 for i in range(20)]
    first = tenants.answer("a", (a,), prompt=prompt)
    second = tenants.answer("b", (b,), prompt=prompt)
    counts = tenants.engine.residents.counts
    assert (counts.num_misses, counts.num_loads, counts.num_hits) == (2, 2, 0)
    assert second.num_cached_tokens == 0
    assert first.output_token_ids == second.output_token_ids
    assert tenants.engine.residents.sizes == {"a/same": 1, "b/same": 1}
    assert tenants.engine.residents.evict(a.key)
    assert tenants.residents([a, b]) == ["same"]
    tenants.engine.residents.pin(a.key)
    assert tenants.engine.residents.evict(b.key)


def test_a_load_that_failed_for_one_tenant_is_tried_for_another(model: Any) -> None:
    tenants = Tenants(model)
    good = tenants.ref("same", "b")
    bad = tenants.ref("same", "a", num_tokens=6, separator=1)  # a layout that no load gives
    tenants.add("a", (bad,))
    tenants.step()
    (failed,) = tenants.step()
    assert isinstance(failed.error, PrefixLoadError)
    assert "prefix same could not" in str(failed.error)
    tenants.answer("b", (good,))


def test_loads_of_what_was_evicted_lately_are_thrash(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tenants = Tenants(model, prefix_blocks=2)
    a = refs_of(tenants, "a", 3)
    use(tenants, *a)
    counts = tenants.engine.residents.counts
    assert (counts.num_evictions, counts.num_thrash) == (1, 0)
    use(tenants, a[0], a[1])
    assert counts.num_thrash == 2
    assert tenants.engine.residents.evict(a[0].key)  # not for want of room
    use(tenants, a[0])
    assert counts.num_thrash == 2
    monkeypatch.setattr(recent_evictions, "MAX_REMEMBERED", 0)
    use(tenants, a[2])  # forgotten
    assert (counts.num_evictions, counts.num_thrash) == (5, 2)
    monkeypatch.setattr(recent_evictions, "MAX_REMEMBERED", 1)
    monkeypatch.setattr(recent_evictions, "THRASH_S", 0.0)
    use(tenants, a[1], a[0])  # long ago
    assert (counts.num_evictions, counts.num_thrash) == (7, 2)


def test_files_are_loaded_in_turns(model: Any) -> None:
    """Not all that one tenant asked for before what another does."""
    late = LateLoads()
    tenants = Tenants(model, executor=late)
    loud, quiet = refs_of(tenants, "loud", 10), refs_of(tenants, "quiet", 1)
    for ref in loud:
        tenants.add("loud", (ref,))
    tenants.step()
    late.run(4)
    tenants.add("quiet", (quiet[0],))
    tenants.step()
    late.run(1)
    tenants.step()
    late.run(1)
    tenants.step()
    states = [tenants.engine.residents.get(ref.key).state for ref in (*loud, *quiet)]
    assert states == [*["ready"] * 5, *["loading"] * 5, "ready"]
    late.run()
    tenants.finish()


def test_soft_prompts_are_computed_in_turns(model: Any) -> None:
    """Each of one tenant's takes two steps; one token of another's is enough for it to be in front."""
    tenants = Tenants(model, max_step_tokens=16)
    loud = [tenants.add("loud", (tenants.ref(f"p{i}", num_tokens=32, kind="soft"),)) for i in range(6)]
    for _ in range(3):
        tenants.step()
    quiet = tenants.add("quiet", (tenants.ref("q", kind="soft"),))
    tenants.finish()
    assert tenants.started.index(quiet) <= 2
    assert len(tenants.started) == 1 + len(loud)


class Pool:
    """Residents without a model, whose loads end at once."""

    def __init__(self, num_blocks: int, policies: TenantPolicies) -> None:
        self.allocator = BlockAllocator(1, num_blocks)
        self._loads: list[ResidentPrefix] = []
        self.residents = ResidentPrefixes(
            self.allocator,
            lambda layout: layout.num_decoder_tokens // BLOCK_SIZE,
            self._loads.append,
            ResidentShares(num_blocks, 1, policies),
        )

    def preload(self, *refs: PrefixRef) -> bool:
        is_there = self.residents.preload(refs)
        while self._loads:
            self.residents.finish_load(self._loads.pop(), None)
        self.residents.check_integrity()
        return is_there

    def num_used(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for key, num_blocks in self.residents.sizes.items():
            found[key.partition("/")[0]] += num_blocks
        return found


def test_nobody_within_its_share_ever_loses_or_waits_for_what_others_have_above_theirs() -> None:
    """4 tenants of different weights, 3,000 loads, some of which are held for a while."""
    choose = random.Random(5)
    policies = TenantPolicies()
    weights = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.5}
    for name, weight in weights.items():
        policies.set(name, TenantPolicy(weight=weight))
    pool = Pool(60, policies)
    share = {name: 60 * weight / 5 for name, weight in weights.items()}
    refs = {
        name: [
            PrefixRef(f"{i}", Layout(num_decoder_tokens=BLOCK_SIZE * choose.randrange(1, 5)), name) for i in range(30)
        ]
        for name in weights
    }
    for name in weights:
        assert pool.preload(refs[name][0])  # all are active from here on
    held: list[ResidentPrefix] = []
    num_waits = 0
    for _ in range(3000):
        name = choose.choices("abcd", [1, 1, 1, 10])[0]
        ref = choose.choice(refs[name])
        before = pool.num_used()
        others = [other for other in weights if other != name]
        if not pool.preload(ref):
            num_waits += 1
            num_held = Counter({r.ref.key: len(r.block_table) for r in held})
            idle = {o: before[o] - sum(n for key, n in num_held.items() if key.startswith(o)) for o in others}
            above = sum(max(0.0, min(idle[o], before[o] - share[o])) for o in others)
            needed = ref.layout.num_decoder_tokens // BLOCK_SIZE
            assert before[name] + needed > share[name] or needed > pool.allocator.num_free + above
            pool.residents.release(held.pop(choose.randrange(len(held))))
            continue
        after = pool.num_used()
        for other in others:  # above its share it may lose down to it, and the rest of a prefix
            assert after[other] == before[other] or (before[other] > share[other] and after[other] > share[other] - 4)
        if choose.random() < 0.5:
            (resident,) = pool.residents.acquire([ref])
            held.append(resident)
        if len(held) > 12:
            pool.residents.release(held.pop(choose.randrange(len(held))))
    assert num_waits
    assert pool.residents.counts.num_evictions > 300
