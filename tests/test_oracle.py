"""Every causal artefact type, made by PEFT with random weights, on tiny models of many families: our greedy tokens, all
tasks mixed in one batch, against PEFT's batch of one. Ties (its two best logits within 1e-3) are printed."""

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
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from prefix_store.peft_format import read_peft
from prefix_store.prefix import Prefix
from server.engine import batch
from server.engine.cpu_kernels import CpuKernels
from server.engine.kv_blocks import KVBlocks
from server.engine.model_runner import ModelRunner
from server.engine.resident_prefix import ResidentPrefix
from server.engine.sequence import PrefixRef, Row
from tests.cases import (
    WAYS,
    Case,
    Reference,
    World,
    generated,
    share_every_prefix,
    tiny_shape,
    without_last_token,
)
from tests.tiny_models import FAMILIES, VOCAB

CAUSAL = TaskType.CAUSAL_LM
TYPES: dict[str, Callable[[], Any]] = {
    "prompt": lambda: PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=6),
    "p_tuning": lambda: PromptEncoderConfig(task_type=CAUSAL, num_virtual_tokens=4, encoder_hidden_size=16),
    "multitask": lambda: MultitaskPromptTuningConfig(
        task_type=CAUSAL, num_virtual_tokens=5, num_tasks=3, num_ranks=2, prompt_tuning_init="RANDOM"
    ),
    "cpt": lambda: CPTConfig(
        task_type=CAUSAL,
        cpt_token_ids=[5, 9, 14],
        cpt_mask=[1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3],
        num_virtual_tokens=3,
    ),
    "prefix": lambda: PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=7),
    "projected": lambda: PrefixTuningConfig(
        task_type=CAUSAL, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
    ),
    "cartridge": lambda: CartridgeConfig(task_type=CAUSAL, num_virtual_tokens=8),
}
MULTITASK_INDEX = 2


@pytest.fixture(scope="module", params=list(FAMILIES))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp(request.param)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param]()).float()
    model.save_pretrained(folder / "model")
    prefixes, cases = {}, []
    for i, task in enumerate([*TYPES, None]):
        prompt = torch.randint(3, VOCAB, (3 + 4 * i % 17,)).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case, prefix = _case(task, prompt, folder, tiny_shape(model))
        cases.append(case)
        if prefix is not None:
            prefixes[case.name] = prefix
    gc.collect()
    return Reference(folder / "model", prefixes, cases)


@pytest.fixture(scope="module", params=WAYS)
def world(request: pytest.FixtureRequest, reference: Reference, kernels: CpuKernels) -> World:
    return reference.world(request.param, kernels)


def _case(task: str | None, prompt: list[int], folder: Path, shape: Any) -> tuple[Case, Prefix | None]:
    reference: Any = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    prefix, more = None, {}
    if task is not None:
        reference = get_peft_model(reference, TYPES[task]())
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter)
        reference.eval().save_pretrained(folder / task)
        if task == "multitask":
            more["task_ids"] = torch.tensor([MULTITASK_INDEX])
        prefix = read_peft(
            (folder / task / "adapter_config.json").read_bytes(),
            (folder / task / "adapter_model.safetensors").read_bytes(),
            shape,
            MULTITASK_INDEX if task == "multitask" else None,
        )
    tokens, logits = generated(reference, prompt, **more)
    members = ((task,),) if task else ((),)
    return Case(task or "bare", prompt, members, tokens, logits), prefix


def test_the_references_answers_can_prove_something(world: World) -> None:
    world.check_proves_something()


@pytest.mark.parametrize("stagger", [1, 20])
@pytest.mark.parametrize("max_step_tokens", [5, 24])
def test_mixed_tokens_equal_peft_alone(world: World, max_step_tokens: int, stagger: int) -> None:
    """Of 5 tokens a step most prompts are read in several."""
    options = {"max_rows": min(24, max_step_tokens), "max_step_tokens": max_step_tokens}
    assert not world.answers(stagger=stagger, **options)


@pytest.mark.parametrize("stagger", [1, 20])
@pytest.mark.parametrize("max_step_tokens", [5, 24])
def test_tokens_of_rows_that_share_a_prefixs_attention_equal_peft_alone(
    world: World, max_step_tokens: int, stagger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows have each prefix: both start, or one while the other decodes."""
    num_shared = share_every_prefix(monkeypatch)
    options = {"max_rows": min(24, max_step_tokens), "max_step_tokens": max_step_tokens}
    assert not world.twice().answers(stagger=stagger, **options)
    assert max(num_shared) >= (4 if max_step_tokens == 24 else 2)


def test_first_step_logits_equal_peft(world: World) -> None:
    kv_blocks = KVBlocks(world.shape, 64, torch.device("cpu"), world.kernels)
    prefixes, cases = world.prefixes, world.cases
    runner = ModelRunner(world.model, world.shape, kv_blocks)
    free = iter(range(1, 64))
    rows, computed = [], []
    for case in cases:
        row = Row((), case.prompt, (), 1)
        if case.name in prefixes:
            ref = PrefixRef(case.name, prefixes[case.name].layout)
            resident = ResidentPrefix(ref, [next(free)])
            runner.load(prefixes[case.name], resident)
            resident.num_scheduled_tokens = resident.num_uncomputed_tokens
            computed += [resident] if resident.num_scheduled_tokens else []
            row = Row((ref,), case.prompt, (), 1)
            row.residents = [resident]
        row.block_table = [next(free), next(free)]
        row.num_scheduled_tokens = len(case.prompt)
        rows.append(row)
    logits = runner.run(batch.batch_of(rows, set(rows), kv_blocks, computed))
    for case, found in zip(cases, logits, strict=True):
        assert float((found - case.logits[0]).abs().max()) < 1e-4 * max(1.0, float(case.logits[0].abs().max())), (
            case.name
        )


def test_swapped_prefixes_are_noticed(world: World) -> None:
    prefix, cartridge = world.prefixes["prefix"], world.prefixes["cartridge"]
    world.check_notices({"prefix": cartridge, "cartridge": prefix}, "prefix", "cartridge")


def test_a_dropped_virtual_token_is_noticed(world: World) -> None:
    full = world.prefixes["prefix"]
    world.check_notices({"prefix": replace(full, layers=without_last_token(full.layers))}, "prefix")


def test_shifted_positions_are_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = batch.batch_of

    def shifted(*args: Any, **more: Any) -> batch.Batch:
        found = made(*args, **more)
        # Relative positions do not see a shift of everything: text moves, what a row has already written does not.
        far = torch.where(found.position_ids > 12, found.position_ids + 1, found.position_ids)
        return replace(found, position_ids=far)

    monkeypatch.setattr("server.engine.engine.batch_of", shifted)
    assert world.answers()
