"""How many threads a step computes on: as many as there are cores that other work leaves free, and at least one.

The threads of a step wait for each other hundreds of times in it. While one of them is not scheduled, none goes on: a
step takes 1 / (1 - `waiting`) times as long. Beside one busy process on two cores that is 5 times; on one thread, 1.6.
"""

from __future__ import annotations

from dataclasses import dataclass

ENOUGH_SPARE = 0.75  # cores that must be idle before a thread is added
SETTLED_WINDOWS = 5
MAX_PATIENCE = 16


@dataclass(frozen=True)
class Window:
    """What was observed while some steps ran."""

    waiting: float  # threads of the step that were ready to run but not scheduled, on average
    spare: float  # idle cores on average, without those that the step's own threads left idle between two steps


class ThreadCount:
    """Decides after every window, beginning with `max_threads`.

    An added thread may have to go again at once: its core is idle but beyond the container's quota, or other work comes
    and goes. After each such addition the next one waits for twice as many windows, at most MAX_PATIENCE.
    """

    def __init__(self, max_threads: int) -> None:
        self.num_threads = self.max_threads = max_threads
        self._patience = 1  # windows
        self._num_windows = 0  # since the last change
        self._was_added = False  # the last change

    def observe(self, window: Window) -> None:
        self._num_windows += 1
        if self._was_added and self._num_windows > SETTLED_WINDOWS:
            self._patience = 1
        # With one of n threads fewer a step takes n / (n - 1) times as long at most: as long as with 1 / n waiting.
        if self.num_threads > 1 and window.waiting > 1 / self.num_threads:
            if self._was_added and self._num_windows <= SETTLED_WINDOWS:
                self._patience = min(2 * self._patience, MAX_PATIENCE)
            self._change(-max(1, int(window.waiting)))
        elif (
            self.num_threads < self.max_threads and window.spare >= ENOUGH_SPARE and self._num_windows >= self._patience
        ):
            self._change(max(1, int(window.spare)))

    def _change(self, by: int) -> None:
        self.num_threads = min(max(self.num_threads + by, 1), self.max_threads)
        self._num_windows, self._was_added = 0, by > 0
