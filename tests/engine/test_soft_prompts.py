"""A soft prompt's K and V are computed in the steps of the rows that run: some tokens a step, faults kept apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_store.prefix import Prefix
from server.engine.attention import NAME
from server.engine.cpu_kernels import CpuKernels
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine
from server.engine.errors import GenerationError, PrefixLoadError
from server.engine.fused_modules import fuse_modules
from server.engine.kv_blocks import KVBlocks, split_pool
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner
from server.engine.reordered_weights import reorder_weights
from server.engine.sampling_params import SamplingParams
from server.engine.scheduler import MIN_PREFIX_TOKENS
from server.engine.sequence import PrefixRef, Sequence
from tests.tiny_models import FAMILIES, VOCAB, letter_tokenizer

STEP_TOKENS = 48
LENGTHS = {"a": 40, "b": 13, "c": 30}


@pytest.fixture(scope="module")
def model(kernels: CpuKernels) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"](), attn_implementation=NAME)
    model.eval().requires_grad_(False)
    assert reorder_weights(model)
    fuse_modules(model, kernels)
    return model


@pytest.fixture
def prefixes(model: Any) -> dict[str, Prefix]:
    hidden_size = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    made = {n: torch.randn(count, hidden_size, generator=generator) for n, count in LENGTHS.items()}
    made["broken"] = torch.randn(9, hidden_size + 1, generator=generator)
    return {name: Prefix("soft", embeddings=embeddings) for name, embeddings in made.items()}


@pytest.fixture
def engine(model: Any, prefixes: dict[str, Prefix], kernels: CpuKernels) -> Engine:
    shape = measure_shape(model, "tiny", "none")
    num_blocks, num_prefix_blocks = split_pool(4096, 1024)
    runner = ModelRunner(model, shape, KVBlocks(shape, num_blocks, torch.device("cpu"), kernels))
    return Engine(
        runner,
        lambda ref: prefixes[ref.digest],
        num_prefix_blocks=num_prefix_blocks,
        max_rows=40,
        max_step_tokens=STEP_TOKENS,
    )


def ref(engine: Engine, prefixes: dict[str, Prefix], name: str) -> PrefixRef:
    return PrefixRef(name, prefixes[name].layout)


def add(engine: Engine, request_id: str, *refs: PrefixRef, num_out: int = 8) -> Sequence:
    prompt = [3 + (i + len(request_id)) % (VOCAB - 3) for i in range(7)]
    params = SamplingParams(max_new_tokens=num_out, ignore_eos=True)
    sequence = Sequence(request_id, prompt, params, Detokenizer(letter_tokenizer()), (refs,))
    engine.add(sequence)
    return sequence


def start_rows(engine: Engine, num_rows: int) -> list[Sequence]:
    rows = [add(engine, "r" * (i + 1), num_out=60) for i in range(num_rows)]
    while not all(row.num_generated_tokens for row in rows):
        step(engine)
    return rows


def step(engine: Engine) -> dict[str, Exception]:
    """The errors, by request."""
    outputs = engine.step()
    engine.check_integrity()
    return {output.sequence.request_id: output.error for output in outputs if output.error is not None}


def computed(engine: Engine, names: str) -> list[int]:
    residents = [engine.residents.get(name) for name in names]
    return [0 if resident is None else resident.num_computed_tokens for resident in residents]


def finish(engine: Engine) -> dict[str, Exception]:
    errors = step(engine)
    while engine.has_work or engine.is_computing:
        errors.update(step(engine))
    return errors


def kv_of(engine: Engine, name: str) -> torch.Tensor:
    resident = engine.residents.get(name)
    assert resident is not None
    assert resident.state == "ready"
    return torch.stack([layer[:, resident.block_table] for layer in engine.runner.kv_blocks.layers])


@pytest.mark.parametrize(("num_rows", "share"), [(1, MIN_PREFIX_TOKENS), (12, MIN_PREFIX_TOKENS), (24, 12), (36, 12)])
def test_rows_go_on_while_soft_prompts_load(
    engine: Engine, prefixes: dict[str, Prefix], num_rows: int, share: int
) -> None:
    """Half as many tokens as the rows have, no more than the step has left, and never less than a few."""
    rows = start_rows(engine, num_rows)
    assert engine.residents.preload([ref(engine, prefixes, name) for name in "abc"])
    total = sum(LENGTHS.values())
    for num_steps in range(1, -(-total // share) + 1):
        before = [row.num_generated_tokens for row in rows]
        step(engine)
        assert [row.num_generated_tokens for row in rows] == [count + 1 for count in before]
        assert sum(computed(engine, "abc")) == min(total, num_steps * share)
    assert not engine.residents.computing
    finish(engine)


def test_without_rows_a_step_takes_all_it_can(engine: Engine, prefixes: dict[str, Prefix]) -> None:
    assert engine.residents.preload([ref(engine, prefixes, name) for name in "abc"])
    step(engine)
    assert sum(computed(engine, "abc")) == STEP_TOKENS
    step(engine)
    assert not engine.residents.computing
    assert not engine.is_computing


def test_what_a_sequence_waits_for_loads_before_what_is_only_preloaded(
    engine: Engine, prefixes: dict[str, Prefix]
) -> None:
    start_rows(engine, 1)
    engine.residents.preload([ref(engine, prefixes, "a")])
    step(engine)
    assert computed(engine, "a") == [MIN_PREFIX_TOKENS]
    add(engine, "waits", ref(engine, prefixes, "b"))
    step(engine)  # the load of b runs inside it
    assert computed(engine, "ab") == [2 * MIN_PREFIX_TOKENS, 0]
    step(engine)
    step(engine)
    assert computed(engine, "ab") == [2 * MIN_PREFIX_TOKENS + 3, LENGTHS["b"]]
    finish(engine)


def test_its_keys_are_bitwise_the_same_however_they_are_cut(
    model: Any, engine: Engine, prefixes: dict[str, Prefix]
) -> None:
    assert engine.residents.preload([ref(engine, prefixes, "b")])
    finish(engine)
    whole = kv_of(engine, "b")
    assert engine.residents.evict("b")
    start_rows(engine, 3)
    engine.residents.preload([ref(engine, prefixes, name) for name in "ab"])
    pieces = []
    while not pieces or engine.residents.computing:
        step(engine)
        pieces.append(computed(engine, "b")[0])
    assert len({*pieces} - {0, LENGTHS["b"]}) == 1, "it was not cut"
    assert torch.equal(kv_of(engine, "b"), whole)


def test_one_that_the_model_cannot_take_fails_alone(engine: Engine, prefixes: dict[str, Prefix]) -> None:
    alone = []
    for name in ("bare", "behind a"):
        alone.append(add(engine, name, *([ref(engine, prefixes, "a")] if name[-1] == "a" else [])))
        finish(engine)
    engine.residents.evict("a")
    again = [add(engine, "bare"), add(engine, "behind a", ref(engine, prefixes, "a"))]
    add(engine, "behind it", ref(engine, prefixes, "broken"))
    errors = finish(engine)
    assert [type(error) for error in errors.values()] == [PrefixLoadError]
    assert "behind it" in errors
    assert [row.output_token_ids for row in again] == [row.output_token_ids for row in alone]
    assert engine.residents.counts.num_failed_loads == 1
    assert engine.residents.num_resident == 1


def test_a_fault_of_the_whole_step_ends_the_loads_too(engine: Engine, prefixes: dict[str, Prefix]) -> None:
    """Else it would come again with every step."""
    add(engine, "waits", ref(engine, prefixes, "a"))
    start_rows(engine, 1)
    step(engine)
    assert engine.residents.computing
    outputs = engine.fail_all(GenerationError("the step failed: by itself"))
    assert {output.sequence.request_id for output in outputs} == {"waits", "r"}
    assert not engine.has_work
    assert not engine.is_computing
    engine.check_integrity()
    assert engine.residents.num_resident == 0


def test_whoever_waited_may_leave(engine: Engine, prefixes: dict[str, Prefix]) -> None:
    """The load goes on for the next one."""
    start_rows(engine, 1)
    waits = add(engine, "waits", ref(engine, prefixes, "a"))
    step(engine)
    step(engine)
    engine.abort(waits.request_id)
    assert not engine.residents.evict("a")
    finish(engine)
    assert computed(engine, "a") == [LENGTHS["a"]]
    assert engine.residents.evict("a")
    engine.check_integrity()
