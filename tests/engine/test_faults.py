"""A fault that shows only at run time, here a prefix with a NaN in it, fails its own rows and no neighbour: with the
model's own modules and with kernels, each row by itself and where rows share the prefix's attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_store.prefix import ModelShape, Prefix
from server.engine import batch
from server.engine.attention import NAME
from server.engine.cpu_kernels import CpuKernels
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine
from server.engine.errors import EngineError, GenerationError, PrefixLoadError
from server.engine.fused_modules import fuse_modules
from server.engine.kv_blocks import KVBlocks, split_pool
from server.engine.model_families import prepare
from server.engine.model_measures import measure_shape
from server.engine.model_runner import ModelRunner
from server.engine.reordered_weights import reorder_weights
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Composition, PrefixRef, Sequence
from tests.cases import WholeSteps
from tests.tiny_models import FAMILIES, SEQ2SEQ_FAMILIES, letter_tokenizer, seq2seq_model

GOOD, BAD, SOFT = "good", "bad", "bad and soft"


def make_prefix(shape: ModelShape, value: float) -> Prefix:
    """`value` reaches the rows' own keys through the first layer."""
    made = torch.randn(2, shape.num_kv_heads, 5, shape.head_dim)
    made[1, :, 2] = value
    layers = {0: (made[0], made[1])}
    if not shape.is_encoder_decoder:
        return Prefix("kv", layers)
    return Prefix("kv", layers, encoder=layers, is_seq2seq=True)


def make_prefixes(shape: ModelShape) -> dict[str, Prefix]:
    """Those of 5 tokens, and a soft prompt of 9."""
    embeddings = torch.full((9, shape.hidden_size), float("nan"))
    soft = Prefix("soft", embeddings=embeddings, is_seq2seq=shape.is_encoder_decoder)
    return {GOOD: make_prefix(shape, 1.0), BAD: make_prefix(shape, float("nan")), SOFT: soft}


@pytest.fixture(params=["plain", "shared", "kernels", "kernels-shared"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    way: str = request.param
    if "shared" in way:
        monkeypatch.setattr(batch, "MIN_SHARED_TOKENS", 1)
    return way


@pytest.fixture(params=["llama", "t5", "bart"])
def engine(request: pytest.FixtureRequest, way: str, kernels: CpuKernels) -> Engine:
    torch.manual_seed(0)
    if request.param == "llama":
        model: Any = AutoModelForCausalLM.from_config(FAMILIES["llama"](), attn_implementation=NAME)
    else:
        model = seq2seq_model(SEQ2SEQ_FAMILIES[request.param]())
        model.set_attn_implementation(NAME)
        prepare(model)
    used = kernels if "kernels" in way else None
    if used is not None:
        model.eval().requires_grad_(False)
        reorder_weights(model)
        fuse_modules(model, used)
    shape = measure_shape(model, "tiny", "none")
    prefixes = make_prefixes(shape)
    num_blocks, num_prefix_blocks = split_pool(20 * 16, 8 * 16)
    runner = ModelRunner(model, shape, KVBlocks(shape, num_blocks, torch.device("cpu"), used))
    return WholeSteps(
        runner, lambda ref: prefixes[ref.digest], num_prefix_blocks=num_prefix_blocks, max_rows=8, max_step_tokens=40
    )


def make_sequence(engine: Engine, request_id: str, num_tokens: int, *members: str) -> Sequence:
    kinds = {name: prefix.layout for name, prefix in make_prefixes(engine.runner.shape).items()}
    behind: list[Composition] = [() if name == "bare" else (PrefixRef(name, kinds[name]),) for name in members]
    prompt = [3 + i % 90 for i in range(num_tokens)]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    detokenizer = Detokenizer(letter_tokenizer())
    return Sequence(request_id, prompt, params, detokenizer, tuple(behind), engine.runner.decoder_start_ids)


def run(engine: Engine, *sequences: Sequence) -> tuple[list[list[int]], dict[str, EngineError]]:
    errors: dict[str, EngineError] = {}
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                errors[output.sequence.request_id] = output.error
        engine.check_integrity()
    return [sequence.output_token_ids for sequence in sequences], errors


@pytest.fixture
def alone(engine: Engine) -> list[list[int]]:
    return [run(engine, make_sequence(engine, name, 30, name))[0][0] for name in (GOOD, "bare")]


def test_rows_behind_a_bad_prefix_fail_and_their_neighbours_do_not(engine: Engine, alone: list[list[int]]) -> None:
    bad = make_sequence(engine, BAD, 30, BAD)
    ensemble = make_sequence(engine, "ensemble", 30, GOOD, BAD)
    neighbours = [make_sequence(engine, name, 30, name) for name in (GOOD, "bare")]
    answers, errors = run(engine, bad, *neighbours, ensemble)
    assert answers == [[], *alone, []]
    assert {name: type(error) for name, error in errors.items()} == {
        BAD: GenerationError,
        "ensemble": GenerationError,
    }
    assert errors[BAD].is_versions_fault


def test_rows_that_share_a_bad_prefix_fail_and_those_that_share_a_good_one_do_not(engine: Engine) -> None:
    """All start in one step, a text short enough for it."""
    names = [BAD, GOOD, BAD, "bare", GOOD]
    alone = [run(engine, make_sequence(engine, name, 7, name))[0][0] for name in (GOOD, "bare")]
    answers, errors = run(engine, *(make_sequence(engine, f"{name} {i}", 7, name) for i, name in enumerate(names)))
    assert answers == [[], alone[0], [], alone[1], alone[0]]
    assert set(errors) == {f"{BAD} 0", f"{BAD} 2"}


@pytest.mark.parametrize("ended", ["failed", "aborted"])
def test_whoever_gets_a_failed_rows_blocks_is_not_hurt(engine: Engine, alone: list[list[int]], ended: str) -> None:
    """Blocks come back last in, first out; a new row's last block is partly what the one before left there."""
    bad = make_sequence(engine, BAD, 60, BAD)
    engine.add(bad)
    while engine.has_work and not bad.rows[0].num_computed_tokens:
        engine.step()
    assert engine.has_work or engine.runner.shape.is_encoder_decoder  # a decoder has read only a part of the prompt
    if ended == "aborted":
        engine.abort(BAD)
    while engine.has_work:
        engine.step()
    answers, errors = run(engine, *(make_sequence(engine, name, 30, name) for name in (GOOD, "bare")))
    assert not errors
    assert answers == alone


def test_a_soft_prompt_whose_keys_are_not_finite_is_not_loaded_and_leaves_nothing(
    engine: Engine, alone: list[list[int]]
) -> None:
    """Blocks come back last in, first out; the good prefix's last block is partly what the bad one left there."""
    if engine.runner.shape.is_encoder_decoder:
        pytest.skip("its soft prompts have no keys of their own")
    assert engine.residents.evict(GOOD)
    answers, errors = run(engine, make_sequence(engine, SOFT, 30, SOFT))
    assert (answers, type(errors[SOFT])) == ([[]], PrefixLoadError)
    assert "finite" in str(errors[SOFT])
    assert errors[SOFT].is_versions_fault
    answers, errors = run(engine, *(make_sequence(engine, name, 30, name) for name in (GOOD, "bare")))
    assert not errors
    assert answers == alone
