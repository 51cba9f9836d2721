"""What the oracles share: cases with a reference's answer, run all together through our engine in each of the ways
that it may compute, and the tie rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_store.prefix import Layers, ModelShape, Prefix
from server.engine import batch
from server.engine.cpu_kernels import CpuKernels
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine, StepOutput
from server.engine.kv_blocks import KVBlocks, split_pool
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner, load_model
from server.engine.resident_prefix import ResidentPrefix
from server.engine.sampling_params import SamplingParams
from server.engine.self_check import self_check
from server.engine.sequence import PrefixRef, Sequence
from tests.tiny_models import letter_tokenizer

NEW_TOKENS, TIE = 32, 1e-3
WAYS = ("plain", "reordered", "kernels")
PATHS = ("plain", "kernels")  # the model's own modules, and none of them that a kernel can replace


@dataclass
class Case:
    """A request and what the reference answers to it, alone. `members` are the names of each row's prefixes."""

    name: str
    prompt: list[int]
    members: tuple[tuple[str, ...], ...]
    tokens: list[int]
    logits: torch.Tensor  # [NEW_TOKENS, vocab_size], or the log of an ensemble's mean


@dataclass(frozen=True)
class Reference:
    """A saved model, what it was asked and what it answered by another's code than ours."""

    folder: Path
    prefixes: dict[str, Prefix]
    cases: list[Case]

    def world(self, way: str, kernels: CpuKernels) -> World:
        """Through the check at start, as the server goes."""
        used = kernels if way == "kernels" else None
        model = load_model(self.folder, torch.float32, torch.device("cpu"), reorders=way != "plain", kernels=used)
        shape = tiny_shape(model)
        self_check(model, shape, used)
        return World(model, shape, self.prefixes, self.cases, used)


@dataclass(frozen=True)
class World:
    """The model with our attention, computing in one of the ways that the server may take, and what it is asked."""

    model: Any
    shape: ModelShape
    prefixes: dict[str, Prefix]
    cases: list[Case]
    kernels: CpuKernels | None

    def answers(self, prefixes: dict[str, Prefix] | None = None, **options: Any) -> list[str]:
        """What is wrong, with `prefixes` in the place of those of their names; `options` are `run_ours`'s."""
        used = self.prefixes | (prefixes or {})
        return wrong(self.cases, run_ours(self.model, self.shape, self.cases, used, kernels=self.kernels, **options))

    def wrong_names(self, prefixes: dict[str, Prefix] | None = None) -> set[str]:
        """Cases that are answered wrongly, all in one batch."""
        return {text.partition(" at ")[0] for text in self.answers(prefixes, stagger=20)}

    def check_notices(self, changed: dict[str, Prefix], *must: str) -> None:
        """Some of the cases that a change concerns are answered wrongly, those of `must` among them; no other is."""
        found = self.wrong_names(changed)
        concerned = {case.name for case in self.cases if any(name in row for row in case.members for name in changed)}
        assert found
        assert set(must) <= found <= concerned

    def check_proves_something(self) -> None:
        assert len({token for case in self.cases for token in case.tokens}) >= 8
        assert len({tuple(case.tokens) for case in self.cases}) == len(self.cases)

    def check_after_eviction_and_preemption(self, *, kv: int, room: int) -> None:
        seen = {"evictions": 0, "preemptions": 0}

        def count(engine: Engine) -> None:
            seen["evictions"] = engine.residents.counts.num_evictions
            seen["preemptions"] = engine.scheduler.num_preemptions

        assert not self.answers(kv=kv, room=room, stagger=20, each_step=count)
        assert min(seen.values()) >= 3, seen

    def twice(self) -> World:
        """Every request, and beside it another of the same prefixes."""
        again = [replace(case, name=f"{case.name}, again") for case in self.cases]
        return replace(self, cases=[case for pair in zip(self.cases, again, strict=True) for case in pair])


def generated(
    model: Any, prompt: list[int], num_tokens: int = NEW_TOKENS, **more: Any
) -> tuple[list[int], torch.Tensor]:
    """The greedy answer of transformers' or PEFT's `generate` to one prompt alone, EOS like any other token, and the
    logits `[num_tokens, vocab_size]` behind it. `more` goes to `generate`."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.eval().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )
    assert len(out.logits) == num_tokens
    return out.sequences[0, -num_tokens:].tolist(), torch.cat(out.logits).float()


def tiny_shape(model: Any) -> ModelShape:
    return replace(measure_shape(model, "tiny", "none"), max_virtual_tokens=64)


def without_last_token(layers: Layers) -> Layers:
    return {i: (key[:, :-1], value[:, :-1]) for i, (key, value) in layers.items()}


def share_every_prefix(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if all were long. What comes back grows, step by step, by the number of prefixes that rows shared."""
    made, num_shared = batch.make_batch, [0]

    def counted(*args: Any, **more: Any) -> batch.Batch:
        found = made(*args, **more)
        num_shared.append(len(found.shared_keys))
        return found

    monkeypatch.setattr(batch, "MIN_SHARED_TOKENS", 1)
    monkeypatch.setattr(batch, "make_batch", counted)
    return num_shared


class WholeSteps(Engine):
    """Where a step fails the engine runs each of its sequences alone: right answers, but no batch. Here it may not."""

    def _run_alone(
        self, sequences: list[Sequence], prefixes: list[ResidentPrefix], error: Exception
    ) -> list[StepOutput]:
        raise error


def run_ours(
    model: Any,
    shape: ModelShape,
    cases: list[Case],
    prefixes: dict[str, Prefix],
    *,
    kernels: CpuKernels | None = None,
    kv: int = 4096,
    room: int = 1024,
    max_rows: int = 24,
    max_step_tokens: int = 24,
    stagger: int = 1,
    each_step: Callable[[Engine], None] = lambda _: None,
) -> list[list[int]]:
    """All cases in one engine, `stagger` arriving at each step, the long ones in chunks."""
    tokenizer = letter_tokenizer(shape.vocab_size)
    num_blocks, num_prefix_blocks = split_pool(kv, room)
    runner = ModelRunner(model, shape, KVBlocks(shape, num_blocks, torch.device("cpu"), kernels))
    engine = WholeSteps(
        runner,
        lambda ref: prefixes[ref.digest],
        num_prefix_blocks=num_prefix_blocks,
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
    )
    sequences = [
        Sequence(
            case.name,
            case.prompt,
            SamplingParams(max_new_tokens=len(case.tokens), ignore_eos=True),
            Detokenizer(tokenizer),
            tuple(tuple(PrefixRef(name, prefixes[name].layout) for name in names) for names in case.members),
            runner.decoder_start_ids,
        )
        for case in cases
    ]
    arriving = list(sequences)
    while arriving or engine.has_work:
        for sequence in arriving[:stagger]:
            engine.add(sequence)
        del arriving[:stagger]
        for output in engine.step():
            assert output.error is None, output.error
        engine.check_integrity()
        each_step(engine)
    return [sequence.output_token_ids for sequence in sequences]


def wrong(cases: list[Case], answers: list[list[int]]) -> list[str]:
    """Cases whose first difference from the reference is not a tie."""
    found = []
    for case, answer in zip(cases, answers, strict=True):
        for i, (ours, theirs) in enumerate(zip(answer, case.tokens, strict=True)):
            if ours == theirs:
                continue
            best = case.logits[i].topk(2).values
            if float(best[0] - best[1]) < TIE:
                print(f"tie: {case.name} at token {i}, {float(best[0] - best[1]):.2g}")
            else:
                found.append(f"{case.name} at token {i}: {ours} for {theirs}")
            break
    return found
