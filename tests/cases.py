"""What the oracles share: cases with a reference's answer, run all together through our engine, and the tie rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from prefix_store.prefix import Prefix
from server.engine.cpu_kernels import CpuKernels
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine, split_pool
from server.engine.kv_blocks import KVBlocks
from server.engine.model_runner import ModelRunner
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import PrefixRef, Sequence
from tests.tiny_models import letter_tokenizer

NEW_TOKENS, TIE = 32, 1e-3


@dataclass
class Case:
    """A request and what the reference answers to it, alone. `members` are the names of each row's prefixes."""

    name: str
    prompt: list[int]
    members: tuple[tuple[str, ...], ...]
    tokens: list[int]
    logits: torch.Tensor  # [NEW_TOKENS, vocab_size], or the log of an ensemble's mean


def run_ours(
    model: Any,
    shape: Any,
    cases: list[Case],
    prefixes: dict[str, Prefix],
    *,
    kernels: CpuKernels | None = None,
    kv: int = 4096,
    room: int = 1024,
    stagger: int = 1,
    each_step: Callable[[Engine], None] = lambda _: None,
) -> list[list[int]]:
    """All cases in one engine, `stagger` arriving at each step, the long ones in chunks."""
    tokenizer = letter_tokenizer()
    num_blocks, num_prefix_blocks = split_pool(kv, room)
    runner = ModelRunner(model, shape, KVBlocks(shape, num_blocks, torch.device("cpu"), kernels))
    engine = Engine(runner, prefixes.__getitem__, num_prefix_blocks=num_prefix_blocks, max_rows=24, max_step_tokens=24)
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
