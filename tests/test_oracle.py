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
from prefix_store.prefix import Prefix
from server.engine import batch
from server.engine.detokenizer import Detokenizer
from server.engine.engine import Engine, split_pool
from server.engine.kv_blocks import KVBlocks
from server.engine.model_runner import ModelRunner, load_model, measure_shape
from server.engine.resident_prefixes import ResidentPrefix
from server.engine.sampling_params import SamplingParams
from server.engine.self_check import self_check
from server.engine.sequence import PrefixRef, Row, Sequence
from tests.tiny_models import FAMILIES, VOCAB, letter_tokenizer

NEW_TOKENS, TIE = 32, 1e-3

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


@dataclass
class Case:
    """One task's prompt and what PEFT answers to it, alone."""

    task: str
    prompt: list[int]
    prefix: Prefix | None
    tokens: list[int]
    logits: torch.Tensor  # [NEW_TOKENS, VOCAB]


@pytest.fixture(scope="module", params=[(name, reorders) for name in FAMILIES for reorders in (True, False)], ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[Case]]:
    """The model with our attention, its shape, and the cases."""
    torch.manual_seed(3)
    name, reorders = request.param
    folder = tmp_path_factory.mktemp(name)
    config = FAMILIES[name]()
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / "model")
    ours = load_model(folder / "model", torch.float32, torch.device("cpu"), reorders=reorders)
    shape = replace(measure_shape(ours, "tiny", "none"), max_virtual_tokens=64)
    self_check(ours, shape)
    cases = []
    for i, task in enumerate([*TYPES, None]):
        prompt = torch.randint(3, VOCAB, (3 + 4 * i % 17,)).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cases.append(_case(task, prompt, folder, shape))
    gc.collect()
    return ours, shape, cases


def _case(task: str | None, prompt: list[int], folder: Path, shape: Any) -> Case:
    reference: Any = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    prefix, more = None, {}
    if task is not None:
        reference = get_peft_model(reference, TYPES[task]())
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.6
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
    return Case(task or "bare", prompt, prefix, tokens, torch.cat(out.logits).float())


def run_ours(model: Any, shape: Any, cases: list[Case], prefixes: dict[str, Prefix]) -> list[list[int]]:
    """All cases in one engine, arriving one a step, the long ones in chunks."""
    tokenizer = letter_tokenizer()
    num_blocks, num_prefix_blocks = split_pool(2048, 512)
    runner = ModelRunner(model, shape, KVBlocks(shape, num_blocks, torch.device("cpu")))
    engine = Engine(runner, prefixes.__getitem__, num_prefix_blocks=num_prefix_blocks, max_rows=16, max_step_tokens=16)
    rows = []
    for case in cases:
        members = ((PrefixRef(case.task, prefixes[case.task].layout),),) if case.task in prefixes else ((),)
        params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        rows.append(Sequence(case.task, case.prompt, params, Detokenizer(tokenizer), members))
    arriving = list(rows)
    while arriving or engine.has_work:
        if arriving:
            engine.add(arriving.pop(0))
        for output in engine.step():
            assert output.error is None, output.error
        engine.check_integrity()
    return [row.output_token_ids for row in rows]


def wrong(cases: list[Case], answers: list[list[int]]) -> list[str]:
    """Cases whose first difference from PEFT is not a tie."""
    found = []
    for case, answer in zip(cases, answers, strict=True):
        for i, (ours, theirs) in enumerate(zip(answer, case.tokens, strict=True)):
            if ours == theirs:
                continue
            best = case.logits[i].topk(2).values
            if float(best[0] - best[1]) < TIE:
                print(f"tie: {case.task} at token {i}, {float(best[0] - best[1]):.2g}")
            else:
                found.append(f"{case.task} at token {i}: {ours} for {theirs}")
            break
    return found


def prefixes_of(cases: list[Case]) -> dict[str, Prefix]:
    return {case.task: case.prefix for case in cases if case.prefix is not None}


def test_the_references_answers_can_prove_something(family: tuple[Any, Any, list[Case]]) -> None:
    _, _, cases = family
    assert len({token for case in cases for token in case.tokens}) >= 8
    assert len({tuple(case.tokens) for case in cases}) == len(cases)


def test_mixed_tokens_equal_peft_alone(family: tuple[Any, Any, list[Case]]) -> None:
    model, shape, cases = family
    assert not wrong(cases, run_ours(model, shape, cases, prefixes_of(cases)))


def test_first_step_logits_equal_peft(family: tuple[Any, Any, list[Case]]) -> None:
    model, shape, cases = family
    kv_blocks = KVBlocks(shape, 64, torch.device("cpu"))
    runner = ModelRunner(model, shape, kv_blocks)
    free = iter(range(1, 64))
    rows = []
    for case in cases:
        row = Row((), case.prompt, (), 1)
        if case.prefix is not None:
            ref = PrefixRef(case.task, case.prefix.layout)
            resident = ResidentPrefix(ref, [next(free)])
            runner.load(case.prefix, resident)
            row = Row((ref,), case.prompt, (), 1)
            row.residents = [resident]
        row.block_table = [next(free), next(free)]
        row.num_scheduled_tokens = len(case.prompt)
        rows.append(row)
    logits = runner.run(batch.batch_of(rows, set(rows), kv_blocks))
    for case, found in zip(cases, logits, strict=True):
        assert float((found - case.logits[0]).abs().max()) < 1e-4 * max(1.0, float(case.logits[0].abs().max())), (
            case.task
        )


def test_swapped_prefixes_are_noticed(family: tuple[Any, Any, list[Case]]) -> None:
    model, shape, cases = family
    prefixes = prefixes_of(cases)
    prefixes["prefix"], prefixes["cartridge"] = prefixes["cartridge"], prefixes["prefix"]
    assert wrong(cases, run_ours(model, shape, cases, prefixes))


def test_a_dropped_virtual_token_is_noticed(family: tuple[Any, Any, list[Case]]) -> None:
    model, shape, cases = family
    prefixes = prefixes_of(cases)
    layers = {i: (k[:, :-1], v[:, :-1]) for i, (k, v) in prefixes["prefix"].layers.items()}
    prefixes["prefix"] = replace(prefixes["prefix"], layers=layers)
    assert [case for case in wrong(cases, run_ours(model, shape, cases, prefixes)) if case.startswith("prefix")]


def test_shifted_positions_are_noticed(family: tuple[Any, Any, list[Case]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape, cases = family
    made = batch.batch_of

    def shifted(*args: Any) -> batch.Batch:
        found = made(*args)
        # Relative positions do not see a shift of everything: text moves, what a row has already written does not.
        far = torch.where(found.position_ids > 12, found.position_ids + 1, found.position_ids)
        return replace(found, position_ids=far)

    monkeypatch.setattr("server.engine.engine.batch_of", shifted)
    assert wrong(cases, run_ours(model, shape, cases, prefixes_of(cases)))
