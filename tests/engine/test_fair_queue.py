"""Turns of tenants by the tokens that they were served, weighted: virtual token counters, on a tiny Llama."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from server.engine import fair_queue
from server.engine.fair_queue import INPUT_WEIGHT, OUTPUT_WEIGHT
from server.engine.sequence import Composition, Sequence
from server.engine.tenant_policy import TenantPolicy
from tests.engine.tenants import NUM_VIRTUAL, LateLoads, Tenants, tiny_llama

MAX_ROWS, MAX_IN, MAX_OUT = 4, 12, 8
# The running rows hold no more than M tokens when they end, each a prompt and an answer.
M = MAX_ROWS * (MAX_IN + MAX_OUT)
BOUND = 2 * max(INPUT_WEIGHT * MAX_IN, OUTPUT_WEIGHT * M)
KINDS = [("a", "kv"), ("b", "soft"), ("a", "kv"), ("c", "kv"), ("b", "soft"), ("c", "soft")]  # owners of prefixes
Members = tuple[Composition, ...]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def tenants(model: Any) -> Tenants:
    return Tenants(model, max_rows=MAX_ROWS)


def differences(tenants: Tenants, one: str, other: str) -> Iterator[float]:
    """While both are backlogged, how much more service `one` has had from now on, by weight, after every step."""

    def difference() -> float:
        served = [tenants.served(name) / tenants.engine.policies.of(name).weight for name in (one, other)]
        return served[0] - served[1]

    start = difference()
    while tenants.is_backlogged(one, other):
        tenants.step()
        yield difference() - start


def spread(found: Iterator[float]) -> float:
    """The largest difference that builds up between any two moments."""
    values = [0.0, *found]
    return max(values) - min(values)


@pytest.mark.parametrize("weight", [1, 3])
def test_backlogged_tenants_are_served_by_weight_within_the_bound(tenants: Tenants, weight: int) -> None:
    """Theorem 4.4 of the paper. In the order of arrival all of `early` would come before `late`."""
    tenants.engine.policies.set("late", TenantPolicy(weight=weight))
    tenants.add_many("early", 60)
    tenants.add_many("late", 60 * weight)
    assert spread(differences(tenants, "early", "late")) <= BOUND
    assert tenants.served("early") > BOUND
    assert abs(tenants.served("late") / tenants.served("early") - weight) < 0.2 * weight


def test_three_tenants_with_lengths_of_their_own_are_served_alike(tenants: Tenants) -> None:
    """`a` asks much and `c` wants long answers."""
    for _ in range(60):
        tenants.add("a", num_in=MAX_IN, num_out=1)
        tenants.add("b", num_in=MAX_IN, num_out=MAX_OUT)
        tenants.add("c", num_in=1, num_out=MAX_OUT)
    while tenants.is_backlogged("a", "b", "c"):
        tenants.step()
        served = [tenants.served(name) for name in "abc"]
        assert max(served) - min(served) <= BOUND
    assert tenants.served("a") > 2 * BOUND


def test_a_loud_tenant_delays_a_quiet_one_by_the_running_sequences_only(tenants: Tenants) -> None:
    """One sends 50 times what the other does."""
    tenants.add_many("loud", 50)
    for _ in range(3):
        for _ in range(4):
            tenants.step()
        tenants.add_many("loud", 50)
        quiet = tenants.add("quiet")
        num_started = len(tenants.started)
        while quiet not in tenants.started:
            tenants.step()
        assert tenants.started[num_started] is quiet
        while quiet.finish_reason is None:
            tenants.step()


def test_who_was_idle_has_saved_nothing_up(tenants: Tenants) -> None:
    tenants.answer("idle")
    tenants.add_many("busy", 150)
    while tenants.served("busy") < 1.5 * BOUND:
        tenants.step()
    tenants.add_many("idle", 100)
    assert spread(differences(tenants, "busy", "idle")) <= BOUND
    assert tenants.served("idle") > BOUND


@pytest.mark.parametrize("order", [("busy", "idle"), ("idle", "busy")])
def test_where_nobody_waited_the_last_who_did_sets_the_level(tenants: Tenants, order: tuple[str, str]) -> None:
    tenants.answer("idle")
    tenants.add_many("busy", 100)
    tenants.finish()
    assert tenants.served("busy") > 1.5 * BOUND
    for name in order:
        tenants.add_many(name, 60)
    assert spread(differences(tenants, "busy", "idle")) <= BOUND


def test_places_are_never_left_empty_while_somebody_waits(tenants: Tenants) -> None:
    """Whoever waits: one alone, both, or the one that has had more."""
    tenants.add_many("a", 40)
    num_steps = 0
    while tenants.engine.scheduler.waiting:
        if num_steps == 10:
            tenants.add_many("b", 10)
        num_ended = sum(output.is_last for output in tenants.step())
        assert tenants.engine.scheduler.num_running_rows + num_ended == MAX_ROWS
        num_steps += 1
    assert tenants.served("a") > tenants.served("b") > 0


def test_a_tenant_that_waits_for_its_prefix_stops_nobody(model: Any) -> None:
    late = LateLoads()
    tenants = Tenants(model, executor=late)
    waits = tenants.add("a", (tenants.ref("cold", "a"),))
    others = [tenants.add("b") for _ in range(3)]
    while not all(sequence.finish_reason for sequence in others):
        assert waits.started_s is None
        tenants.step()
    late.run()
    tenants.finish()
    assert waits.num_generated_tokens == 4


@pytest.mark.parametrize("num_rows", [1, 3])
def test_each_row_is_charged_what_it_reads_and_twice_what_it_generates(tenants: Tenants, num_rows: int) -> None:
    tenants.answer("a", *([()] * num_rows), num_in=7, num_out=3)
    assert tenants.served("a") == num_rows * (7 + 2 * 3)


def test_cached_tokens_are_free(tenants: Tenants) -> None:
    prompt = [3 + 7 * i % 90 for i in range(40)]
    tenants.answer("a", prompt=prompt, num_out=1)
    assert tenants.served("a") == 40 + 2
    again = tenants.answer("a", prompt=prompt, num_out=1)
    assert again.num_cached_tokens == 32
    assert tenants.served("a") == 40 + 2 + 8 + 2


@pytest.mark.parametrize("kind", ["kv", "soft"])
def test_a_load_is_charged_to_the_tenant_that_asked_first(tenants: Tenants, kind: str) -> None:
    """Not to the owner, and not again."""
    ref = tenants.ref("p", "owner", kind=kind)
    for name in ("first", "second"):
        tenants.answer(name, (ref,), num_in=6, num_out=1)
    assert [tenants.served(name) for name in ("owner", "first", "second")] == [0, NUM_VIRTUAL + 6 + 2, 6 + 2]
    other = tenants.ref("q", "owner", kind=kind)
    assert tenants.engine.residents.preload([other], asked_by="owner")
    tenants.step()
    assert tenants.served("owner") == NUM_VIRTUAL


def test_an_infix_of_embeddings_is_charged_with_the_rows_that_compute_it(tenants: Tenants) -> None:
    ref = tenants.ref("i", kind="soft", placement="infix")
    tenants.answer("a", (ref,), (ref,), num_in=6, num_out=1)
    assert tenants.served("a") == NUM_VIRTUAL + 2 * (6 + NUM_VIRTUAL) + 2 * 2


def test_a_trial_forward_counts_before_the_next_request_of_its_tenant(tenants: Tenants) -> None:
    """Of one who has nothing waiting: it is not lost when the tenant is lifted."""
    tenants.add_many("busy", 60)
    while tenants.served("busy") < BOUND:
        tenants.step()
    tenants.engine.charge("uploads", 40)
    assert tenants.served("uploads") == 40
    first = tenants.add("uploads")
    before = tenants.served("busy")
    while first not in tenants.started:
        tenants.step()
    assert tenants.served("busy") >= before + 40


def test_recomputation_after_a_preemption_is_not_charged(model: Any) -> None:
    tight = Tenants(model, kv_tokens=6 * 16)
    sequences = [tight.add(name, num_in=20, num_out=30) for name in "ab"]
    tight.finish()
    assert tight.engine.scheduler.num_preemptions
    assert [tight.served(name) for name in "ab"] == [20 + 2 * 30] * 2
    assert {sequence.num_generated_tokens for sequence in sequences} == {30}


def test_the_youngest_of_the_tenant_that_had_the_most_makes_way(model: Any) -> None:
    tight = Tenants(model, kv_tokens=6 * 16)
    tight.answer("much", num_in=12, num_out=60)
    old = tight.add("much", num_in=12, num_out=40)
    tight.step()
    middle = tight.add("much", num_in=12, num_out=40)
    tight.step()
    tight.engine.policies.set("little", TenantPolicy(weight=100))
    youngest = tight.add("little", num_in=12, num_out=40)
    tight.step()
    assert tight.engine.scheduler.running == [old, middle, youngest]
    while not tight.engine.scheduler.num_preemptions:
        tight.step()
    assert [s.num_preemptions for s in (old, middle, youngest)] == [0, 1, 0]
    while youngest.finish_reason is None:
        tight.step()
    assert youngest.num_preemptions == 0
    tight.finish()


def test_who_lacks_memory_is_not_overtaken_by_small_ones_of_other_tenants(model: Any) -> None:
    tight = Tenants(model, kv_tokens=8 * 16)
    tight.add_many("small", 20)
    for _ in range(3):
        tight.step()
    large = tight.add("large", num_in=100, num_out=4)
    num_started = len(tight.started)
    while large not in tight.started:
        tight.add_many("small", 1)
        tight.step()
    assert tight.started[num_started] is large
    tight.finish()


def test_one_tenant_is_served_in_the_order_of_arrival(model: Any) -> None:
    """And its youngest makes way, in a pool that preempts."""
    for kv_tokens in (4096, 8 * 16):
        tenants = Tenants(model, kv_tokens=kv_tokens)
        sequences = tenants.add_many("a", 40, max_in=30, max_out=30)
        tenants.finish()
        assert tenants.started == sequences
        assert (tenants.engine.scheduler.num_preemptions > 0) == (kv_tokens < 4096)
        assert sequences[0].num_preemptions == 0


def test_tokens_do_not_depend_on_turns_weights_or_limits(model: Any) -> None:
    """In a pool that preempts and evicts, with prefixes, ensembles and tenants of every kind."""

    def ask(tenants: Tenants) -> Iterator[Sequence]:
        refs = [tenants.ref(f"p{i}", name, kind=kind) for i, (name, kind) in enumerate(KINDS)]
        for i in range(36):
            own = (refs[i % 6],)
            members: list[Members] = [(own,), ((),), (own, ()), ((refs[0], refs[2]),)]
            yield tenants.add(KINDS[i % 6][0], *members[i // 6 % 4], num_in=1 + 5 * i % 37, num_out=24)

    alone = Tenants(model)
    expected = []
    for sequence in ask(alone):
        alone.finish()
        expected.append(sequence)
    mixed = Tenants(model, kv_tokens=8 * 16, prefix_blocks=4)
    mixed.engine.policies.set("a", TenantPolicy(weight=5, max_rows=2, max_resident_bytes=mixed.block_bytes * 2))
    mixed.engine.policies.set("b", TenantPolicy(weight=0.5))
    found = list(ask(mixed))
    mixed.finish()
    assert [s.output_token_ids for s in found] == [s.output_token_ids for s in expected]
    assert mixed.started != found, "it was served in the order of arrival"
    assert mixed.engine.scheduler.num_preemptions
    assert mixed.engine.residents.counts.num_evictions
    assert len({token for s in found for token in s.output_token_ids}) >= 8


def test_who_was_charged_for_longest_is_forgotten_but_nobody_who_waits(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_queue, "MAX_ACCOUNTS", 8)
    tenants.add_many("waits", 10)
    for i in range(50):
        tenants.engine.charge(f"t{i}", 1)
    served = tenants.engine.scheduler.waiting.service
    assert len(served) == 8
    assert {"waits", *(f"t{i}" for i in range(43, 50))} == served.keys()
    tenants.finish()


def test_the_skew_is_that_of_the_tenants_that_wait(tenants: Tenants) -> None:
    assert tenants.engine.scheduler.waiting.skew == 0
    tenants.answer("gone", num_in=12, num_out=8)
    tenants.add_many("a", 20)
    assert tenants.engine.scheduler.waiting.skew == 0
    for _ in range(5):
        tenants.step()
    tenants.add_many("b", 5)
    assert tenants.engine.scheduler.waiting.skew == 0  # lifted
    tenants.engine.charge("a", 7)
    assert tenants.engine.scheduler.waiting.skew == 7
    tenants.finish()
    assert tenants.engine.scheduler.waiting.skew == 0
