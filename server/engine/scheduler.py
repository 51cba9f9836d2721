"""Who runs in this step: decode rows first, then prefill chunks, then sequences that can be admitted, in their tenants'
turns; beside them some tokens of the soft prompts that load."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from typing import NamedTuple

from server.engine.cached_blocks import CachedBlocks
from server.engine.errors import EngineError, PromptTooLongError, QueueTimeoutError, TenantQueueTimeoutError
from server.engine.fair_queue import FairQueue
from server.engine.kv_blocks import BLOCK_SIZE, num_blocks_for
from server.engine.resident_prefix import ResidentPrefix
from server.engine.resident_prefixes import ResidentPrefixes
from server.engine.sequence import Row, Sequence
from server.engine.tenant_policy import TenantPolicies

MIN_PREFIX_TOKENS = 8  # of soft prompts that load, a step


class Schedule(NamedTuple):
    """A step: its sequences and soft prompts, their `num_scheduled_tokens` set and blocks allocated, and the sequences
    that failed waiting."""

    sequences: list[Sequence]
    prefixes: list[ResidentPrefix]
    failed: list[tuple[Sequence, EngineError]]


class Scheduler:
    """Owns `waiting` and `running`, and gives rows the blocks for their own text, which `clear` zeroes.

    Tenants take turns (`FairQueue`), each with its sequences in their order. A waiting sequence holds its prefixes, all
    or none, from the first time that there is room for them, so a prefix that was loaded for it is there when it
    starts; it lets go of one that another tenant is due. Sequences pass one another only where the one in front waits
    for a prefix, or its tenant has all the rows it may; while one waits for room, none behind it loads another, of
    other tenants neither unless it waits by its own tenant's fault. All rows of a sequence are admitted, grow and are
    preempted together, and reach their sampled token in the same step.
    """

    def __init__(
        self,
        own_blocks: CachedBlocks,
        residents: ResidentPrefixes,
        clear: Callable[[list[int]], None],
        policies: TenantPolicies,
        *,
        max_rows: int,
        max_step_tokens: int,
        max_queue_s: float,
    ) -> None:
        assert max_step_tokens >= max_rows, "every running row needs a token a step"
        self._own_blocks = own_blocks
        self._residents = residents
        self._clear = clear
        self._policies = policies
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.max_queue_s = max_queue_s
        self.waiting: FairQueue[Sequence] = FairQueue(policies)
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Schedule:
        scheduled: list[Sequence] = []
        budget = self.max_step_tokens
        for sequence in sorted(self.running, key=_is_prefilling):  # decode rows first
            if sequence not in self.running:
                continue  # preempted by one before it
            wanted = _share([row.num_uncomputed_tokens for row in sequence.rows], budget)
            if not any(wanted) or not self._grow(sequence, wanted, scheduled):
                continue
            scheduled.append(sequence)
            budget -= sum(wanted)
        failed = self._admit(scheduled, budget)
        num_tokens = sum(row.num_scheduled_tokens for sequence in scheduled for row in sequence.rows)
        return Schedule(scheduled, self._schedule_prefixes(num_tokens), failed)

    def check_rows(self, sequence: Sequence) -> None:
        """Raises PromptTooLongError if its tenant may not have so many rows at once. What has started goes on."""
        max_rows = self._policies.of(sequence.tenant_id).max_rows
        if max_rows is not None and len(sequence.rows) > max_rows and sequence.started_s is None:
            raise PromptTooLongError(
                f"an ensemble of this tenant must have <= {max_rows} members, got {len(sequence.rows)}"
            )

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free all it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        try:
            self._free_blocks(sequence)
        finally:
            self._release_prefixes(sequence)

    @property
    def num_running_rows(self) -> int:
        return sum(len(sequence.rows) for sequence in self.running)

    def _schedule_prefixes(self, num_tokens: int) -> list[ResidentPrefix]:
        """Soft prompts that load, those first that a sequence waits for, in the turns of the tenants that asked. Beside
        rows that compute `num_tokens` they get half as many, so that rows go on at their pace."""
        budget = self.max_step_tokens - num_tokens
        if num_tokens:
            budget = max(MIN_PREFIX_TOKENS, min(budget, num_tokens // 2))
        scheduled = []
        for resident in sorted(
            self._residents.computing, key=lambda r: (not r.ref_count, self.waiting.counter(r.asked_by))
        ):
            resident.num_scheduled_tokens = min(resident.num_uncomputed_tokens, budget)
            budget -= resident.num_scheduled_tokens
            if resident.num_scheduled_tokens:
                scheduled.append(resident)
        return scheduled

    def _grow(self, sequence: Sequence, wanted: list[int], scheduled: list[Sequence]) -> bool:
        """Allocate blocks for the rows' next tokens, preempting others. False: it was preempted itself."""
        missing = [
            num_blocks_for(row.num_computed_tokens + count) - len(row.block_table)
            for row, count in zip(sequence.rows, wanted, strict=True)
        ]
        while not self._own_blocks.can_allocate(sum(missing)):
            victim = self._victim()
            if victim in scheduled:  # its blocks are written in this step
                scheduled.remove(victim)
            self._preempt(victim)
            if victim is sequence:
                return False
        for row, count, num_tokens in zip(sequence.rows, missing, wanted, strict=True):
            row.block_table += self._own_blocks.allocate(count)
            row.num_scheduled_tokens = num_tokens
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of its tenant's queue. What is evicted of its text is computed again, its prefixes stay."""
        self.running.remove(sequence)
        self._free_blocks(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.append_first(sequence)

    def _victim(self) -> Sequence:
        """The youngest of the tenant that has had the most."""
        return max(enumerate(self.running), key=lambda item: (self.waiting.counter(item[1].tenant_id), item[0]))[1]

    def _free_blocks(self, sequence: Sequence) -> None:
        blocks = [block for row in sequence.rows for block in row.unregistered_blocks]
        if blocks and sequence.finish_reason is None:  # of what it wrote last nobody has seen that it is finite
            self._clear(blocks)
        for row in sequence.rows:
            self._own_blocks.release(row)

    def _admit(self, scheduled: list[Sequence], budget: int) -> list[tuple[Sequence, EngineError]]:
        failed: list[tuple[Sequence, EngineError]] = []
        now = time.monotonic()
        num_rows: Counter[str] = Counter()  # that run, by tenant
        for sequence in self.running:
            num_rows[sequence.tenant_id] += len(sequence.rows)
        can_start, may_load = True, True
        full: set[str] = set()  # tenants that have all the rows they may
        short: set[str] = set()  # tenants of which a sequence waits for room
        is_first = True
        self._residents.begin_step()
        for sequence in self.waiting.in_turn(num_rows):
            tenant_id = sequence.tenant_id
            is_asking = may_load and tenant_id not in short
            waited_s = now - sequence.arrival_s
            try:
                self.check_rows(sequence)
                is_held = self._hold_prefixes(sequence, is_asking, can_start and tenant_id not in full)
            except EngineError as error:
                failed.append((sequence, error))
                continue
            if is_asking and not is_held:
                short.add(tenant_id)
                may_load = not self._residents.claim(sequence.prefixes, waited_s)
            if sequence.started_s is None and waited_s > self.max_queue_s:
                is_own_fault = tenant_id in full or not self._may_run(sequence, num_rows[tenant_id])
                failed.append((sequence, self._timeout(waited_s, is_own_fault)))
                continue
            if not can_start or tenant_id in full or not all(row.is_ready for row in sequence.rows):
                continue
            if not self._may_run(sequence, num_rows[tenant_id]):
                full.add(tenant_id)
                continue
            can_start = budget > 0 and num_rows.total() + len(sequence.rows) <= self.max_rows
            if not can_start:
                continue  # those behind do not pass, but their prefixes may load
            reused = [self._own_blocks.find(row) for row in sequence.rows]
            rows = list(zip(sequence.rows, reused, strict=True))
            wanted = _share([row.num_uncomputed_tokens - len(found) * BLOCK_SIZE for row, found in rows], budget)
            num_tokens = sum(wanted) + sum(row.num_unencoded_tokens for row in sequence.rows)
            num_blocks = sum(_num_blocks_to_start(row) - len(found) for row, found in rows)
            can_start = (
                any(wanted)
                and (num_tokens <= budget or is_first)  # an encoder's text cannot be cut: a long one goes first
                and self._own_blocks.can_allocate(num_blocks, chain.from_iterable(reused))
            )
            if not can_start:
                continue
            self._start(sequence, reused, wanted, now)
            is_first = False
            num_rows[tenant_id] += len(sequence.rows)
            budget -= num_tokens
            scheduled.append(sequence)
        if full:
            self.waiting.forgo(full)
        for sequence, _ in failed:
            self.finish(sequence)
        return failed

    def _timeout(self, waited_s: float, is_own_fault: bool) -> EngineError:
        rest = f"more than the limit of {self.max_queue_s:g} s"
        if is_own_fault:
            return TenantQueueTimeoutError(
                f"waited {waited_s:.1f} s for a row of those that the tenant may have, {rest}"
            )
        return QueueTimeoutError(f"waited {waited_s:.1f} s for a place, {rest}")

    def _has_row(self, sequence: Sequence) -> bool:
        """Beside those that run."""
        num_own = sum(len(other.rows) for other in self.running if other.tenant_id == sequence.tenant_id)
        return self.num_running_rows + len(sequence.rows) <= self.max_rows and self._may_run(sequence, num_own)

    def _may_run(self, sequence: Sequence, num_rows: int) -> bool:
        """Beside `num_rows` of its tenant. One alone may: it was within the limit when it started, if not any more."""
        max_rows = self._policies.of(sequence.tenant_id).max_rows
        return max_rows is None or not num_rows or num_rows + len(sequence.rows) <= max_rows

    def _start(self, sequence: Sequence, reused: list[list[int]], wanted: list[int], now: float) -> None:
        for row, found in zip(sequence.rows, reused, strict=True):
            self._own_blocks.hold(row, found)  # of all rows, before an allocation can evict any
        for row, count in zip(sequence.rows, wanted, strict=True):
            row.block_table += self._own_blocks.allocate(num_blocks_for(len(row.token_ids)) - len(row.block_table))
            row.cross_table = self._own_blocks.allocate(num_blocks_for(len(row.encoder_ids)))
            row.num_scheduled_tokens = count
            for resident in row.residents:
                resident.was_used = True
        if sequence.started_s is None:
            sequence.started_s = now
            num_reused = min(row.num_computed_tokens for row in sequence.rows)
            sequence.num_cached_tokens = min(num_reused, sequence.num_prompt_tokens)
            num_tokens = sum(row.num_uncomputed_tokens + row.num_unencoded_tokens for row in sequence.rows)
            self.waiting.charge_input(sequence.tenant_id, num_tokens)
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def _hold_prefixes(self, sequence: Sequence, may_load: bool, may_start: bool) -> bool:
        """Whether all prefixes of all rows are held, loaded or on their way. Raises the reason if one cannot be.

        What another claims is given back, but not in the step in which it can be used for the first time: two that do
        not fit together would load by turns and never start."""
        held = [resident for row in sequence.rows for resident in row.residents]
        lost = next((r for r in held if self._residents.get(r.ref.key) is not r), None)
        if lost is not None:  # its load failed
            self._release_prefixes(sequence)
            failure = self._residents.failures.get(lost.ref.key)
            if failure is not None:
                raise failure
        elif held:
            claimed = self._residents.claimed(held)
            if sequence.started_s is not None or not claimed:
                return True
            if may_start and not any(resident.was_used for resident in claimed) and self._has_row(sequence):
                return True
            self._release_prefixes(sequence)
        found = self._residents.acquire(sequence.prefixes, asked_by=sequence.tenant_id, may_load=may_load)
        if found is None:
            return False
        rest = iter(found)
        for row in sequence.rows:
            row.residents = list(islice(rest, len(row.prefixes)))
        return True

    def _release_prefixes(self, sequence: Sequence) -> None:
        for row in sequence.rows:
            for resident in row.residents:
                self._residents.release(resident)
            row.residents = []


def _is_prefilling(sequence: Sequence) -> bool:
    return any(row.num_uncomputed_tokens > 1 for row in sequence.rows)


def _share(uncomputed: list[int], budget: int) -> list[int]:
    """Tokens a row, of those `uncomputed`. Where the budget does not take all, every row keeps its last one back: they
    end together. What a row cannot use goes to those with more."""
    if sum(uncomputed) <= budget:
        return uncomputed
    shares = [0] * len(uncomputed)
    num_left = len(uncomputed)
    for index in sorted(range(len(uncomputed)), key=uncomputed.__getitem__):
        shares[index] = min(uncomputed[index] - 1, budget // num_left)
        budget -= shares[index]
        num_left -= 1
    return shares


def _num_blocks_to_start(row: Row) -> int:
    return num_blocks_for(len(row.token_ids)) + num_blocks_for(len(row.encoder_ids))
