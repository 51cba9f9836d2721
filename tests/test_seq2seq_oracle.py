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
from prefix_store.prefix import ModelShape, Prefix
from server.engine.batch import AttentionGroup, batch_of
from server.engine.cpu_kernels import CpuKernels
from server.engine.kv_blocks import KVBlocks, prefix_blocks
from server.engine.model_runner import ModelRunner
from server.engine.resident_prefix import ResidentPrefix
from server.engine.sequence import PrefixRef, Row
from tests.cases import (
    PATHS,
    Case,
    Reference,
    World,
    generated,
    share_every_prefix,
    tiny_shape,
    without_last_token,
)
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


@pytest.fixture(scope="module", params=list(SEQ2SEQ_FAMILIES))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp(request.param)
    model = seq2seq_model(SEQ2SEQ_FAMILIES[request.param]())
    model.save_pretrained(folder / "model")
    prefixes, cases = {}, []
    for i, task in enumerate([*TYPES, "bare", *TYPES, "bare again"]):
        prompt = torch.randint(3, VOCAB, (4 + 7 * i % 31,)).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case, prefix = _case(f"{task} {i}", task, prompt, folder, tiny_shape(model))
        cases.append(case)
        if prefix is not None:
            prefixes[case.name] = prefix
    gc.collect()
    return Reference(folder / "model", prefixes, cases)


@pytest.fixture(scope="module", params=PATHS)
def world(request: pytest.FixtureRequest, reference: Reference, kernels: CpuKernels) -> World:
    return reference.world(request.param, kernels)


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
    tokens, logits = generated(reference, prompt, **more)
    members = ((name,),) if prefix else ((),)
    return Case(name, prompt, members, tokens, logits), prefix


def test_the_references_answers_can_prove_something(world: World) -> None:
    world.check_proves_something()


@pytest.mark.parametrize("stagger", [1, 20])
def test_mixed_tokens_equal_peft_alone(world: World, stagger: int) -> None:
    assert not world.answers(stagger=stagger)


def test_tokens_equal_peft_after_eviction_and_preemption(world: World) -> None:
    world.check_after_eviction_and_preemption(kv=10 * 16, room=5 * 16)


@pytest.mark.parametrize("stagger", [1, 40])
def test_tokens_of_rows_that_share_a_prefix_equal_peft_alone(
    world: World, stagger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BART's decoder attends to it once for both rows; T5 weighs its keys by their distance from each row's query."""
    num_shared = share_every_prefix(monkeypatch)
    assert not world.twice().answers(stagger=stagger)
    assert max(num_shared) >= 4


def test_first_step_logits_equal_peft(world: World) -> None:
    """All rows start in one step, so their encoder texts are packed too."""
    shape, prefixes, cases = world.shape, world.prefixes, world.cases
    kv_blocks = KVBlocks(shape, 128, torch.device("cpu"), world.kernels)
    runner = ModelRunner(world.model, shape, kv_blocks)
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


@pytest.mark.parametrize(("one", "other"), [("prompt 0", "p_tuning 1"), ("prefix 3", "projected 4")])
def test_swapped_prefixes_are_noticed(world: World, one: str, other: str) -> None:
    world.check_notices({one: world.prefixes[other], other: world.prefixes[one]}, one, other)


@pytest.mark.parametrize("name", ["prompt 0", "multitask 2", "prefix 3", "cartridge 5"])
def test_a_dropped_virtual_token_is_noticed(world: World, name: str) -> None:
    full = world.prefixes[name]
    embeddings = None if full.embeddings is None else full.embeddings[:-1]
    world.check_notices({name: replace(full, embeddings=embeddings, layers=without_last_token(full.layers))}, name)


def test_decoder_text_one_position_too_far_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """BART's positions, T5's distances from the prefix; without one T5 cannot see a shift of everything."""
    num_shared = Row._num_shared
    monkeypatch.setattr(Row, "_num_shared", lambda row, part: num_shared(row, part) + (part == "decoder"))
    behind_kv = {name for name, prefix in world.prefixes.items() if prefix.kind == "kv"}
    is_bart = world.model.config.model_type == "bart"
    assert world.wrong_names() == ({case.name for case in world.cases} if is_bart else behind_kv)


def test_shifted_bias_distances_are_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    if world.model.config.model_type == "bart":
        pytest.skip("BART has no bias")
    bias = AttentionGroup.bias
    monkeypatch.setattr(AttentionGroup, "bias", lambda group, by_distance: bias(group, by_distance.roll(1, 0)))
    assert len(world.wrong_names()) >= len(world.cases) - 2
