"""Files as PEFT may write them beside the ordinary ones (other dtypes, depths, numbers of stacks, fields that do not
matter), each loaded by PEFT itself from its two files alone: our greedy tokens, all files mixed in one batch, against
PEFT's batch of one."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from prefix_store.converters.convert import fold_file
from prefix_store.errors import InvalidArtefactError
from prefix_store.peft_format import read_peft
from prefix_store.prefix import ModelShape, Prefix
from server.engine.cpu_kernels import CpuKernels
from tests.cases import Case, Reference, World, generated, tiny_shape
from tests.tiny_models import FAMILIES, SEQ2SEQ_FAMILIES, VOCAB, seq2seq_model

CAUSAL = {"task_type": "CAUSAL_LM"}
SEQ2SEQ = {"task_type": "SEQ_2_SEQ_LM"}
MULTITASK = {"num_tasks": 3, "num_ranks": 4, "prompt_tuning_init": "RANDOM"}
MULTITASK_INDEX = 2


@dataclass(frozen=True)
class File:
    """How PEFT makes it, and what is then changed: the tensors' dtype, fields of the config."""

    make: Callable[..., Any]
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    fields: dict[str, Any] = field(default_factory=dict)


CPT = {"cpt_token_ids": [5, 9], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2], "num_virtual_tokens": 2}
ODD = {"num_layers": "x", "num_attention_heads": 7, "inference_mode": False, "fan_in_fan_out": True, "peft_version": 3}
UNSAID = {"token_dim": None, "num_layers": None, "num_attention_heads": None, "num_transformer_submodules": None}
CAUSAL_FILES = {
    "prompt in bf16": File(PromptTuningConfig, CAUSAL | {"num_virtual_tokens": 6}, torch.bfloat16),
    "prompt of one token": File(PromptTuningConfig, CAUSAL | {"num_virtual_tokens": 1}, fields=ODD),
    "prompt of few words": File(PromptTuningConfig, CAUSAL | {"num_virtual_tokens": 5}, fields=UNSAID),
    "lstm in fp16": File(
        PromptEncoderConfig,
        CAUSAL | {"num_virtual_tokens": 4, "encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
        torch.float16,
    ),
    "multitask in bf16": File(
        MultitaskPromptTuningConfig, CAUSAL | MULTITASK | {"num_virtual_tokens": 40}, torch.bfloat16
    ),
    "multitask in fp16": File(
        MultitaskPromptTuningConfig, CAUSAL | MULTITASK | {"num_virtual_tokens": 37}, torch.float16
    ),
    "multitask in fp64": File(
        MultitaskPromptTuningConfig, CAUSAL | MULTITASK | {"num_virtual_tokens": 3}, torch.float64
    ),
    "cpt in bf16": File(CPTConfig, CAUSAL | CPT, torch.bfloat16),
    "prefix in fp16": File(PrefixTuningConfig, CAUSAL | {"num_virtual_tokens": 17}, torch.float16),
    "prefix of one token in fp64": File(
        PrefixTuningConfig, CAUSAL | {"num_virtual_tokens": 1}, torch.float64, {"inference_mode": False}
    ),
    "projected in bf16": File(
        PrefixTuningConfig,
        CAUSAL | {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16},
        torch.bfloat16,
        UNSAID,
    ),
    "cartridge, all frozen": File(CartridgeConfig, CAUSAL | {"num_virtual_tokens": 8, "num_frozen_tokens": 8}),
}
ENCODER_ONLY = SEQ2SEQ | {"num_transformer_submodules": 1}
SEQ2SEQ_FILES = {
    "encoder-only prompt": File(PromptTuningConfig, ENCODER_ONLY | {"num_virtual_tokens": 6}),
    "encoder-only p-tuning in bf16": File(
        PromptEncoderConfig, ENCODER_ONLY | {"num_virtual_tokens": 4, "encoder_hidden_size": 16}, torch.bfloat16
    ),
    "encoder-only multitask": File(MultitaskPromptTuningConfig, ENCODER_ONLY | MULTITASK | {"num_virtual_tokens": 5}),
    "multitask in bf16": File(
        MultitaskPromptTuningConfig, SEQ2SEQ | MULTITASK | {"num_virtual_tokens": 32}, torch.bfloat16
    ),
    "prompt for three stacks": File(
        PromptTuningConfig, SEQ2SEQ | {"num_virtual_tokens": 2, "num_transformer_submodules": 3}
    ),
    "prefix": File(PrefixTuningConfig, SEQ2SEQ | {"num_virtual_tokens": 7}),
    "prefix of one token in fp16": File(PrefixTuningConfig, SEQ2SEQ | {"num_virtual_tokens": 1}, torch.float16),
    "prefix of the decoder's depth": File(PrefixTuningConfig, SEQ2SEQ | {"num_virtual_tokens": 4, "num_layers": 2}),
    "prefix of another depth": File(PrefixTuningConfig, SEQ2SEQ | {"num_virtual_tokens": 4, "num_layers": 5}),
    "projected": File(
        PrefixTuningConfig,
        SEQ2SEQ | {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16},
        fields={"num_transformer_submodules": None},
    ),
    "cartridge": File(CartridgeConfig, SEQ2SEQ | {"num_virtual_tokens": 18}),
}
DEPTHS = {"t5": (3, 2), "mt5": (4, 2), "bart": (3, 2)}  # of encoder and decoder


def _model(family: str) -> Any:
    torch.manual_seed(3)
    if family in FAMILIES:
        return AutoModelForCausalLM.from_config(FAMILIES[family]()).float()
    config: Any = SEQ2SEQ_FAMILIES[family]()
    names = ("encoder_layers", "decoder_layers") if family == "bart" else ("num_layers", "num_decoder_layers")
    for name, depth in zip(names, DEPTHS[family], strict=True):
        setattr(config, name, depth)
    return seq2seq_model(config)


def _load(folder: Path, family: str) -> Any:
    kind: Any = AutoModelForCausalLM if family in FAMILIES else AutoModelForSeq2SeqLM
    return kind.from_pretrained(folder / "model", attn_implementation="eager")


def _write(file: File, folder: Path, model: Any, shape: ModelShape) -> None:
    options = dict(file.options)
    if shape.is_encoder_decoder and file.make in (PrefixTuningConfig, CartridgeConfig):
        options["token_dim"] = shape.num_kv_heads * shape.head_dim
    trained = get_peft_model(model, file.make(**options))
    for parameter in trained.prompt_encoder.parameters():
        parameter.data = torch.randn_like(parameter) * (0.8 if shape.is_encoder_decoder else 1)
    trained.eval().save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(file.dtype) for name, tensor in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(tensors, weights)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | file.fields))


def _read(folder: Path, shape: ModelShape, index: int | None = None) -> Prefix:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    return read_peft(config.read_bytes(), weights.read_bytes(), shape, index)


def _case(name: str, file: File | None, prompt: list[int], family: str, folder: Path, shape: ModelShape) -> Case:
    reference, more = _load(folder, family), {}
    if file is not None:
        _write(file, folder / name, reference, shape)
        reference = PeftModel.from_pretrained(_load(folder, family), folder / name)
        if file.make is MultitaskPromptTuningConfig:
            more["task_ids"] = torch.tensor([MULTITASK_INDEX])
    tokens, logits = generated(reference, prompt, **more)
    return Case(name, prompt, ((name,),) if file else ((),), tokens, logits)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3", *SEQ2SEQ_FAMILIES])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kernels: CpuKernels) -> World:
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = _model(family)
    model.save_pretrained(folder / "model")
    shape = tiny_shape(model)
    files: dict[str, File] = SEQ2SEQ_FILES if shape.is_encoder_decoder else CAUSAL_FILES
    prefixes, cases = {}, []
    torch.manual_seed(5)
    for i, (name, file) in enumerate([*files.items(), ("bare", None)]):
        prompt = torch.randint(3, VOCAB, (3 + 5 * i % 23,)).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cases.append(_case(name, file, prompt, family, folder, shape))
        if file is not None:
            index = MULTITASK_INDEX if file.make is MultitaskPromptTuningConfig else None
            prefixes[name] = _read(folder / name, shape, index)
    gc.collect()
    return Reference(folder / "model", prefixes, cases).world("plain", kernels)


def test_the_references_answers_can_prove_something(world: World) -> None:
    world.check_proves_something()


@pytest.mark.parametrize("stagger", [1, 20])
def test_mixed_tokens_equal_what_peft_answers_with_the_file_alone(world: World, stagger: int) -> None:
    assert not world.answers(stagger=stagger)


@pytest.mark.parametrize("family", SEQ2SEQ_FAMILIES)
def test_keys_that_peft_lays_out_otherwise_are_refused(family: str, tmp_path: Path) -> None:
    """With one stack the answers of PEFT are others than with two, from the same rows."""
    model = _model(family)
    model.save_pretrained(tmp_path / "model")
    shape, prompt = tiny_shape(model), [5, 9, 14, 7]
    for make in (PrefixTuningConfig, CartridgeConfig):
        answers = []
        for num_stacks in (None, 2, 1):
            torch.manual_seed(6)
            file = File(make, SEQ2SEQ | {"num_virtual_tokens": 5, "num_transformer_submodules": num_stacks})
            name = f"{make.__name__} {num_stacks}"
            answers.append(_case(name, file, prompt, family, tmp_path, shape).tokens)
            if num_stacks == 1:
                with pytest.raises(InvalidArtefactError, match=r"num_transformer_submodules must be 2 .*, got 1: "):
                    _read(tmp_path / name, shape)
            else:
                assert _read(tmp_path / name, shape).num_virtual_tokens == 5
        assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_file_that_names_no_task_is_refused_for_peft_answers_without_it(family: str, tmp_path: Path) -> None:
    model = _model(family)
    model.save_pretrained(tmp_path / "model")
    shape, prompt = tiny_shape(model), [5, 9, 14, 7]
    bare = _case("bare", None, prompt, family, tmp_path, shape).tokens
    task = SEQ2SEQ if shape.is_encoder_decoder else CAUSAL
    for make in (PromptTuningConfig, PrefixTuningConfig):
        file = File(make, task | {"num_virtual_tokens": 5}, fields={"task_type": None})
        assert _case(make.__name__, file, prompt, family, tmp_path, shape).tokens == bare
        with pytest.raises(InvalidArtefactError, match="got null: without it PEFT answers as if there were no prefix"):
            _read(tmp_path / make.__name__, shape)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("num_layers", [None, 2, 5])
def test_unfolded_checkpoint_of_any_depth_folds_to_what_peft_saves(
    family: str, num_layers: int | None, tmp_path: Path
) -> None:
    """None is the encoder's depth, which is not the decoder's."""
    model = _model(family)
    shape = tiny_shape(model)
    options = {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16, "num_layers": num_layers}
    trained = get_peft_model(model, PrefixTuningConfig(**SEQ2SEQ, **options))
    trained.eval().save_pretrained(tmp_path / "folded")
    torch.save(trained.prompt_encoder.state_dict(), tmp_path / "unfolded.bin")
    folded, unfolded = _read(tmp_path / "folded", shape), fold_file(tmp_path / "unfolded.bin", shape)
    assert sorted(folded.layers) == sorted(unfolded.layers) == [0, 1]
    for layer, pair in folded.layers.items():
        for expected, found in zip(pair, unfolded.layers[layer], strict=True):
            torch.testing.assert_close(found, expected)
