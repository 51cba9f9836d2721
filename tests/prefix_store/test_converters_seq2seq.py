"""Other tools' files for encoder-decoders: each part goes to its own attention, and files of the other architecture
are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch

from prefix_store.converters.convert import convert_file, fold_file
from prefix_store.errors import InvalidArtefactError
from prefix_store.native_format import digest_of, read_native, write_native
from prefix_store.prefix import Layers, ModelShape, Prefix

LAYERS, ENCODER_LAYERS, HEADS, DIM, HIDDEN, N, MIDDLE = 3, 2, 2, 4, 8, 5, 6
SHAPE = ModelShape(
    LAYERS, HEADS, DIM, HIDDEN, 100, 512, torch.float32, "bart", "f" * 64, (), 16, num_encoder_layers=ENCODER_LAYERS
)
DECODER_ONLY = replace(SHAPE, num_encoder_layers=0, model_name="gpt")
SELF, ENCODER, CROSS = ("wte", "control_trans"), ("wte_enc", "control_trans_enc"), ("wte2", "control_trans2")


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def part(names: tuple[str, str], num_layers: int = LAYERS, seed: int = 0, n: int = N) -> dict[str, torch.Tensor]:
    table, mlp = names
    width = num_layers * 2 * HEADS * DIM
    return {
        f"{table}.weight": random(n, HIDDEN, seed=seed),
        f"{mlp}.0.weight": random(MIDDLE, HIDDEN, seed=seed + 1) / 3,
        f"{mlp}.0.bias": random(MIDDLE, seed=seed + 2),
        f"{mlp}.2.weight": random(width, MIDDLE, seed=seed + 3),
        f"{mlp}.2.bias": random(width, seed=seed + 4),
    }


def checkpoint() -> dict[str, torch.Tensor]:
    return part(SELF) | part(ENCODER, ENCODER_LAYERS, seed=10) | part(CROSS, seed=20)


def saved(path: Path, found: object) -> Path:
    torch.save(found, path)
    return path


def refused(path: Path, *texts: str, shape: ModelShape = SHAPE) -> None:
    with pytest.raises(InvalidArtefactError) as caught:
        convert_file(path, shape)
    for text in texts:
        assert text in str(caught.value)


def slot_by_hand(tensors: dict[str, torch.Tensor], slot: int, head: int, token: int, place: int) -> float:
    """One number of a part's output viewed as [n, 2 * layers, heads, head_dim], with Python's own arithmetic."""
    table, w0, b0, w2, b2 = (tensor.tolist() for tensor in tensors.values())
    hidden = [
        math.tanh(sum(w * x for w, x in zip(row, table[token], strict=True)) + bias)
        for row, bias in zip(w0, b0, strict=True)
    ]
    out = (slot * HEADS + head) * DIM + place
    return float(sum(w * h for w, h in zip(w2[out], hidden, strict=True)) + b2[out])


def assert_by_hand(layers: Layers, tensors: dict[str, torch.Tensor], slots: list[tuple[int, int]]) -> None:
    """`slots[layer]` are those of the layer's key and value."""
    assert sorted(layers) == list(range(len(slots)))
    for layer, pair in layers.items():
        for slot, found in zip(slots[layer], pair, strict=True):
            assert found.shape == (HEADS, len(next(iter(tensors.values()))), DIM)
            for head in range(HEADS):
                for token in range(found.shape[1]):
                    for place in range(DIM):
                        expected = slot_by_hand(tensors, slot, head, token, place)
                        assert float(found[head, token, place]) == pytest.approx(expected, abs=1e-4)


def in_order(num_layers: int) -> list[tuple[int, int]]:
    return [(2 * layer, 2 * layer + 1) for layer in range(num_layers)]


def assert_goes_through_the_native_file(prefix: Prefix) -> None:
    body = write_native(prefix)
    assert digest_of(write_native(read_native(body, SHAPE))) == digest_of(body)


# Li and Liang's seq2seq model views each part's output as [n, 2 * layers, heads, head_dim] and splits the slots by two:
# a layer's key, then its value. The plain pair is the decoder's self-attention, *_enc the encoder's, wte2 with
# control_trans2 the cross-attention's.


@pytest.mark.parametrize("module", ["", "model."])
def test_checkpoint_of_three_parts_by_hand(tmp_path: Path, module: str) -> None:
    named = {f"{module}{name}": tensor for name, tensor in checkpoint().items()}
    saved(tmp_path / "pytorch_model.bin", {"state_dict": named, "epoch": 3} if module else named)
    safetensors.torch.save_file(named, tmp_path / "model.safetensors")
    for prefix in (
        convert_file(tmp_path, SHAPE),
        fold_file(tmp_path / "pytorch_model.bin", SHAPE),
        fold_file(tmp_path / "model.safetensors", SHAPE),
    ):
        assert (prefix.kind, prefix.is_seq2seq, prefix.placement) == ("kv", True, "prefix")
        assert_by_hand(prefix.layers, part(SELF), in_order(LAYERS))
        assert_by_hand(prefix.encoder, part(ENCODER, ENCODER_LAYERS, seed=10), in_order(ENCODER_LAYERS))
        assert_by_hand(prefix.cross, part(CROSS, seed=20), in_order(LAYERS))
        assert_goes_through_the_native_file(prefix)


def test_parts_may_differ_in_length_and_be_missing(tmp_path: Path) -> None:
    two = part(ENCODER, ENCODER_LAYERS, n=7) | part(("wte_dec", "control_trans_dec"), n=2)
    layout = convert_file(saved(tmp_path / "pytorch_model.bin", two), SHAPE).layout
    assert (layout.num_decoder_tokens, layout.num_encoder_tokens, layout.num_cross_tokens) == (0, 7, 2)
    prefix = convert_file(tmp_path / "pytorch_model.bin", SHAPE)
    assert_by_hand(prefix.cross, part(("wte_dec", "control_trans_dec"), n=2), in_order(LAYERS))
    assert_goes_through_the_native_file(prefix)


def test_part_that_does_not_fit_its_stack_is_refused(tmp_path: Path) -> None:
    wrong = checkpoint() | part(ENCODER, LAYERS)
    path = saved(tmp_path / "pytorch_model.bin", wrong)
    refused(path, "control_trans_enc.2.weight: width must be 32 (2 * 2 layers * 2 KV heads * 4), got 48")


@pytest.mark.parametrize("missing", [f"{ENCODER[0]}.weight", f"{CROSS[1]}.2.bias", f"{SELF[1]}.0.weight"])
def test_part_that_is_half_there_is_refused(tmp_path: Path, missing: str) -> None:
    wrong = checkpoint()
    del wrong[missing]
    table, mlp = next(names for names in (CROSS, ENCODER, SELF) if missing.startswith(tuple(f"{n}." for n in names)))
    refused(saved(tmp_path / "pytorch_model.bin", wrong), f"expected {table}.weight with {mlp}.0/2.*, got '")


def test_two_parts_for_cross_attention_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "pytorch_model.bin", checkpoint() | part(("wte_dec", "control_trans_dec")))
    refused(path, "expected one part for cross-attention", "control_trans2", "control_trans_dec")


@pytest.mark.parametrize("mlp", [SELF[1], ENCODER[1], CROSS[1]])
def test_deeper_or_wrong_part_is_refused(tmp_path: Path, mlp: str) -> None:
    path = saved(tmp_path / "pytorch_model.bin", checkpoint() | {f"{mlp}.4.weight": random(9, 9)})
    refused(path, f"got a deeper one: '{mlp}.4.weight'")
    wrong = checkpoint()
    wrong[f"{mlp}.2.bias"][0] = float("nan")
    refused(saved(path, wrong), ".layers.0.key: all values must be finite")
    refused(saved(path, checkpoint() | {f"{mlp}.2.bias": torch.ones(3, dtype=torch.int64)}), "got torch.int64")


def test_checkpoint_of_the_other_architecture_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "pytorch_model.bin", part(SELF))
    text = "expected a prefix for an encoder-decoder (bart), got one for a decoder-only model"
    refused(path, text)
    assert convert_file(path, DECODER_ONLY).num_virtual_tokens == N
    with pytest.raises(InvalidArtefactError, match="got one for a decoder-only model"):
        fold_file(path, SHAPE)
    refused(
        saved(path, checkpoint()),
        "expected an artefact of a decoder-only model, got an encoder-decoder's: its MLPs are control_trans and "
        "control_trans_enc (the encoder), control_trans2 (cross-attention)",
        shape=DECODER_ONLY,
    )


def test_infix_of_a_decoder_only_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "pytorch_model.bin", part(SELF) | {"wte2.weight": random(N, HIDDEN)})
    refused(path, "got an infix one: it has wte2.weight")


# PEFT doubles the list of 2L slots and splits it by 4; a decoder layer takes the first two of its four.


def test_unfolded_checkpoint_of_peft_by_hand(tmp_path: Path) -> None:
    tensors = part(("embedding", "transform"))
    prefix = fold_file(saved(tmp_path / "prompt_encoder.bin", tensors), SHAPE)
    assert [name for name, _ in prefix.parts()] == ["decoder"]
    assert_by_hand(prefix.layers, tensors, [(0, 1), (4, 5), (2, 3)])
    assert_goes_through_the_native_file(prefix)


# caikit writes encoder.pt for an encoder-decoder, IBM's server reads encoder.pt and decoder.pt of one folder.


def test_encoder_of_a_folder_and_alone(tmp_path: Path) -> None:
    table = random(2 * N, HIDDEN)
    saved(tmp_path / "encoder.pt", table[:N])
    for path in (tmp_path, tmp_path / "encoder.pt"):
        prefix = convert_file(path, SHAPE)
        assert prefix.embeddings is not None
        assert torch.equal(prefix.embeddings, table[:N])
        assert prefix.is_seq2seq
        assert prefix.layout.num_encoder_tokens == N
        assert prefix.layout.num_decoder_tokens == 0
        assert_goes_through_the_native_file(prefix)
    refused(tmp_path, "got an encoder-decoder's: encoder.pt is the soft prompt of an encoder", shape=DECODER_ONLY)


def test_decoder_of_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "decoder.pt", random(N, HIDDEN))
    for path in (tmp_path, tmp_path / "decoder.pt"):
        refused(path, "expected encoder.pt", "got decoder.pt", "soft prompts on its decoder are not served")
    saved(tmp_path / "encoder.pt", random(N, HIDDEN))
    refused(tmp_path, "expected encoder.pt alone", "has both", "soft prompts on the decoder are not served")
    assert convert_file(tmp_path / "encoder.pt", SHAPE).num_virtual_tokens == N


def test_google_prompt_stands_before_the_encoder(tmp_path: Path) -> None:
    table = random(N, HIDDEN)
    numpy.save(tmp_path / "prompt.npy", table.numpy())
    prefix = convert_file(tmp_path / "prompt.npy", SHAPE)
    assert prefix.embeddings is not None
    assert torch.equal(prefix.embeddings, table)
    assert prefix.layout.num_encoder_tokens == N


def test_cartridge_is_refused(tmp_path: Path) -> None:
    lists = [random(1, HEADS, N, DIM)] * LAYERS
    found = {"trainable_keys": lists, "trainable_values": lists, "frozen_keys": [], "frozen_values": []}
    path = saved(tmp_path / "cartridge.pt", found)
    refused(path, "expected a prefix for an encoder-decoder (bart), got one for a decoder-only model")
    assert convert_file(path, DECODER_ONLY).num_virtual_tokens == N
