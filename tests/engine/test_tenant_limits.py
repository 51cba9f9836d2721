"""What one tenant may take: rows at once and places in the queue, changed while it runs; and what the engine's asyncio
side says by tenant."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client import generate_latest

from server.engine.async_engine import AsyncEngine
from server.engine.errors import (
    OverloadedError,
    PromptTooLongError,
    QueueTimeoutError,
    TenantQueueFullError,
    TenantQueueTimeoutError,
)
from server.engine.queue_places import QueuePlaces
from server.engine.request_stream import RequestStream
from server.engine.sampling_params import SamplingParams
from server.engine.tenant_policy import TenantPolicy
from server.metrics import Metrics
from tests.engine.tenants import NUM_VIRTUAL, Tenants, tiny_llama
from tests.tiny_models import letter_tokenizer

MAX_ROWS = 4
TEXT = "\u0105\u0106"  # 2 tokens of the letter tokenizer
PARAMS = SamplingParams(max_new_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def tenants(model: Any) -> Tenants:
    return Tenants(model, max_rows=MAX_ROWS)


def test_a_tenant_has_no_more_rows_than_it_may_and_others_have_the_rest(tenants: Tenants) -> None:
    """Rows of an ensemble count each."""
    tenants.engine.policies.set("a", TenantPolicy(max_rows=2))
    for i in range(10):
        tenants.add("a", *([()] * (1 + i % 2)))
    while tenants.is_backlogged("a"):
        tenants.step()
        assert tenants.engine.scheduler.num_running_rows <= 2
    tenants.add_many("a", 20)
    tenants.add_many("b", 60)
    while tenants.is_backlogged("a", "b"):
        outputs = tenants.step()
        ran = [*tenants.engine.scheduler.running, *(output.sequence for output in outputs if output.is_last)]
        assert sum(len(sequence.rows) for sequence in ran) == MAX_ROWS
        assert sum(len(sequence.rows) for sequence in ran if sequence.tenant_id == "a") <= 2
    tenants.finish()


def test_who_waits_too_long_for_its_own_rows_is_told_so(tenants: Tenants) -> None:
    tenants.engine.policies.set("a", TenantPolicy(max_rows=1))
    for name in "aab":
        tenants.add(name, num_out=40)
    tenants.step()
    tenants.add_many("b", MAX_ROWS)
    tenants.engine.scheduler.max_queue_s = 0.0
    errors = {output.sequence.tenant_id: output.error for output in tenants.step() if output.error is not None}
    assert {name: type(error) for name, error in errors.items()} == {
        "a": TenantQueueTimeoutError,
        "b": QueueTimeoutError,
    }
    assert "of those that the tenant may have" in str(errors["a"])
    tenants.engine.scheduler.max_queue_s = 30.0
    tenants.finish()


def test_who_had_few_rows_by_its_limit_has_saved_no_turns_up(tenants: Tenants) -> None:
    """As soon as it may it runs beside the others, not instead of them."""
    tenants.engine.policies.set("a", TenantPolicy(max_rows=1))
    tenants.add_many("a", 60)
    tenants.add_many("b", 120)
    while tenants.served("b") < 1000:
        tenants.step()
    before = {name: tenants.served(name) for name in "ab"}
    assert before["b"] > before["a"] + 400
    tenants.engine.policies.set("a", None)
    while tenants.is_backlogged("a", "b") and tenants.served("a") < before["a"] + 400:
        tenants.step()
    assert tenants.served("b") > before["b"] + 250
    tenants.finish()


def test_an_ensemble_of_more_rows_than_its_tenant_may_have_is_refused(tenants: Tenants) -> None:
    """At once, or when it waits and the limit is lowered."""
    waits = tenants.add("a", (), (), ())
    beside = [tenants.add("a"), tenants.add("b", (), (), ())]
    tenants.engine.policies.set("a", TenantPolicy(max_rows=2))
    with pytest.raises(PromptTooLongError, match="<= 2 members, got 3"):
        tenants.engine.check_room(waits)
    failed = [output for output in tenants.step() if output.error is not None]
    assert [output.sequence for output in failed] == [waits]
    assert isinstance(failed[0].error, PromptTooLongError)
    tenants.finish()
    assert [sequence.num_generated_tokens for sequence in beside] == [4, 4]


def test_what_was_preempted_goes_on_under_a_lower_limit(model: Any) -> None:
    tight = Tenants(model, kv_tokens=8 * 16)
    tight.add("b", num_in=30, num_out=40)
    pair = tight.add("a", (), (), num_in=10, num_out=40)
    while not pair.num_preemptions:
        tight.step()
        tight.engine.charge("a", 100)
    tight.engine.policies.set("a", TenantPolicy(max_rows=1))
    tight.finish()
    assert pair.num_generated_tokens == 40


class CountingTokenizer:
    def __init__(self) -> None:
        self._tokenizer = letter_tokenizer()
        self.num_calls = 0

    def __call__(self, prompt: str) -> Any:
        self.num_calls += 1
        return self._tokenizer(prompt)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def with_engine(tenants: Tenants, use: Callable[[AsyncEngine, CountingTokenizer, Metrics], Awaitable[None]]) -> None:
    """`use` starts it when it will."""

    async def run() -> None:
        tokenizer, metrics = CountingTokenizer(), Metrics()
        engine = AsyncEngine(tenants.engine, tokenizer, metrics, max_queued=8, max_queued_tokens=100)
        await use(engine, tokenizer, metrics)
        await engine.shutdown()

    asyncio.run(run())


def test_a_tenant_with_all_its_queue_places_is_refused_before_tokenising(tenants: Tenants) -> None:
    async def use(engine: AsyncEngine, tokenizer: CountingTokenizer, metrics: Metrics) -> None:
        engine.set_policy("a", TenantPolicy(max_queued=2))
        streams = [await engine.generate([5, 6], PARAMS, ((),), f"a{i}", "a") for i in range(2)]
        with pytest.raises(TenantQueueFullError, match="has 2 requests queued, its limit is 2") as caught:
            await engine.generate(TEXT, PARAMS, ((),), "a2", "a")
        assert caught.value.retry_after_s >= 1
        assert tokenizer.num_calls == 0
        assert b'request_rejected_total{reason="tenant_queue_full"} 1.0' in generate_latest(metrics.registry)
        streams.append(await engine.generate(TEXT, PARAMS, ((),), "b0", "b"))
        assert tokenizer.num_calls == 1
        engine.set_policy("a", None)
        streams += [await engine.generate([5, 6], PARAMS, ((),), f"a{i}", "a") for i in range(3, 8)]
        engine.set_policy("a", TenantPolicy(max_queued=1))
        with pytest.raises(TenantQueueFullError):
            await engine.generate([5, 6], PARAMS, ((),), "a8", "a")
        await engine.start()
        for stream in streams:
            assert len(await stream.rest()) == 3
        again = await engine.generate([5, 6], PARAMS, ((),), "a9", "a")
        assert len(await again.rest()) == 3

    with_engine(tenants, use)


def test_who_no_longer_waits_for_the_engine_does_not_stop_it(tenants: Tenants) -> None:
    async def use(engine: AsyncEngine, tokenizer: CountingTokenizer, metrics: Metrics) -> None:
        await engine.start()
        tenants.engine.charge = lambda *_: time.sleep(0.2)  # type: ignore[method-assign]  # as a long step would
        ref = tenants.ref("given-up", "a")
        checked = asyncio.create_task(engine.check(tenants.load(ref), "a"))
        await asyncio.sleep(0.05)
        pinned = asyncio.create_task(engine.pin(ref))
        await asyncio.sleep(0.05)
        pinned.cancel()
        await asyncio.wait([checked, pinned])
        assert not await asyncio.wait_for(engine.evict(ref.key), 5)
        assert engine.is_healthy
        assert engine.stats().num_pinned == 0

    with_engine(tenants, use)


def test_a_pin_given_up_while_the_engine_makes_it_is_not_left(tenants: Tenants) -> None:
    async def use(engine: AsyncEngine, tokenizer: CountingTokenizer, metrics: Metrics) -> None:
        await engine.start()
        ref = tenants.ref("given-up", "a")
        is_pinned, may_go_on, pin = threading.Event(), threading.Event(), tenants.engine.residents.pin

        def pin_slowly(key: str) -> None:
            pin(key)
            is_pinned.set()
            assert may_go_on.wait(30)

        tenants.engine.residents.pin = pin_slowly  # type: ignore[method-assign]
        pinning = asyncio.create_task(engine.pin(ref))
        await asyncio.to_thread(is_pinned.wait, 30)
        pinning.cancel()
        await asyncio.wait([pinning])
        may_go_on.set()
        await engine.preload((ref,))
        assert await engine.evict(ref.key)
        assert engine.stats().num_pinned == 0

    with_engine(tenants, use)


def test_a_call_that_fails_does_not_end_the_engine(tenants: Tenants) -> None:
    async def use(engine: AsyncEngine, tokenizer: CountingTokenizer, metrics: Metrics) -> None:
        abort = tenants.engine.abort

        def abort_and_fail(request_id: str) -> None:
            abort(request_id)
            if request_id == "a0":
                raise MemoryError

        tenants.engine.abort = abort_and_fail  # type: ignore[method-assign]
        (await engine.generate([5, 6], PARAMS, ((),), "a0", "a")).abort()
        await engine.start()
        again = await engine.generate([5, 6], PARAMS, ((),), "a1", "a")
        assert len(await again.rest()) == 3
        assert engine.is_healthy

    with_engine(tenants, use)


def test_one_giant_prompt_does_not_keep_others_out(tenants: Tenants) -> None:
    """The first request may be of any size; it is refused when it has been tokenised, which takes a while."""
    places = QueuePlaces(tenants.engine.policies, Metrics(), max_queued=8, max_queued_tokens=100)
    places.take("giant", "loud", 1_000_000)
    with pytest.raises(OverloadedError, match="its limit is 100 tokens"):
        places.take("more", "loud", 1)
    places.take("small", "quiet", 50)
    places.leave("giant")
    places.take("other", "loud", 50)


def test_a_full_queue_has_places_for_those_who_have_less_than_their_part(tenants: Tenants) -> None:
    """Up to it, in requests and in tokens, and none for those who have theirs."""

    async def use(engine: AsyncEngine, tokenizer: CountingTokenizer, metrics: Metrics) -> None:
        async def ask(tenant_id: str, num_tokens: int = 2) -> None:
            made.append(await engine.generate([5] * num_tokens, PARAMS, ((),), f"r{len(made)}", tenant_id))

        made: list[RequestStream] = []
        for _ in range(8):
            await ask("loud")
        # Of 8 places in 1 to 5 parts; there are 16 at most.
        for tenant_id, num_places in (("loud", 0), ("quiet", 4), ("third", 2), ("fourth", 2), ("late", 0)):
            for _ in range(num_places):
                engine.check_queue(tenant_id)
                await ask(tenant_id)
            with pytest.raises(OverloadedError, match="the queue is full, its limit is 8 requests"):
                engine.check_queue(tenant_id)
            with pytest.raises(OverloadedError, match="the queue is full, its limit is 8 requests"):
                await ask(tenant_id)
        await engine.start()
        for stream in made:
            await stream.rest()
        made.clear()
        await ask("loud", 90)
        with pytest.raises(OverloadedError, match="the queue is full, its limit is 100 tokens"):
            await ask("loud", 20)
        await ask("quiet", 50)
        with pytest.raises(OverloadedError, match="the queue is full, its limit is 100 tokens"):
            await ask("quiet", 1)

    with_engine(tenants, use)


def test_trials_and_preloads_are_charged_and_keys_name_what_is_resident(tenants: Tenants) -> None:
    a, b = tenants.ref("same", "a"), tenants.ref("same", "b")

    async def use(engine: AsyncEngine, tokenizer: CountingTokenizer, metrics: Metrics) -> None:
        await engine.start()
        await engine.check(tenants.load(a), "uploads")
        await engine.preload((a,))
        assert [engine.residency(ref.key) for ref in (a, b)] == ["resident", "cold"]
        await engine.preload((b,), "asks")
        assert engine.resident_sizes() == {"a/same": tenants.block_bytes, "b/same": tenants.block_bytes}
        assert engine.resident_bytes(b.key) == tenants.block_bytes
        served = engine.stats().served_tokens
        assert served == {"uploads": NUM_VIRTUAL + 2, "a": NUM_VIRTUAL, "asks": NUM_VIRTUAL}
        assert await engine.evict(a.key)
        assert engine.resident_sizes() == {"b/same": tenants.block_bytes}

    with_engine(tenants, use)


def test_dashboards_see_thrash_and_skew(model: Any) -> None:
    tenants = Tenants(model, prefix_blocks=1)
    for name in ("one", "two", "one"):
        tenants.answer("a", (tenants.ref(name, "a"),))

    async def use(engine: AsyncEngine, tokenizer: CountingTokenizer, metrics: Metrics) -> None:
        metrics.watch(engine.stats, dict)
        for name in "ab":
            tenants.add(name)
        tenants.engine.charge("b", 30)
        page = generate_latest(metrics.registry)
        assert b"prefixserve_prefix_thrash_total 1.0" in page
        assert b"prefixserve_service_skew 30.0" in page
        tenants.finish()

    with_engine(tenants, use)
