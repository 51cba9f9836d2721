"""Texts that wait to be tokenised: long ones keep no short ones waiting, tenants take turns."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from server.engine.errors import PromptTooLongError
from server.engine.tenant_policy import TenantPolicies
from server.engine.text_lanes import LONG_TEXT, TextLanes


@pytest.fixture
def lanes() -> Iterator[TextLanes]:
    lanes = TextLanes(TenantPolicies())
    yield lanes
    lanes.shutdown()


def test_short_texts_pass_one_that_is_long(lanes: TextLanes) -> None:
    goes_on = threading.Event()
    long = lanes.submit("a", LONG_TEXT + 1, lambda: goes_on.wait(30))
    assert [lanes.submit(tenant, LONG_TEXT, lambda: 5).result(30) for tenant in ("a", "b")] == [5, 5]
    assert not long.done()
    goes_on.set()
    assert long.result(30) is True


@pytest.mark.parametrize("size", [10, LONG_TEXT + 1])
def test_tenants_take_turns_by_what_was_tokenised_for_them(lanes: TextLanes, size: int) -> None:
    goes_on, order = threading.Event(), list[str]()
    lanes.submit("loud", size, lambda: goes_on.wait(30))
    waiting = [lanes.submit("loud", size, lambda: order.append("loud")) for _ in range(6)]
    waiting += [lanes.submit("quiet", size, lambda: order.append("quiet")) for _ in range(3)]
    goes_on.set()
    for future in waiting:
        future.result(30)
    assert order.index("quiet") <= 1
    assert sorted(order[:6]) == ["loud"] * 3 + ["quiet"] * 3


def test_a_text_nobody_waits_for_is_passed_over(lanes: TextLanes) -> None:
    goes_on, was_run = threading.Event(), threading.Event()
    lanes.submit("a", 1, lambda: goes_on.wait(30))
    given_up = lanes.submit("a", 1, was_run.set)
    assert given_up.cancel()
    goes_on.set()
    assert lanes.submit("a", 1, lambda: 5).result(30) == 5
    assert not was_run.is_set()


def test_nothing_of_a_refused_text_stays_in_memory(lanes: TextLanes) -> None:
    class Tokens:
        pass

    left: list[weakref.ref[Tokens]] = []

    def work() -> None:
        tokens = Tokens()
        left.append(weakref.ref(tokens))
        raise PromptTooLongError("too long")

    gc.disable()
    try:
        future = lanes.submit("a", LONG_TEXT + 1, work)
        with pytest.raises(PromptTooLongError):
            future.result(30)
        lanes.submit("a", LONG_TEXT + 1, lambda: None).result(30)
        # `result` gave the error this test's own frame, not that of the work.
        assert left[0]() is None
    finally:
        gc.enable()
