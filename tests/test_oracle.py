"""Every causal artefact type, made by PEFT with random weights, on tiny models of many families: our greedy tokens, all
tasks mixed in one batch, against PEFT's batch of one. Ties (its two best logits within 1e-3) are printed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from prefix_store.prefix import ModelShape, Prefix
from server.engine import batch
from server.engine.cpu_kernels import CpuKernels
from server.engine.kv_blocks import KVBlocks
from server.engine.model_runner import ModelRunner, load_model, measure_shape
from server.engine.resident_prefixes import ResidentPrefix
from server.engine.self_check import self_check
from server.engine.sequence import PrefixRef, Row
from tests.cases import NEW_TOKENS, Case, run_ours, wrong
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


WAYS = ("plain", "reordered", "kernels")


@dataclass(frozen=True)
class World:
    """The model with our attention, computing in one of the ways that the server may take."""

    model: Any
    shape: ModelShape
    prefixes: dict[str, Prefix]
    cases: list[Case]
    kernels: CpuKernels | None

    def answers(self, prefixes: dict[str, Prefix]) -> list[str]:
        """What is wrong."""
        return wrong(self.cases, run_ours(self.model, self.shape, self.cases, prefixes, kernels=self.kernels))


@pytest.fixture(scope="module", params=[f"{name}-{way}" for name in FAMILIES for way in WAYS])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kernels: CpuKernels) -> World:
    torch.manual_seed(3)
    name, way = request.param.split("-")
    used = kernels if way == "kernels" else None
    folder = tmp_path_factory.mktemp(name)
    config = FAMILIES[name]()
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / "model")
    ours = load_model(folder / "model", torch.float32, torch.device("cpu"), reorders=way != "plain", kernels=used)
    shape = replace(measure_shape(ours, "tiny", "none"), max_virtual_tokens=64)
    self_check(ours, shape, used)
    prefixes, cases = {}, []
    for i, task in enumerate([*TYPES, None]):
        prompt = torch.randint(3, VOCAB, (3 + 4 * i % 17,)).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case, prefix = _case(task, prompt, folder, shape)
        cases.append(case)
        if prefix is not None:
            prefixes[case.name] = prefix
    gc.collect()
    return World(ours, shape, prefixes, cases, used)


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
    tokens = out.sequences[0, len(prompt) :].tolist()
    assert len(tokens) == NEW_TOKENS
    members = ((task,),) if task else ((),)
    return Case(task or "bare", prompt, members, tokens, torch.cat(out.logits).float()), prefix


def test_the_references_answers_can_prove_something(world: World) -> None:
    assert len({token for case in world.cases for token in case.tokens}) >= 8
    assert len({tuple(case.tokens) for case in world.cases}) == len(world.cases)


def test_mixed_tokens_equal_peft_alone(world: World) -> None:
    assert not world.answers(world.prefixes)


def test_tokens_of_rows_that_share_a_prefixs_attention_equal_peft_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prefix counts as long, and two rows have each: one starts while the other decodes."""
    monkeypatch.setattr(batch, "MIN_SHARED_TOKENS", 1)
    again = [replace(case, name=f"{case.name}-again") for case in world.cases]
    pairs = replace(world, cases=[case for pair in zip(world.cases, again, strict=True) for case in pair])
    made, num_shared = batch.make_batch, []

    def counted(*args: Any, **more: Any) -> batch.Batch:
        found = made(*args, **more)
        num_shared.append(len(found.shared_keys))
        return found

    monkeypatch.setattr(batch, "make_batch", counted)
    assert not pairs.answers(world.prefixes)
    assert max(num_shared) >= 4


def test_first_step_logits_equal_peft(world: World) -> None:
    kv_blocks = KVBlocks(world.shape, 64, torch.device("cpu"), world.kernels)
    prefixes, cases = world.prefixes, world.cases
    runner = ModelRunner(world.model, world.shape, kv_blocks)
    free = iter(range(1, 64))
    rows = []
    for case in cases:
        row = Row((), case.prompt, (), 1)
        if case.name in prefixes:
            ref = PrefixRef(case.name, prefixes[case.name].layout)
            resident = ResidentPrefix(ref, [next(free)])
            runner.load(prefixes[case.name], resident)
            row = Row((ref,), case.prompt, (), 1)
            row.residents = [resident]
        row.block_table = [next(free), next(free)]
        row.num_scheduled_tokens = len(case.prompt)
        rows.append(row)
    logits = runner.run(batch.batch_of(rows, set(rows), kv_blocks))
    for case, found in zip(cases, logits, strict=True):
        assert float((found - case.logits[0]).abs().max()) < 1e-4 * max(1.0, float(case.logits[0].abs().max())), (
            case.name
        )


def test_swapped_prefixes_are_noticed(world: World) -> None:
    prefixes = dict(world.prefixes)
    prefixes["prefix"], prefixes["cartridge"] = prefixes["cartridge"], prefixes["prefix"]
    assert world.answers(prefixes)


def test_a_dropped_virtual_token_is_noticed(world: World) -> None:
    prefixes = dict(world.prefixes)
    layers = {i: (k[:, :-1], v[:, :-1]) for i, (k, v) in prefixes["prefix"].layers.items()}
    prefixes["prefix"] = replace(prefixes["prefix"], layers=layers)
    assert [case for case in world.answers(prefixes) if case.startswith("prefix")]


def test_shifted_positions_are_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = batch.batch_of

    def shifted(*args: Any) -> batch.Batch:
        found = made(*args)
        # Relative positions do not see a shift of everything: text moves, what a row has already written does not.
        far = torch.where(found.position_ids > 12, found.position_ids + 1, found.position_ids)
        return replace(found, position_ids=far)

    monkeypatch.setattr("server.engine.engine.batch_of", shifted)
    assert world.answers(world.prefixes)
