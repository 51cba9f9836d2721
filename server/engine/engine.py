"""The engine: `add`, `abort`, `step`. Synchronous, one thread, no HTTP, no disk."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import structlog

from prefix_store.errors import in_full
from prefix_store.prefix import Prefix
from server.engine.batch import batch_of
from server.engine.cached_blocks import CachedBlocks
from server.engine.errors import (
    ContextLengthError,
    EngineError,
    GenerationError,
    PrefixFaultError,
    PromptTooLongError,
)
from server.engine.kv_blocks import BLOCK_SIZE, BlockAllocator, block_bytes, prefix_blocks
from server.engine.model_runner import ModelRunner
from server.engine.resident_prefix import ResidentPrefix
from server.engine.resident_prefixes import ResidentPrefixes
from server.engine.resident_shares import ResidentShares
from server.engine.sampler import Sample, sample
from server.engine.scheduler import Scheduler
from server.engine.sequence import PrefixRef, Sequence, TokenOutput
from server.engine.tenant_policy import TenantPolicies

log = structlog.get_logger()


@dataclass(frozen=True)
class StepOutput:
    """What a step gave a row: one token, or the error that ended it."""

    sequence: Sequence
    token: TokenOutput | None = None
    error: EngineError | None = None

    @property
    def is_last(self) -> bool:
        return self.token is None or self.token.finish_reason is not None


class Engine:
    """Continuous batching over one model.

    `load_prefix` gives a prefix's source form; with an `executor` it runs there, beside the steps, without one inside
    the step. What the model must make of it the next steps compute. The pool is split once: `num_prefix_blocks` for
    resident prefixes, the rest for the rows' own text. What `policies` say holds from the next step on.
    """

    def __init__(
        self,
        runner: ModelRunner,
        load_prefix: Callable[[PrefixRef], Prefix],
        *,
        num_prefix_blocks: int,
        eos_token_ids: frozenset[int] = frozenset(),
        special_token_ids: frozenset[int] = frozenset(),
        max_rows: int = 64,
        max_step_tokens: int = 512,
        max_queue_s: float = 30.0,
        executor: Executor | None = None,
    ) -> None:
        self.runner = runner
        self._load_prefix = load_prefix
        self._executor = executor
        self._loads: list[ResidentPrefix] = []  # that the executor has not begun
        self._loads_lock = threading.Lock()
        self._finished_loads: queue.SimpleQueue[tuple[ResidentPrefix, Exception | None]] = queue.SimpleQueue()
        self._eos_token_ids = eos_token_ids
        self._special_token_ids = special_token_ids
        num_own_blocks = runner.kv_blocks.num_blocks - 1 - num_prefix_blocks
        self.policies = TenantPolicies()
        self.prefix_allocator = BlockAllocator(1, num_prefix_blocks)
        own = BlockAllocator(1 + num_prefix_blocks, num_own_blocks)
        self.own_blocks = CachedBlocks(own, shares_soft_text=runner.shape.reads != "each")
        self.residents = ResidentPrefixes(
            self.prefix_allocator,
            lambda layout: prefix_blocks(layout, runner.shape),
            self._start_load,
            ResidentShares(num_prefix_blocks, block_bytes(runner.shape), self.policies),
        )
        self.scheduler = Scheduler(
            self.own_blocks,
            self.residents,
            runner.kv_blocks.clear,
            self.policies,
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
            max_queue_s=max_queue_s,
        )
        self._sequences: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def is_computing(self) -> bool:
        """A step would not wait for anything."""
        return bool(self.scheduler.running or self.residents.computing)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises as `check_room`, but for its tenant's limit, which may have changed since."""
        self._check_pools(sequence)
        assert sequence.request_id not in self._sequences
        self._sequences[sequence.request_id] = sequence
        self.scheduler.add(sequence)

    def check_room(self, sequence: Sequence) -> None:
        """Raises PromptTooLongError for a sequence that could never finish, even alone."""
        self._check_pools(sequence)
        self.scheduler.check_rows(sequence)

    def _check_pools(self, sequence: Sequence) -> None:
        """Raises ContextLengthError for more text than the pool holds, PromptTooLongError for more prefixes or rows."""
        if sequence.max_blocks > self.own_blocks.num_blocks:
            num_prompt, num_new = sequence.num_prompt_tokens, sequence.sampling_params.max_new_tokens
            raise ContextLengthError(
                f"prompt ({num_prompt} tokens) and max_new_tokens ({num_new}) in {len(sequence.rows)} rows must fit "
                f"{self.own_blocks.num_blocks * BLOCK_SIZE} tokens of KV memory",
                limit=self.own_blocks.num_blocks // len(sequence.rows) * BLOCK_SIZE,
                num_read=num_prompt,
                num_new=num_new,
            )
        refs = {ref.key: ref for ref in sequence.prefixes}
        needed = sum(prefix_blocks(ref.layout, self.runner.shape) for ref in refs.values())
        if needed > self.prefix_allocator.num_blocks:
            raise PromptTooLongError(
                f"{len(refs)} prefixes need {needed} blocks of prefix memory together, "
                f"the pool has {self.prefix_allocator.num_blocks}"
            )
        if len(sequence.rows) > self.scheduler.max_rows:
            raise PromptTooLongError(
                f"an ensemble must have <= {self.scheduler.max_rows} members, got {len(sequence.rows)}"
            )

    def abort(self, request_id: str) -> None:
        """Forget a sequence and free all it holds. Unknown or finished ids are fine."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.finish(sequence)

    def charge(self, tenant_id: str, num_tokens: int) -> None:
        """Count tokens of prefixes that were computed or copied for a tenant, as in a load or a trial forward."""
        self.scheduler.waiting.lift(tenant_id)
        self.scheduler.waiting.charge_input(tenant_id, num_tokens)

    def step(self) -> list[StepOutput]:
        """Schedule, run, postprocess."""
        self._take_loads()
        sequences, prefixes, failed = self.scheduler.schedule()
        outputs = [self._fail(sequence, error) for sequence, error in failed]
        if sequences or prefixes:
            outputs += self._run(sequences, prefixes)
        return outputs

    def fail_all(self, error: EngineError) -> list[StepOutput]:
        """End every row and every load with `error`."""
        for resident in tuple(self.residents.computing):
            self._finish_load(resident, error)
        return [self._fail(sequence, error) for sequence in tuple(self._sequences.values())]

    def check_integrity(self) -> None:
        """Every block is free, cached or held; every row that holds a prefix is counted. For tests, after a step."""
        self.residents.check_integrity()
        sequences = [*self.scheduler.running, *self.scheduler.waiting]
        assert {id(sequence) for sequence in sequences} == {id(sequence) for sequence in self._sequences.values()}
        rows = [row for sequence in sequences for row in sequence.rows]
        self.own_blocks.check_integrity(rows)
        held = sum(len(row.residents) for row in rows)
        assert held == self.residents.num_references, "a prefix is held by a row that is gone"

    def _run(self, sequences: list[Sequence], prefixes: list[ResidentPrefix]) -> list[StepOutput]:
        rows = [row for sequence in sequences for row in sequence.rows if row.num_scheduled_tokens]
        sampled = [sequence for sequence in sequences if sequence.is_sampled]
        kv_blocks = self.runner.kv_blocks
        try:
            wanting = {row for sequence in sampled for row in sequence.rows}
            batch = batch_of(rows, wanting, kv_blocks, prefixes, reads=self.runner.shape.reads)
            samples = sample(self.runner.run(batch), sampled, kv_blocks.kernels, self._eos_token_ids)
        except Exception as error:  # also when memory is short; whoever is at fault for it is found
            for sequence in sampled:
                sequence.rewind_draws()
            return self._run_alone(sequences, prefixes, error)
        for row in rows:
            row.num_computed_tokens += row.num_scheduled_tokens
            row.num_scheduled_tokens = 0
            row.is_encoded = True
        for resident in prefixes:
            self.charge(resident.asked_by, resident.num_scheduled_tokens)
            self._advance(resident)
        return [self._append_or_fail(sequence, chosen) for sequence, chosen in zip(sampled, samples, strict=True)]

    def _advance(self, resident: ResidentPrefix) -> None:
        try:
            if not self.runner.kv_blocks.is_finite(resident.scheduled_blocks):  # they may be another's later
                reason = "its keys and values must be finite, got NaN or infinity"
                raise PrefixFaultError(reason, is_versions_fault=True)
        except Exception as error:  # also when memory is short
            self._finished_loads.put((resident, error))  # the next step tells those who wait
        else:
            self.residents.advance(resident)

    def _run_alone(
        self, sequences: list[Sequence], prefixes: list[ResidentPrefix], error: Exception
    ) -> list[StepOutput]:
        """Whoever is at fault for a step's `error` fails alone: each again by itself. K and V are written to the same
        slots."""
        if len(sequences) + len(prefixes) > 1:
            log.warning(
                "step_failed_rows_run_alone",
                num_sequences=len(sequences),
                num_prefixes=len(prefixes),
                reason=str(error)[:300],
            )
            alone = [self._run([], [resident]) for resident in prefixes]
            alone += [self._run([sequence], []) for sequence in sequences]
            return [output for outputs in alone for output in outputs]
        for resident in prefixes:
            self._finished_loads.put((resident, error))  # the next step tells those who wait
        return [self._fail(sequence, GenerationError(f"the step failed: {error}")) for sequence in sequences]

    def _append_or_fail(self, sequence: Sequence, chosen: Sample) -> StepOutput:
        try:
            return self._append(sequence, chosen)
        except Exception as error:  # of this row alone: the others have their tokens
            log.exception("row_failed", request_id=sequence.request_id)
            return self._fail(sequence, GenerationError(f"the row failed: {error}"))

    def _append(self, sequence: Sequence, chosen: Sample) -> StepOutput:
        if chosen.token_id is None:
            reason = "the row's logits must be finite, got NaN or infinity"
            return self._fail(sequence, GenerationError(reason, is_versions_fault=True))
        params = sequence.sampling_params
        token_id = chosen.token_id
        sequence.append(token_id)
        self.scheduler.waiting.charge_output(sequence.tenant_id, len(sequence.rows))
        for row in sequence.rows:
            self.own_blocks.register(row)
        place = None if chosen.logprob is None else sequence.detokenizer.place(token_id)
        text = sequence.detokenizer.append(token_id)
        if token_id in self._eos_token_ids and not params.ignore_eos:
            sequence.finish_reason = "eos_token"
        elif (
            sequence.detokenizer.is_stopped
            or token_id in params.stop_token_ids
            or (params.stop_strings is not None and params.stop_strings.end(sequence.text_ids))
        ):
            sequence.finish_reason = "stop_sequence"
        elif sequence.num_generated_tokens == params.max_new_tokens:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            text += sequence.detokenizer.finish()
            if sequence.detokenizer.is_stopped and sequence.finish_reason == "length":
                sequence.finish_reason = "stop_sequence"
            self.abort(sequence.request_id)
        output = TokenOutput(
            index=sequence.num_generated_tokens,
            token_id=token_id,
            text=text,
            logprob=chosen.logprob,
            top_logprobs=chosen.top_logprobs,
            special=token_id in self._special_token_ids,
            finish_reason=sequence.finish_reason,
            place=place,
        )
        return StepOutput(sequence, token=output)

    def _fail(self, sequence: Sequence, error: EngineError) -> StepOutput:
        if self._sequences.pop(sequence.request_id, None) is not None and (
            sequence in self.scheduler.running or sequence in self.scheduler.waiting
        ):
            self.scheduler.finish(sequence)
        return StepOutput(sequence, error=error)

    def _start_load(self, resident: ResidentPrefix) -> None:
        if self._executor is None:
            self._load(resident)
            return
        with self._loads_lock:
            self._loads.append(resident)
        self._executor.submit(self._load_next)

    def _load_next(self) -> None:
        """On the executor: of the loads that wait for it, the one of the tenant that has had the least."""
        with self._loads_lock:
            resident = min(self._loads, key=lambda resident: self.scheduler.waiting.counter(resident.asked_by))
            self._loads.remove(resident)
        self._load(resident)

    def _load(self, resident: ResidentPrefix) -> None:
        """On the executor: nobody reads these blocks before the load is taken."""
        resident.started_s = time.monotonic()
        try:
            prefix = self._load_prefix(resident.ref)
            if prefix.layout != resident.ref.layout:
                reason = f"expected {resident.ref.layout}, got {prefix.layout}"
                raise PrefixFaultError(reason, is_versions_fault=True)
            self.runner.load(prefix, resident)
        except Exception as error:  # whatever it is, it is this prefix's failure and must reach those who wait
            log.warning("prefix_not_loaded", key=resident.ref.key[:80], reason=in_full(error)[:300])
            self._finished_loads.put((resident, error))
        else:
            self._finished_loads.put((resident, None))

    def _take_loads(self) -> None:
        while not self._finished_loads.empty():
            resident, error = self._finished_loads.get()
            self.charge(resident.asked_by, resident.num_copied_tokens)
            self._finish_load(resident, error)

    def _finish_load(self, resident: ResidentPrefix, error: Exception | None) -> None:
        if self.residents.get(resident.ref.key) is not resident:
            return  # it failed meanwhile, with all others
        if error is not None:
            self.runner.kv_blocks.clear(resident.block_table)
        self.residents.finish_load(resident, error)
