"""Every seq2seq artefact type, made by PEFT with random weights, on tiny encoder-decoders: our greedy tokens, all tasks
mixed in one batch, against PEFT's batch of one. Ties (its two best logits within 1e-3) are printed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForSeq2SeqLM

from prefix_store.peft_format import read_peft
from prefix_store.prefix import Layers, ModelShape, Prefix
from server.engine.batch import AttentionGroup, batch_of
from server.engine.engine import Engine
from server.engine.kv_blocks import KVBlocks, prefix_blocks
from server.engine.model_runner import ModelRunner, load_model, measure_shape
from server.engine.resident_prefixes import ResidentPrefix
from server.engine.sequence import PrefixRef, Row
from tests.cases import NEW_TOKENS, Case, run_ours, wrong
from tests.tiny_models import SEQ2SEQ_FAMILIES, VOCAB, seq2seq_model

SEQ2SEQ = {"task_type": TaskType.SEQ_2_SEQ_LM}
TYPES: dict[str, Callable[[dict[str, int]], Any]] = {
    "prompt": lambda _: PromptTuningConfig(**SEQ2SEQ, num_virtual_tokens=6),
    "p_tuning": lambda _: PromptEncoderConfig(**SEQ2SEQ, num_virtual_tokens=4, encoder_hidden_size=16),
    "multitask": lambda _: MultitaskPromptTuningConfig(
        **SEQ2SEQ, num_virtual_tokens=5, num_tasks=3, num_ranks=2, prompt_tuning_init="RANDOM"
    ),
    "prefix": lambda sizes: PrefixTuningConfig(**SEQ2SEQ, **sizes, num_virtual_tokens=7),
    "projected": lambda sizes: PrefixTuningConfig(
        **SEQ2SEQ, **sizes, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
    ),
    "cartridge": lambda sizes: CartridgeConfig(**SEQ2SEQ, **sizes, num_virtual_tokens=18),
}
MULTITASK_INDEX = 1
World = tuple[Any, ModelShape, dict[str, Prefix], list[Case]]


@pytest.fixture(scope="module", params=list(SEQ2SEQ_FAMILIES))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp(request.param)
    seq2seq_model(SEQ2SEQ_FAMILIES[request.param]()).save_pretrained(folder / "model")
    ours = load_model(folder / "model", torch.float32, torch.device("cpu"))
    shape = replace(measure_shape(ours, "tiny", "none"), max_virtual_tokens=64)
    prefixes, cases = {}, []
    for i, task in enumerate([*TYPES, "bare", *TYPES, "bare again"]):
        prompt = torch.randint(3, VOCAB, (4 + 7 * i % 31,)).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case, prefix = _case(f"{task} {i}", task, prompt, folder, shape)
        cases.append(case)
        if prefix is not None:
            prefixes[case.name] = prefix
    gc.collect()
    return ours, shape, prefixes, cases


def _case(name: str, task: str, prompt: list[int], folder: Path, shape: ModelShape) -> tuple[Case, Prefix | None]:
    reference: Any = AutoModelForSeq2SeqLM.from_pretrained(folder / "model", attn_implementation="eager")
    prefix, more = None, {}
    if task in TYPES:
        reference = get_peft_model(reference, TYPES[task]({"token_dim": shape.num_kv_heads * shape.head_dim}))
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.8
        reference.eval().save_pretrained(folder / name)
        if task == "multitask":
            more["task_ids"] = torch.tensor([MULTITASK_INDEX])
        prefix = read_peft(
            (folder / name / "adapter_config.json").read_bytes(),
            (folder / name / "adapter_model.safetensors").read_bytes(),
            shape,
            MULTITASK_INDEX if task == "multitask" else None,
        )
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = reference.eval().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )
    tokens = out.sequences[0, 1:].tolist()  # the first is the decoder's start
    assert len(tokens) == NEW_TOKENS
    members = ((name,),) if prefix else ((),)
    return Case(name, prompt, members, tokens, torch.cat(out.logits).float()), prefix


def test_the_references_answers_can_prove_something(world: World) -> None:
    _, _, _, cases = world
    assert len({token for case in cases for token in case.tokens}) >= 8
    assert len({tuple(case.tokens) for case in cases}) == len(cases)


@pytest.mark.parametrize("stagger", [1, 20])
def test_mixed_tokens_equal_peft_alone(world: World, stagger: int) -> None:
    model, shape, prefixes, cases = world
    assert not wrong(cases, run_ours(model, shape, cases, prefixes, stagger=stagger))


def test_tokens_equal_peft_after_eviction_and_preemption(world: World) -> None:
    model, shape, prefixes, cases = world
    seen = {"evictions": 0, "preemptions": 0}

    def count(engine: Engine) -> None:
        seen["evictions"] = engine.residents.counts.num_evictions
        seen["preemptions"] = engine.scheduler.num_preemptions

    answers = run_ours(model, shape, cases, prefixes, kv=10 * 16, room=5 * 16, stagger=20, each_step=count)
    assert not wrong(cases, answers)
    assert min(seen.values()) >= 3, seen


def test_first_step_logits_equal_peft(world: World) -> None:
    """All rows start in one step, so their encoder texts are packed too."""
    model, shape, prefixes, cases = world
    kv_blocks = KVBlocks(shape, 128, torch.device("cpu"))
    runner = ModelRunner(model, shape, kv_blocks)
    free = iter(range(1, 128))
    rows = []
    for case in cases:
        refs = tuple(PrefixRef(name, prefixes[name].layout) for name in case.members[0])
        row = Row(refs, case.prompt, runner.decoder_start_ids, 1)
        for ref in refs:
            blocks = [next(free) for _ in range(prefix_blocks(ref.layout, shape))]
            row.residents.append(ResidentPrefix(ref, blocks))
            runner.load(prefixes[ref.digest], row.residents[-1])
        row.block_table, row.cross_table = [next(free)], [next(free) for _ in range(row.max_blocks - 1)]
        row.num_scheduled_tokens = 1
        rows.append(row)
    logits = runner.run(batch_of(rows, set(rows), kv_blocks))
    for case, found in zip(cases, logits, strict=True):
        limit = 1e-4 * max(1.0, float(case.logits[0].abs().max()))
        assert float((found - case.logits[0]).abs().max()) < limit, case.name


def without_last_token(layers: Layers) -> Layers:
    return {i: (key[:, :-1], value[:, :-1]) for i, (key, value) in layers.items()}


def concerned(found: list[str]) -> set[str]:
    return {text.partition(" at ")[0] for text in found}


@pytest.mark.parametrize(("one", "other"), [("prompt 0", "p_tuning 1"), ("prefix 3", "projected 4")])
def test_swapped_prefixes_are_noticed(world: World, one: str, other: str) -> None:
    model, shape, prefixes, cases = world
    swapped = prefixes | {one: prefixes[other], other: prefixes[one]}
    assert concerned(wrong(cases, run_ours(model, shape, cases, swapped, stagger=20))) == {one, other}


@pytest.mark.parametrize("name", ["prompt 0", "multitask 2", "prefix 3", "cartridge 5"])
def test_a_dropped_virtual_token_is_noticed(world: World, name: str) -> None:
    model, shape, prefixes, cases = world
    full = prefixes[name]
    embeddings = None if full.embeddings is None else full.embeddings[:-1]
    short = replace(full, embeddings=embeddings, layers=without_last_token(full.layers))
    found = wrong(cases, run_ours(model, shape, cases, prefixes | {name: short}, stagger=20))
    assert concerned(found) == {name}


def test_decoder_text_one_position_too_far_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """BART's positions, T5's distances from the prefix; without one T5 cannot see a shift of everything."""
    model, shape, prefixes, cases = world
    num_shared = Row._num_shared
    monkeypatch.setattr(Row, "_num_shared", lambda row, part: num_shared(row, part) + (part == "decoder"))
    found = concerned(wrong(cases, run_ours(model, shape, cases, prefixes, stagger=20)))
    behind_kv = {name for name, prefix in prefixes.items() if prefix.kind == "kv"}
    assert found == ({case.name for case in cases} if model.config.model_type == "bart" else behind_kv)


def test_shifted_bias_distances_are_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape, prefixes, cases = world
    if model.config.model_type == "bart":
        pytest.skip("BART has no bias")
    bias = AttentionGroup.bias
    monkeypatch.setattr(AttentionGroup, "bias", lambda group, by_distance: bias(group, by_distance.roll(1, 0)))
    found = concerned(wrong(cases, run_ours(model, shape, cases, prefixes, stagger=20)))
    assert len(found) >= len(cases) - 2
