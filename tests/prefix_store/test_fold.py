"""An unfolded checkpoint folds to what its MLP says, under PEFT's names and under Li and Liang's."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch

from prefix_store.converters.convert import fold_file
from prefix_store.converters.mlp_checkpoint import read_mlp_checkpoint as fold
from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import ModelShape, Prefix

LAYERS, HEADS, DIM, HIDDEN, N, MIDDLE = 3, 2, 4, 12, 5, 7
SHAPE = ModelShape(LAYERS, HEADS, DIM, HIDDEN, 100, 512, torch.float32, "tiny", "f" * 64, max_virtual_tokens=16)
WIDTH = 2 * LAYERS * HEADS * DIM
PEFT_NAMES = ("embedding", "transform")
LI_LIANG_NAMES = ("wte", "control_trans")
BOTH = pytest.mark.parametrize("names", [PEFT_NAMES, LI_LIANG_NAMES])


def checkpoint(names: tuple[str, str], module: str = "") -> dict[str, torch.Tensor]:
    table, mlp = names
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    return {
        f"{module}{table}.weight": random(N, HIDDEN),
        f"{module}{mlp}.0.weight": random(MIDDLE, HIDDEN) / 3,
        f"{module}{mlp}.0.bias": random(MIDDLE),
        f"{module}{mlp}.2.weight": random(WIDTH, MIDDLE),
        f"{module}{mlp}.2.bias": random(WIDTH),
    }


def value_by_hand(tensors: list[torch.Tensor], token: int, layer: int, is_value: bool, head: int, place: int) -> float:
    """One number of the prefix with nothing but Python's own arithmetic."""
    table, w0, b0, w2, b2 = (tensor.tolist() for tensor in tensors)
    hidden = [
        math.tanh(sum(w * x for w, x in zip(row, table[token], strict=True)) + bias)
        for row, bias in zip(w0, b0, strict=True)
    ]
    out = ((2 * layer + is_value) * HEADS + head) * DIM + place
    return float(sum(w * h for w, h in zip(w2[out], hidden, strict=True)) + b2[out])


def assert_folded(prefix: Prefix) -> None:
    tensors = list(checkpoint(PEFT_NAMES).values())
    assert sorted(prefix.layers) == list(range(LAYERS))
    for layer, pair in prefix.layers.items():
        for is_value, found in enumerate(pair):
            assert found.shape == (HEADS, N, DIM)
            for head in range(HEADS):
                for token in range(N):
                    for place in range(DIM):
                        expected = value_by_hand(tensors, token, layer, bool(is_value), head, place)
                        assert float(found[head, token, place]) == pytest.approx(expected, abs=1e-4)


def refused(tensors: dict[str, torch.Tensor], *texts: str, shape: ModelShape = SHAPE) -> None:
    with pytest.raises(InvalidArtefactError) as caught:
        fold(tensors, shape)
    for text in texts:
        assert text in str(caught.value)


@BOTH
@pytest.mark.parametrize("module", ["", "prompt_encoder.default.", "model."])
def test_fold_is_the_mlp_by_hand(names: tuple[str, str], module: str) -> None:
    assert_folded(fold(checkpoint(names, module), SHAPE))


@BOTH
@pytest.mark.parametrize("is_nested", [False, True])
def test_torch_checkpoint_folds(tmp_path: Path, names: tuple[str, str], is_nested: bool) -> None:
    tensors = checkpoint(names)
    torch.save({"state_dict": tensors, "step": 3} if is_nested else tensors, tmp_path / "pytorch_model.bin")
    assert_folded(fold_file(tmp_path / "pytorch_model.bin", SHAPE))


@BOTH
def test_safetensors_checkpoint_folds(tmp_path: Path, names: tuple[str, str]) -> None:
    safetensors.torch.save_file(checkpoint(names), tmp_path / "model.safetensors")
    assert_folded(fold_file(tmp_path / "model.safetensors", SHAPE))


def test_fold_is_what_pefts_own_encoder_makes_of_it() -> None:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=N,
        token_dim=HEADS * DIM,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        encoder_hidden_size=MIDDLE,
        prefix_projection=True,
    )
    torch.manual_seed(0)
    encoder: torch.nn.Module = peft.PrefixEncoder(config)  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        flat = encoder(torch.arange(N)[None])[0].view(N, 2 * LAYERS, HEADS, DIM)
    prefix = fold(encoder.state_dict(), SHAPE)
    for layer, (key, value) in prefix.layers.items():
        torch.testing.assert_close(key, flat[:, 2 * layer].transpose(0, 1))
        torch.testing.assert_close(value, flat[:, 2 * layer + 1].transpose(0, 1))


def test_checkpoint_in_half_precision_is_folded_in_single() -> None:
    tensors = {name: tensor.half() for name, tensor in checkpoint(PEFT_NAMES).items()}
    key, _ = fold(tensors, SHAPE).layers[0]
    expected = value_by_hand(list(tensors.values()), 1, 0, False, 1, 2)
    assert key.dtype == torch.float32
    assert float(key[1, 1, 2]) == pytest.approx(expected, abs=1e-4)


@BOTH
@pytest.mark.parametrize("part", range(5))
def test_missing_tensor_is_refused(names: tuple[str, str], part: int) -> None:
    tensors = checkpoint(names)
    del tensors[list(tensors)[part]]
    refused(tensors, "expected embedding.weight with transform.0/2.* (PEFT) or wte.weight with control_trans", "got '")


def test_two_tensors_of_one_name_are_refused() -> None:
    refused(checkpoint(PEFT_NAMES, "a.") | checkpoint(PEFT_NAMES, "b."), "expected embedding.weight", "got 'a.")


def test_other_model_is_refused() -> None:
    wrong = checkpoint(PEFT_NAMES)
    refused(wrong, "transform.2.weight: width must be 64 (2 * 4 layers", "got 48", shape=replace(SHAPE, num_layers=4))
    refused(wrong, "width must be 96", "got 48", shape=replace(SHAPE, num_kv_heads=4))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("embedding.weight", (N, HIDDEN + 1)),
        ("embedding.weight", (N * HIDDEN,)),
        ("transform.0.weight", (MIDDLE + 1, HIDDEN)),
        ("transform.0.bias", (MIDDLE + 1,)),
        ("transform.0.bias", (1, MIDDLE)),
        ("transform.2.weight", (WIDTH, MIDDLE + 1)),
        ("transform.2.bias", (WIDTH - 1,)),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(name: str, sizes: tuple[int, ...]) -> None:
    refused(checkpoint(PEFT_NAMES) | {name: torch.zeros(sizes)}, "do not fit each other", str(sizes))


def test_values_that_are_not_finite_are_refused() -> None:
    wrong = checkpoint(PEFT_NAMES)
    wrong["transform.2.bias"][2 * HEADS * DIM] = float("nan")
    refused(wrong, "layers.1.key: all values must be finite, got NaN or infinity")
    wrong["transform.2.bias"][2 * HEADS * DIM] = 1e6
    refused(wrong, "layers.1.key: magnitudes must be <= 65504, got ")


def test_more_tokens_than_the_limit_are_refused() -> None:
    refused(checkpoint(PEFT_NAMES) | {"embedding.weight": torch.zeros(17, HIDDEN)}, "must be 1 to 16, got 17")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_checkpoint_with_code_is_refused_unrun(tmp_path: Path) -> None:
    torch.save(checkpoint(PEFT_NAMES) | {"more": Trap(tmp_path / "ran")}, tmp_path / "model.bin")
    with pytest.raises(InvalidArtefactError, match=r"model.bin: expected weights alone, got a pickle that names posix"):
        fold_file(tmp_path / "model.bin", SHAPE)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_without_names_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "model.bin")
    with pytest.raises(InvalidArtefactError, match=r"model.bin: expected named tensors, got Tensor"):
        fold_file(tmp_path / "model.bin", SHAPE)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            {"control_trans.4.weight": torch.zeros(WIDTH, WIDTH), "control_trans.4.bias": torch.zeros(WIDTH)},
            "expected an MLP of two linear layers (0 and 2), got a deeper one: 'control_trans.4.bias'",
        ),
        ({"wte2.weight": torch.zeros(N, HIDDEN)}, "expected a prefix checkpoint, got an infix one: it has wte2.weight"),
        (
            {"wte_enc.weight": torch.zeros(N, HIDDEN), "control_trans_enc.0.weight": torch.zeros(MIDDLE, HIDDEN)},
            "expected an artefact of a decoder-only model, got an encoder-decoder's",
        ),
    ],
    ids=["deeper", "infix", "encoder"],
)
def test_checkpoint_of_another_kind_is_refused(tmp_path: Path, more: dict[str, torch.Tensor], text: str) -> None:
    tensors = checkpoint(LI_LIANG_NAMES) | more
    refused(tensors, text)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        with pytest.raises(InvalidArtefactError) as caught:
            fold_file(tmp_path / name, SHAPE)
        assert text in str(caught.value)


def test_deeper_mlp_under_pefts_names_is_refused() -> None:
    refused(checkpoint(PEFT_NAMES) | {"transform.4.weight": torch.zeros(WIDTH, WIDTH)}, "got a deeper one")


def test_empty_table_is_refused() -> None:
    wrong = checkpoint(PEFT_NAMES) | {"embedding.weight": torch.zeros(0, HIDDEN)}
    refused(wrong, "embedding.weight: expected dimensions of at least 1, got [0, 12]")


def test_checkpoint_of_numbers_that_are_not_floating_is_refused() -> None:
    refused({name: tensor.long() for name, tensor in checkpoint(PEFT_NAMES).items()}, "got torch.int64")


def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    tensors = {"embeddings": torch.zeros(N, HIDDEN), "\n": torch.zeros(1)}
    refused(tensors, "expected embedding.weight with transform.0/2.* (PEFT)", "got '\\n', 'embeddings'")
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02}q\x00" + bytes(99))
    with pytest.raises(InvalidArtefactError, match=r"expected a safetensors file, got a zip or a pickle"):
        fold_file(tmp_path / "model.safetensors", SHAPE)
    with pytest.raises(InvalidArtefactError, match=r"expected a file of weights, found nothing at"):
        fold_file(tmp_path / "missing.bin", SHAPE)
