"""A step's threads give way to other work, come back when it is gone, and do not flap."""

from __future__ import annotations

import pytest

from server.engine.thread_count import MAX_PATIENCE, SETTLED_WINDOWS, ThreadCount, Window

CALM = Window(waiting=0.01, spare=0.0)  # as beside nothing, on all cores
BESIDE_ONE = Window(waiting=0.78, spare=0.0)
BESIDE_TWO = Window(waiting=1.33, spare=0.0)
ONE_CORE_FREE = Window(waiting=0.0, spare=0.95)


def after(count: ThreadCount, *windows: Window) -> int:
    for window in windows:
        count.observe(window)
    return count.num_threads


@pytest.mark.parametrize("beside", [BESIDE_ONE, BESIDE_TWO])
def test_one_window_beside_busy_processes_leaves_one_thread(beside: Window) -> None:
    assert after(ThreadCount(2), beside) == 1


def test_calm_windows_keep_all_threads() -> None:
    assert after(ThreadCount(2), *[CALM] * 100) == 2


def test_short_waits_as_of_the_servers_own_threads_keep_all_threads() -> None:
    assert after(ThreadCount(2), *[Window(waiting=0.45, spare=0.0)] * 100) == 2


def test_one_thread_stays_while_no_core_is_free() -> None:
    assert after(ThreadCount(2), BESIDE_ONE, *[Window(waiting=0.0, spare=0.05)] * 100) == 1


def test_a_single_thread_that_waits_is_kept() -> None:
    assert after(ThreadCount(2), *[BESIDE_TWO] * 100) == 1


def test_a_free_core_is_used_after_one_window() -> None:
    assert after(ThreadCount(2), BESIDE_ONE, ONE_CORE_FREE) == 2


def test_there_are_never_more_threads_than_at_first() -> None:
    assert after(ThreadCount(2), BESIDE_ONE, Window(waiting=0.0, spare=40.0)) == 2


def test_on_many_cores_only_the_cores_in_use_are_left() -> None:
    """Eight busy processes and 32 threads on 32 cores: 8 of 40 wait at any time, of the threads 6.4."""
    count = ThreadCount(32)
    assert after(count, Window(waiting=6.4, spare=0.0)) == 26
    assert after(count, Window(waiting=1.6, spare=0.0)) == 25
    assert after(count, Window(waiting=0.8, spare=0.0)) == 24
    assert after(count, *[Window(waiting=0.02, spare=0.1)] * 100) == 24
    assert after(count, Window(waiting=0.0, spare=7.9)) == 31


def test_a_thread_added_in_vain_is_added_ever_more_rarely() -> None:
    """As under a container's quota: cores are idle, and a second thread is throttled at once."""
    count = ThreadCount(2)
    num_windows_on_two = 0
    for _ in range(1000):
        count.observe(BESIDE_ONE if count.num_threads == 2 else ONE_CORE_FREE)
        num_windows_on_two += count.num_threads == 2
    assert num_windows_on_two <= 1000 / MAX_PATIENCE + 5


def test_patience_is_short_again_after_a_thread_could_stay() -> None:
    count = ThreadCount(2)
    for _ in range(200):  # until it waits for long
        count.observe(BESIDE_ONE if count.num_threads == 2 else ONE_CORE_FREE)
    assert after(count, *[ONE_CORE_FREE] * MAX_PATIENCE, *[CALM] * (SETTLED_WINDOWS + 1)) == 2
    assert after(count, BESIDE_ONE) == 1
    assert after(count, ONE_CORE_FREE) == 2
