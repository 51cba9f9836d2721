"""Memory that is short, while a prefix loads, a prompt is read or tokens are made, fails whoever asked for too much of
it. The others get the tokens that they get alone, and all blocks are accounted for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_store.prefix import Prefix
from server.engine import engine as engine_module
from server.engine.attention import NAME
from server.engine.batch import Batch
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine
from server.engine.errors import EngineError, GenerationError, PrefixLoadError
from server.engine.kv_blocks import KVBlocks, split_pool
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner
from server.engine.sampler import Sample
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import PrefixRef, Row, Sequence
from tests.tiny_models import FAMILIES, letter_tokenizer

FAULTS: list[Exception] = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2147483648 bytes."),
]
NUM_OUT = 12
PROMPT_TOKENS = 50
STEP_TOKENS = 40  # a prompt is read in two steps
GOOD, OTHER, SOFT = "good", "other", "soft"
AT_FAULT = "at fault"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES["llama"](), attn_implementation=NAME)


@pytest.fixture(scope="module")
def prefixes(model: Any) -> dict[str, Prefix]:
    shape = measure_shape(model, "tiny", "none")
    torch.manual_seed(1)
    made = torch.randn(2, shape.num_layers, 2, shape.num_kv_heads, 20, shape.head_dim)
    found = {
        name: Prefix("kv", {i: (made[at, i, 0], made[at, i, 1]) for i in range(shape.num_layers)})
        for at, name in enumerate((GOOD, OTHER))
    }
    return found | {SOFT: Prefix("soft", embeddings=torch.randn(20, shape.hidden_size))}


class Asked:
    """Requests to one engine, whose pools are looked at after every step."""

    def __init__(self, model: Any, prefixes: dict[str, Prefix]) -> None:
        shape = measure_shape(model, "tiny", "none")
        num_blocks, num_prefix_blocks = split_pool(64 * 16, 16 * 16)
        runner = ModelRunner(model, shape, KVBlocks(shape, num_blocks, torch.device("cpu")))
        self.prefixes = prefixes
        self.engine = Engine(
            runner,
            lambda ref: self.prefixes[ref.digest],
            num_prefix_blocks=num_prefix_blocks,
            max_rows=8,
            max_step_tokens=STEP_TOKENS,
        )

    def add(self, request_id: str, prefix: str | None, seed: int | None = None) -> Sequence:
        params = SamplingParams(max_new_tokens=NUM_OUT, ignore_eos=True, do_sample=seed is not None, seed=seed)
        members = (() if prefix is None else (PrefixRef(prefix, self.prefixes[prefix].layout),),)
        prompt = [3 + (i * 7 + len(request_id)) % 90 for i in range(PROMPT_TOKENS)]
        sequence = Sequence(request_id, prompt, params, Detokenizer(letter_tokenizer()), members)
        self.engine.add(sequence)
        return sequence

    def finish(self) -> dict[str, EngineError]:
        errors = {}
        while self.engine.has_work or self.engine.is_computing:
            for output in self.engine.step():
                if output.error is not None:
                    errors[output.sequence.request_id] = output.error
            self.engine.check_integrity()
        assert self.engine.own_blocks.num_used == 0
        assert self.engine.residents.num_references == 0
        held = sum(self.engine.residents.sizes.values())
        assert held + self.engine.prefix_allocator.num_free == self.engine.prefix_allocator.num_blocks
        assert self.engine.runner.kv_blocks.is_all_finite()
        return errors


@pytest.fixture
def asked(model: Any, prefixes: dict[str, Prefix]) -> Asked:
    return Asked(model, dict(prefixes))


NEIGHBOURS: dict[str, tuple[str | None, int | None]] = {
    "greedy": (GOOD, None),
    "sampled": (GOOD, 5),
    "bare and sampled": (None, 2**63 + 1),
}


@pytest.fixture(scope="module")
def alone(model: Any, prefixes: dict[str, Prefix]) -> dict[str, list[int]]:
    answers = {}
    for name, (prefix, seed) in NEIGHBOURS.items():
        asked = Asked(model, prefixes)
        sequence = asked.add(name, prefix, seed)
        assert not asked.finish()
        answers[name] = sequence.output_token_ids
    assert all(len(set(tokens)) >= 6 for tokens in answers.values()), "answers must be varied to prove something"
    return answers


def add_neighbours(asked: Asked) -> dict[str, Sequence]:
    return {name: asked.add(name, prefix, seed) for name, (prefix, seed) in NEIGHBOURS.items()}


def tokens(sequences: dict[str, Sequence]) -> dict[str, list[int]]:
    return {name: sequence.output_token_ids for name, sequence in sequences.items()}


def fail_when(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, is_short: Callable[[list[Row]], bool], fault: Exception
) -> list[int]:
    """A step fails after the model has written its K and V. How many rows each step had."""
    num_rows: list[int] = []
    now: list[Row] = []
    make, run = engine_module.batch_of, asked.engine.runner.run

    def batch_of(rows: list[Row], *arguments: Any, **more: Any) -> Batch:
        now[:] = rows
        return make(rows, *arguments, **more)

    def run_short(batch: Batch) -> torch.Tensor:
        logits = run(batch)
        num_rows.append(len(now))
        if is_short(now):
            raise fault
        return logits

    monkeypatch.setattr(engine_module, "batch_of", batch_of)
    monkeypatch.setattr(asked.engine.runner, "run", run_short)
    return num_rows


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("num_computed", [0, STEP_TOKENS // 4, PROMPT_TOKENS, PROMPT_TOKENS + 5])
def test_a_row_that_takes_too_much_fails_alone(
    asked: Asked, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, fault: Exception, num_computed: int
) -> None:
    """In its prompt's first step, later in it, at its first token and amid its answer."""
    neighbours = add_neighbours(asked)
    bad = asked.add(AT_FAULT, OTHER, 3)
    with monkeypatch.context() as short:
        fail_when(
            asked, short, lambda rows: bad.rows[0] in rows and bad.rows[0].num_computed_tokens >= num_computed, fault
        )
        errors = asked.finish()
    assert {name: type(error) for name, error in errors.items()} == {AT_FAULT: GenerationError}
    assert tokens(neighbours) == alone
    again = asked.add(AT_FAULT, OTHER, 3)
    assert not asked.finish()
    assert again.output_token_ids[: bad.num_generated_tokens] == bad.output_token_ids
    assert len(again.output_token_ids) == NUM_OUT


def test_rows_that_are_too_much_together_go_on_one_by_one(
    asked: Asked, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbours = add_neighbours(asked)
    num_rows = fail_when(asked, monkeypatch, lambda rows: len(rows) > 1, MemoryError())
    assert not asked.finish()
    assert max(num_rows) > 1
    assert tokens(neighbours) == alone


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_fault_in_choosing_tokens_draws_nothing_twice(
    asked: Asked, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """The rows before it had drawn already."""
    neighbours = add_neighbours(asked)
    bad = asked.add(AT_FAULT, GOOD, 3)
    choose = engine_module.sample

    def sample(logits: torch.Tensor, sequences: list[Sequence], *more: Any) -> list[Sample]:
        samples = choose(logits, sequences, *more)
        if bad in sequences and bad.num_generated_tokens == 4:
            raise fault
        return samples

    monkeypatch.setattr(engine_module, "sample", sample)
    assert set(asked.finish()) == {AT_FAULT}
    assert tokens(neighbours) == alone


def test_a_fault_in_a_rows_text_is_its_own(asked: Asked, alone: dict[str, list[int]]) -> None:
    neighbours = add_neighbours(asked)
    bad = asked.add(AT_FAULT, GOOD)

    def append(token_id: int) -> str:
        raise MemoryError

    bad.detokenizer.append = append  # type: ignore[method-assign]
    errors = asked.finish()
    assert {name: type(error) for name, error in errors.items()} == {AT_FAULT: GenerationError}
    assert tokens(neighbours) == alone


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("place", ["reading", "copying"])
def test_a_prefix_that_finds_no_memory_fails_its_own_rows(
    asked: Asked, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, fault: Exception, place: str
) -> None:
    class Short(dict[str, Prefix]):
        def __getitem__(self, name: str) -> Prefix:
            if name == OTHER:
                raise fault
            return super().__getitem__(name)

    neighbours = add_neighbours(asked)
    bad = [asked.add(f"{AT_FAULT} {i}", OTHER) for i in range(2)]
    write, num_written = asked.engine.runner.kv_blocks.write, 0

    def write_some(layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        nonlocal num_written
        other = asked.prefixes[OTHER].layers[1][0]
        if key.shape == other.shape and torch.equal(key, other):
            num_written += 1
            write(layer, slots, torch.full_like(key, float("nan")), value)  # whatever was there
            raise fault
        write(layer, slots, key, value)

    kept = asked.prefixes
    if place == "reading":
        asked.prefixes = Short(kept)
    else:
        monkeypatch.setattr(asked.engine.runner.kv_blocks, "write", write_some)
    errors = asked.finish()
    assert {name: type(error) for name, error in errors.items()} == {
        sequence.request_id: PrefixLoadError for sequence in bad
    }
    assert tokens(neighbours) == alone
    assert num_written == (place == "copying")
    assert asked.engine.residents.get(OTHER) is None
    assert asked.engine.residents.counts.num_failed_loads == 1


@pytest.mark.parametrize("place", ["computing", "checking"])
def test_a_soft_prompt_that_finds_no_memory_fails_its_own_rows(
    asked: Asked, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    neighbours = add_neighbours(asked)
    asked.add(AT_FAULT, SOFT)

    def is_finite(block_ids: list[int]) -> bool:
        raise MemoryError

    make = engine_module.batch_of

    def batch_of(rows: list[Row], sampled: set[Row], kv_blocks: KVBlocks, computed: list[Any], **more: Any) -> Batch:
        if any(resident.num_computed_tokens for resident in computed):  # its second part
            raise MemoryError
        return make(rows, sampled, kv_blocks, computed, **more)

    if place == "computing":
        monkeypatch.setattr(engine_module, "batch_of", batch_of)
    else:
        monkeypatch.setattr(asked.engine.runner.kv_blocks, "is_finite", is_finite)
    errors = asked.finish()
    assert {name: type(error) for name, error in errors.items()} == {AT_FAULT: PrefixLoadError}
    assert tokens(neighbours) == alone
    assert asked.engine.residents.get(SOFT) is None
