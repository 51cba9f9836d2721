"""The engine without HTTP: whole answers, and single steps of rows that stand still."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer
from workloads import Ask, Measures, Task

from prefix_store.prefix import ModelShape, Prefix
from server.engine.batch import batch_of
from server.engine.cpu_kernels import load_kernels
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine
from server.engine.kv_blocks import KVBlocks, block_bytes, split_pool
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner, load_model
from server.engine.sampler import sample
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import PrefixRef, Sequence
from server.model_files import ModelFiles, cache_dir, fingerprint

CPU = torch.device("cpu")
STANDS_STILL = 2  # new tokens that a row may have: it samples one and never gets to the second


@dataclass(frozen=True)
class Rows:
    """Rows whose next token is computed again and again, at the same place."""

    engine: Engine
    sequences: tuple[Sequence, ...]

    def model_s(self) -> float:
        """Seconds of a step: the batch is built and the model runs, nothing is sampled."""
        start_s = time.perf_counter()
        self._logits()
        return time.perf_counter() - start_s

    def sampling_s(self) -> float:
        """Seconds that choosing from the logits of such a step takes."""
        logits = self._logits()
        start_s = time.perf_counter()
        sample(logits, list(self.sequences), self.engine.runner.kv_blocks.kernels)
        return time.perf_counter() - start_s

    @property
    def own_bytes(self) -> float:
        """Of KV memory, a row, its prefix not counted: that has its own."""
        num_blocks = sum(len(row.block_table) for sequence in self.sequences for row in sequence.rows)
        return num_blocks * block_bytes(self.engine.runner.shape) / len(self.sequences)

    def _logits(self) -> torch.Tensor:
        rows = [row for sequence in self.sequences for row in sequence.rows]
        for row in rows:
            row.num_scheduled_tokens = row.num_uncomputed_tokens
        return self.engine.runner.run(batch_of(rows, set(rows), self.engine.runner.kv_blocks))


class InProcess:
    """One engine. `rows` needs `max_step_tokens` for all their prompts at once."""

    def __init__(
        self,
        files: ModelFiles,
        measures: Measures,
        dtype: torch.dtype,
        *,
        max_rows: int = 64,
        kv_tokens: int = 64 * 128,
        prefix_tokens: int = 64 * 32,
        max_step_tokens: int = 512,
        quantizes: bool = False,
    ) -> None:
        kernels = load_kernels(cache_dir() / "kernels")
        model = load_model(files.path, dtype, CPU, kernels=kernels, quantizes=quantizes)
        self.shape: ModelShape = measure_shape(model, files.name, fingerprint(files.path))
        self._measures = measures
        self._tokenizer = AutoTokenizer.from_pretrained(files.path)
        self._prefixes: dict[str, Prefix] = {}
        self._ids = itertools.count()
        num_blocks, num_prefix_blocks = split_pool(kv_tokens, prefix_tokens)
        self._engine = Engine(
            ModelRunner(model, self.shape, KVBlocks(self.shape, num_blocks, CPU, kernels)),
            lambda ref: self._prefixes[ref.digest],
            num_prefix_blocks=num_prefix_blocks,
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
        )

    def seconds(self, asks: SequenceOf[Ask], num_out: int) -> float:
        """For all at once, EOS ignored, until the last has ended; tokenising included."""
        start_s = time.perf_counter()
        for ask in asks:
            self._engine.add(self._sequence(ask, num_out))
        while self._engine.has_work:
            self._step()
        return time.perf_counter() - start_s

    def rows(self, **groups: SequenceOf[Ask]) -> dict[str, Rows]:
        """Rows that stand still, by group: all have read their prompt and sampled one token."""
        made = {name: tuple(self._sequence(ask, STANDS_STILL) for ask in asks) for name, asks in groups.items()}
        every = [sequence for sequences in made.values() for sequence in sequences]
        refs = [ref for sequence in every for row in sequence.rows for ref in row.prefixes]
        assert self._engine.residents.preload(refs), "the prefixes must fit"
        self._step()
        while self._engine.is_computing:  # the loads, so that all start together
            self._step()
        for sequence in every:
            self._engine.add(sequence)
        while not all(sequence.num_generated_tokens for sequence in every):
            self._step()
        assert {sequence.num_generated_tokens for sequence in every} == {1}, "the prompts did not fit one step"
        return {name: Rows(self._engine, sequences) for name, sequences in made.items()}

    def drop(self, groups: dict[str, Rows]) -> None:
        for rows in groups.values():
            for sequence in rows.sequences:
                self._engine.abort(sequence.request_id)

    def _step(self) -> None:
        for output in self._engine.step():
            if output.error is not None:
                raise output.error

    def _sequence(self, ask: Ask, num_out: int) -> Sequence:
        return Sequence(
            str(next(self._ids)),
            self._tokenizer(ask.text)["input_ids"],
            SamplingParams(max_new_tokens=num_out, ignore_eos=True),
            Detokenizer(self._tokenizer),
            ((self._ref(ask.task),) if ask.task else (),),
        )

    def _ref(self, task: Task) -> PrefixRef:
        if task.name not in self._prefixes:
            self._prefixes[task.name] = task.prefix(self._measures)
        return PrefixRef(task.name, self._prefixes[task.name].layout)
