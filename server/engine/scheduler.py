"""Who runs in this step: decode rows first, then prefill chunks, then rows that can be admitted."""

from __future__ import annotations

import time
from collections import deque

from server.engine.errors import EngineError, QueueTimeoutError
from server.engine.kv_blocks import BlockAllocator, num_blocks_for
from server.engine.resident_prefixes import ResidentPrefixes
from server.engine.sequence import Sequence


class Scheduler:
    """Owns `waiting` and `running`, and the blocks of the rows' own text.

    A waiting row holds its prefix from the first time that there is room for it, so a prefix that was loaded for a
    row is there when the row starts. Rows pass one another only where the one in front waits for its prefix.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        residents: ResidentPrefixes,
        *,
        max_rows: int,
        max_step_tokens: int,
        max_queue_s: float,
    ) -> None:
        assert max_step_tokens >= max_rows, "every running row needs a token a step"
        self._allocator = allocator
        self._residents = residents
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.max_queue_s = max_queue_s
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> tuple[list[Sequence], list[tuple[Sequence, EngineError]]]:
        """The rows of this step with `num_scheduled_tokens` set and blocks allocated, and rows that failed waiting."""
        scheduled: list[Sequence] = []
        budget = self.max_step_tokens
        for sequence in sorted(self.running, key=lambda s: s.num_uncomputed_tokens > 1):  # decode rows first
            if sequence not in self.running:
                continue  # preempted by a row before it
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            if num_tokens == 0 or not self._grow(sequence, num_tokens, scheduled):
                continue
            sequence.num_scheduled_tokens = num_tokens
            scheduled.append(sequence)
            budget -= num_tokens
        failed = self._admit(scheduled, budget)
        return scheduled, failed

    def finish(self, sequence: Sequence) -> None:
        """Take a row out, wherever it is, and free all it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._allocator.release(sequence.block_table)
        sequence.block_table = []
        if sequence.resident is not None:
            self._residents.release(sequence.resident)
            sequence.resident = None

    @property
    def num_waiting_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in tuple(self.waiting))

    def _grow(self, sequence: Sequence, num_tokens: int, scheduled: list[Sequence]) -> bool:
        """Allocate blocks for the row's next tokens, preempting the youngest rows. False: it was preempted itself."""
        needed = num_blocks_for(sequence.num_computed_tokens + num_tokens) - len(sequence.block_table)
        while not self._allocator.can_allocate(needed):
            victim = self.running[-1]
            if victim in scheduled:  # its blocks are written in this step
                scheduled.remove(victim)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self._allocator.allocate(needed)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue. Its tokens are computed again; its prefix stays held."""
        self.running.remove(sequence)
        self._allocator.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_scheduled_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self, scheduled: list[Sequence], budget: int) -> list[tuple[Sequence, EngineError]]:
        failed: list[tuple[Sequence, EngineError]] = []
        now = time.monotonic()
        can_start = True
        for sequence in tuple(self.waiting):
            try:
                ready = self._hold_prefix(sequence)
            except EngineError as error:
                failed.append((sequence, error))
                continue
            waited_s = now - sequence.arrival_s
            if sequence.started_s is None and waited_s > self.max_queue_s:
                message = f"waited {waited_s:.1f} s for a place, more than the limit of {self.max_queue_s:g} s"
                failed.append((sequence, QueueTimeoutError(message)))
                continue
            if not ready or not can_start:
                continue
            needed = num_blocks_for(len(sequence.token_ids))
            if len(self.running) >= self.max_rows or budget == 0 or not self._allocator.can_allocate(needed):
                can_start = False  # those behind do not pass, but their prefixes may load
                continue
            sequence.num_scheduled_tokens = min(sequence.num_uncomputed_tokens, budget)
            sequence.block_table = self._allocator.allocate(needed)
            if sequence.started_s is None:
                sequence.started_s = now
            budget -= sequence.num_scheduled_tokens
            self.waiting.remove(sequence)
            self.running.append(sequence)
            scheduled.append(sequence)
        for sequence, _ in failed:
            self.finish(sequence)
        return failed

    def _hold_prefix(self, sequence: Sequence) -> bool:
        """Whether the row's prefix is ready. Raises the reason if it cannot be loaded."""
        if sequence.prefix is None:
            return True
        if sequence.resident is not None and self._residents.get(sequence.prefix.digest) is not sequence.resident:
            sequence.resident = None  # its load failed
            failure = self._residents.failure(sequence.prefix.digest)
            if failure is not None:
                raise failure
        if sequence.resident is None:
            sequence.resident = self._residents.acquire(sequence.prefix)
        return sequence.resident is not None and sequence.resident.state == "ready"
