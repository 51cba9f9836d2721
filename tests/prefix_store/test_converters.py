"""Other tools' files become prefixes with every value in its place, and what is not one of them is refused by name.

Each file is written here the way its tool writes it; where that layout comes from stands above each group.
"""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch

from prefix_store.converters import weights_file
from prefix_store.converters.convert import convert_file
from prefix_store.errors import InvalidArtefactError
from prefix_store.native_format import read_native, write_native
from prefix_store.prefix import ModelShape, Prefix

LAYERS, HEADS, DIM, HIDDEN, N = 3, 2, 8, 48, 5
SHAPE = ModelShape(LAYERS, HEADS, DIM, HIDDEN, 100, 512, torch.float32, "tiny", "f" * 64, max_virtual_tokens=64)
WIDTH = 2 * LAYERS * HEADS * DIM


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def refused(path: Path, *texts: str, shape: ModelShape = SHAPE) -> None:
    """The refusal has every text in it, and the advice to load unsafely never."""
    with pytest.raises(InvalidArtefactError) as caught:
        convert_file(path, shape)
    for text in texts:
        assert text in str(caught.value)
    assert "weights_only" not in str(caught.value)


def saved(path: Path, found: object, is_old: bool = False) -> Path:
    torch.save(found, path, _use_new_zipfile_serialization=not is_old)
    return path


def embeddings_of(prefix: Prefix) -> torch.Tensor:
    assert prefix.kind == "soft"
    assert prefix.embeddings is not None
    return prefix.embeddings


def assert_goes_through_the_native_file(prefix: Prefix) -> None:
    again = read_native(write_native(prefix), SHAPE)
    assert again.num_virtual_tokens == prefix.num_virtual_tokens
    assert again.layers.keys() == prefix.layers.keys()
    for layer, pair in prefix.layers.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, again.layers[layer], strict=True))
    if prefix.embeddings is not None:
        assert again.embeddings is not None
        assert torch.equal(prefix.embeddings, again.embeddings)


# Google's prompt-tuning keeps the prompt variable of a t5x checkpoint apart as a plain array, [length, features] in
# float32 (its checkpointer and its extract_variable script both call numpy's save; the published prompts are such).


@pytest.mark.parametrize("is_batch", [False, True])
def test_google_prompt_keeps_every_row(tmp_path: Path, is_batch: bool) -> None:
    prompt = random(N, HIDDEN).numpy()
    numpy.save(tmp_path / "prompt.npy", prompt[None] if is_batch else prompt)
    prefix = convert_file(tmp_path / "prompt.npy", SHAPE)
    assert embeddings_of(prefix).dtype == torch.float32
    assert embeddings_of(prefix).tolist() == prompt.tolist()
    assert_goes_through_the_native_file(prefix)


@pytest.mark.parametrize("kind", ["<f2", "<f8", ">f4"])
def test_google_prompt_of_another_precision_or_byte_order(tmp_path: Path, kind: str) -> None:
    prompt = random(N, HIDDEN).numpy().astype(kind)
    numpy.save(tmp_path / "prompt.npy", prompt)
    prefix = convert_file(tmp_path / "prompt.npy", SHAPE)
    assert embeddings_of(prefix).tolist() == prompt.tolist()
    assert_goes_through_the_native_file(prefix)


def test_google_prompt_in_column_order(tmp_path: Path) -> None:
    prompt = numpy.asfortranarray(random(N, HIDDEN).numpy())
    numpy.save(tmp_path / "prompt.npy", prompt)
    assert embeddings_of(convert_file(tmp_path / "prompt.npy", SHAPE)).tolist() == prompt.tolist()


def test_google_prompt_is_known_by_its_content(tmp_path: Path) -> None:
    # its checkpointer names a file after the variable, without a suffix that we could rely on
    with (tmp_path / "encoder.prompter.prompt.prompt").open("wb") as file:
        numpy.save(file, random(N, HIDDEN).numpy())
    assert convert_file(tmp_path / "encoder.prompter.prompt.prompt", SHAPE).num_virtual_tokens == N


@pytest.mark.parametrize("sizes", [(N, HIDDEN + 1), (HIDDEN,), (2, N, HIDDEN), (1, 1, N, HIDDEN), (0, HIDDEN)])
def test_google_prompt_of_another_shape_is_refused(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    numpy.save(tmp_path / "prompt.npy", numpy.zeros(sizes, numpy.float32))
    refused(tmp_path / "prompt.npy", f"expected [num_virtual_tokens, {HIDDEN}]", f"got {list(sizes)}")


@pytest.mark.parametrize("kind", ["<i4", "<c8", "|V2", "<U4", "|b1"])
def test_google_prompt_of_another_dtype_is_refused(tmp_path: Path, kind: str) -> None:
    numpy.save(tmp_path / "prompt.npy", numpy.zeros((N, HIDDEN), kind))
    refused(tmp_path / "prompt.npy", "dtype must be float16, float32 or float64", f"got {kind}")


def test_numpy_file_with_objects_is_refused_unread(tmp_path: Path) -> None:
    numpy.save(tmp_path / "prompt.npy", numpy.array([Trap(tmp_path / "ran")], dtype=object), allow_pickle=True)
    refused(tmp_path / "prompt.npy", "dtype must be float16, float32 or float64", "got |O")
    assert not (tmp_path / "ran").exists()


def test_cut_off_numpy_file_is_refused(tmp_path: Path) -> None:
    numpy.save(tmp_path / "prompt.npy", random(N, HIDDEN).numpy())
    whole = (tmp_path / "prompt.npy").read_bytes()
    needed = N * HIDDEN * 4
    (tmp_path / "prompt.npy").write_bytes(whole[:-3])
    refused(tmp_path / "prompt.npy", f"takes {needed} bytes, {needed - 3} are there")
    (tmp_path / "prompt.npy").write_bytes(whole + b"more")
    refused(tmp_path / "prompt.npy", f"takes {needed} bytes, {needed + 4} are there")
    (tmp_path / "prompt.npy").write_bytes(whole[:20])
    refused(tmp_path / "prompt.npy", "expected a .npy file")


def test_numpy_header_of_a_giant_allocates_nothing(tmp_path: Path) -> None:
    numpy.save(tmp_path / "prompt.npy", random(10, HIDDEN).numpy())
    whole = (tmp_path / "prompt.npy").read_bytes()
    giant = whole.replace(f"(10, {HIDDEN}), }}             ".encode(), f"(10000000000000, {HIDDEN}), }} ".encode())
    assert giant != whole
    (tmp_path / "prompt.npy").write_bytes(giant)
    refused(tmp_path / "prompt.npy", f"[10000000000000, {HIDDEN}] takes", f"{10 * HIDDEN * 4} are there")


def test_something_else_named_npy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt.npy").write_bytes(b"not numpy's at all")
    refused(tmp_path / "prompt.npy", "expected a .npy file")


# caikit takes the first num_virtual_tokens rows of PEFT's prompt embeddings and writes that tensor alone with
# torch.save: decoder.pt for a causal model, encoder.pt for an encoder-decoder. IBM's server loads the two names from a
# prefix's folder, wants two dimensions and the model's width, and also takes PEFT's adapter_model.bin of one tensor.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_old", [False, True])
def test_prompt_vector_keeps_every_row_of_its_slice(tmp_path: Path, dtype: torch.dtype, is_old: bool) -> None:
    table = random(2 * N, HIDDEN).to(dtype)
    prefix = convert_file(saved(tmp_path / "decoder.pt", table[:N], is_old), SHAPE)
    assert embeddings_of(prefix).dtype == dtype
    assert torch.equal(embeddings_of(prefix), table[:N])
    assert embeddings_of(prefix).untyped_storage().nbytes() == N * HIDDEN * dtype.itemsize
    assert_goes_through_the_native_file(prefix)


def test_prompt_vector_that_still_is_a_parameter(tmp_path: Path) -> None:
    table = torch.nn.Parameter(random(N, HIDDEN))
    prefix = convert_file(saved(tmp_path / "decoder.pt", table), SHAPE)
    assert not embeddings_of(prefix).requires_grad
    assert torch.equal(embeddings_of(prefix), table.detach())


def test_prompt_vector_in_a_dict(tmp_path: Path) -> None:
    table = random(N, HIDDEN)
    prefix = convert_file(saved(tmp_path / "adapter_model.bin", OrderedDict(prompt_embeddings=table)), SHAPE)
    assert torch.equal(embeddings_of(prefix), table)


def test_folder_with_a_decoder(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text("module_id: 6655831b-960a-4dc5-8df4-867026e2cd41\n")
    table = random(N, HIDDEN)
    saved(tmp_path / "decoder.pt", table)
    assert torch.equal(embeddings_of(convert_file(tmp_path, SHAPE)), table)


def test_encoder_of_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "encoder.pt", random(N, HIDDEN))
    for path in (tmp_path, tmp_path / "encoder.pt"):
        refused(path, "expected an artefact of a decoder-only model", "encoder.pt is the soft prompt of an encoder")
    saved(tmp_path / "decoder.pt", random(N, HIDDEN))
    refused(tmp_path, "got an encoder-decoder's", "has both decoder.pt and encoder.pt")


def test_folder_without_or_with_too_many_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "expected one of decoder.pt, encoder.pt, cartridge.pt, pytorch_model.bin", "found none")
    saved(tmp_path / "decoder.pt", random(N, HIDDEN))
    saved(tmp_path / "cartridge.pt", {})
    refused(tmp_path, "expected one of", "found decoder.pt, cartridge.pt")


@pytest.mark.parametrize("sizes", [(N, HIDDEN + 1), (HIDDEN,), (1, N, HIDDEN)])
def test_prompt_vector_of_another_shape_is_refused(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    path = saved(tmp_path / "decoder.pt", torch.zeros(sizes))
    refused(path, f"decoder.pt: expected [num_virtual_tokens, {HIDDEN}], got {list(sizes)}")


def test_empty_prompt_vector_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "decoder.pt", torch.zeros(0, HIDDEN))
    refused(path, f"expected dimensions of at least 1, got [0, {HIDDEN}]")


def test_prompt_vector_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "decoder.pt", random(65, HIDDEN))
    refused(path, "num_virtual_tokens must be 1 to 64, got 65")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_prompt_vector_of_another_dtype_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    path = saved(tmp_path / "decoder.pt", torch.ones(N, HIDDEN, dtype=dtype))
    refused(path, "dtype must be one of torch.float64, torch.float32", f"got {dtype}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    table = random(N, HIDDEN)
    table[2, 3] = value
    refused(saved(tmp_path / "decoder.pt", table), "embeddings: all values must be finite, got NaN or infinity")
    numpy.save(tmp_path / "prompt.npy", table.numpy())
    refused(tmp_path / "prompt.npy", "embeddings: all values must be finite, got NaN or infinity")


def test_values_too_large_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "decoder.pt", torch.full((N, HIDDEN), 70_000.0))
    refused(path, "magnitudes must be <= 65504, got 70000")


# A cartridge is a dict of four ParameterLists, one tensor a layer, each [1, kv_heads, tokens, head_dim]. Those of the
# frozen tokens (by default the first token) were called fixed_* before July 2025 and frozen_* since; without frozen
# tokens they are empty lists. The library and the Tokasaurus server both put them before the trainable ones, and
# start the text's positions after all of them.


def cartridge(frozen: int = 1, name: str = "frozen", dtype: torch.dtype = torch.bfloat16) -> dict[str, object]:
    """Keys and values whose numbers tell layer, part and token: see `assert_is_the_cartridge`."""
    lists: dict[str, object] = {}
    for part in ("keys", "values"):
        whole = [cartridge_tensor(layer, part).to(dtype)[None] for layer in range(LAYERS)]
        head = [torch.nn.Parameter(t[:, :, :frozen].contiguous(), requires_grad=False) for t in whole]
        tail = [torch.nn.Parameter(t[:, :, frozen:].contiguous()) for t in whole]
        lists[f"trainable_{part}"] = torch.nn.ParameterList(tail)
        lists[f"{name}_{part}"] = torch.nn.ParameterList(head if frozen else [])
    return lists


def cartridge_tensor(layer: int, part: str) -> torch.Tensor:
    return random(HEADS, N, DIM, seed=10 * layer + (part == "values"))


def assert_is_the_cartridge(prefix: Prefix, dtype: torch.dtype = torch.bfloat16) -> None:
    assert prefix.kind == "kv"
    assert sorted(prefix.layers) == list(range(LAYERS))
    for layer, (key, value) in prefix.layers.items():
        for head in range(HEADS):
            for token in range(N):
                expected = cartridge_tensor(layer, "keys").to(dtype)[head, token]
                assert torch.equal(key[head, token], expected)
                expected = cartridge_tensor(layer, "values").to(dtype)[head, token]
                assert torch.equal(value[head, token], expected)
    assert_goes_through_the_native_file(prefix)


@pytest.mark.parametrize("name", ["frozen", "fixed"])
@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_cartridge_has_the_frozen_tokens_first(tmp_path: Path, name: str, frozen: int) -> None:
    path = saved(tmp_path / "cartridge.pt", cartridge(frozen, name))
    assert_is_the_cartridge(convert_file(path, SHAPE))


def test_cartridge_in_fp32_and_under_another_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "cache_last.pt", cartridge(dtype=torch.float32))
    assert_is_the_cartridge(convert_file(path, SHAPE), torch.float32)


def test_cartridge_of_plain_lists(tmp_path: Path) -> None:
    plain = {name: list(tensors) for name, tensors in cartridge().items()}  # type: ignore[call-overload]
    assert_is_the_cartridge(convert_file(saved(tmp_path / "cartridge.pt", plain), SHAPE))


def test_folder_with_a_cartridge(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("kv_cache_initializer: {}\n")
    saved(tmp_path / "cartridge.pt", cartridge())
    assert_is_the_cartridge(convert_file(tmp_path, SHAPE))


def test_cartridge_of_another_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "cartridge.pt", cartridge())
    refused(path, "expected 4 layers, got 3", shape=replace(SHAPE, num_layers=4))
    refused(path, "expected [1, 4, num_tokens, 8], got [1, 2, ", shape=replace(SHAPE, num_kv_heads=4))
    refused(path, "expected [1, 2, num_tokens, 16], got [1, 2, ", shape=replace(SHAPE, head_dim=16))


def test_cartridge_with_missing_or_unknown_lists_is_refused(tmp_path: Path) -> None:
    expected = "a cartridge has frozen_keys, frozen_values, trainable_keys, trainable_values"
    for name in cartridge():
        wrong = cartridge()
        del wrong[name]
        refused(saved(tmp_path / "cartridge.pt", wrong), "a cartridge has ", "got ")
    wrong = cartridge() | {"position_embeddings": random(N, HIDDEN)}
    refused(saved(tmp_path / "cartridge.pt", wrong), expected, "position_embeddings")


def test_cartridge_with_wrong_lists_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cartridge.pt"
    whole = torch.nn.ParameterList([torch.nn.Parameter(random(1, HEADS, 4, DIM)) for _ in range(LAYERS)])
    for name in ("trainable_keys", "frozen_values"):
        refused(saved(path, cartridge() | {name: whole[:2]}), f"{name}: expected 3 layers, got 2")
        refused(saved(path, cartridge() | {name: "text"}), f"{name}: expected a list", "got str")
        refused(saved(path, cartridge() | {name: [1, 2, 3]}), f"{name}.0: expected a tensor, got int")
        flat = [random(HEADS, 4, DIM)] * LAYERS
        refused(saved(path, cartridge() | {name: flat}), f"{name}.0: expected [1, 2, num_tokens, 8], got [2, 4, 8]")
    refused(saved(path, cartridge() | {"trainable_keys": []}), "trainable_keys: expected 3 layers, got 0")


def test_cartridge_whose_keys_and_values_differ_in_length_is_refused(tmp_path: Path) -> None:
    longer = torch.nn.ParameterList([torch.nn.Parameter(random(1, HEADS, N, DIM)) for _ in range(LAYERS)])
    path = saved(tmp_path / "cartridge.pt", cartridge() | {"trainable_values": longer})
    refused(path, "layers.0.value: num_virtual_tokens (as in the other layers) must be 5, got 6")


def test_cartridge_with_nan_is_refused(tmp_path: Path) -> None:
    wrong = cartridge()
    wrong["trainable_values"][1].data[0, 1, 2, 3] = float("nan")  # type: ignore[index]
    refused(saved(tmp_path / "cartridge.pt", wrong), "layers.1.value: all values must be finite, got NaN or infinity")


def test_list_with_doctored_state_is_refused(tmp_path: Path) -> None:
    doctored = torch.nn.ParameterList([torch.nn.Parameter(random(1, HEADS, 4, DIM)) for _ in range(LAYERS)])
    doctored._parameters["7"] = doctored._parameters.pop("1")
    refused(
        saved(tmp_path / "cartridge.pt", cartridge() | {"trainable_keys": doctored}),
        "trainable_keys: expected parameters 0 to 2, got '0', '2', '7'",
    )
    doctored.__dict__["_parameters"] = None
    refused(
        saved(tmp_path / "cartridge.pt", cartridge() | {"trainable_keys": doctored}),
        "trainable_keys: expected a ParameterList, got none of its parameters",
    )


# PrefixTuning's model holds nothing but a table `wte` [n, hidden] and `control_trans`, Linear - Tanh - Linear to
# [n, layers * 2 * hidden], viewed as [n, 2 * layers, heads, head_dim]; transformers' save_pretrained writes its
# state dict to pytorch_model.bin. For BART there are three such pairs: the plain one for the decoder, *_enc for the
# encoder, and wte2 with control_trans2 for cross-attention. An infix model has a second table, wte2, alone.


def mlp(suffix: str = "", table: str = "wte", seed: int = 0) -> dict[str, torch.Tensor]:
    name = f"control_trans{suffix}"
    return {
        f"{table}.weight": random(N, HIDDEN, seed=seed),
        f"{name}.0.weight": random(20, HIDDEN, seed=seed + 1) / 7,
        f"{name}.0.bias": random(20, seed=seed + 2),
        f"{name}.2.weight": random(WIDTH, 20, seed=seed + 3) / 4,
        f"{name}.2.bias": random(WIDTH, seed=seed + 4),
    }


def assert_is_the_fold(prefix: Prefix, tensors: dict[str, torch.Tensor]) -> None:
    """Every slot against the MLP written out for one token."""
    assert prefix.kind == "kv"
    assert prefix.num_virtual_tokens == N
    for token in range(N):
        hidden = torch.tanh(
            tensors["control_trans.0.weight"] @ tensors["wte.weight"][token] + tensors["control_trans.0.bias"]
        )
        slots = (tensors["control_trans.2.weight"] @ hidden + tensors["control_trans.2.bias"]).chunk(2 * LAYERS)
        for layer in range(LAYERS):
            for slot, found in zip((2 * layer, 2 * layer + 1), prefix.layers[layer], strict=True):
                for head in range(HEADS):
                    expected = slots[slot][head * DIM : (head + 1) * DIM]
                    torch.testing.assert_close(found[head, token], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_old", [False, True])
def test_prefix_tuning_checkpoint_is_folded(tmp_path: Path, is_old: bool) -> None:
    path = saved(tmp_path / "pytorch_model.bin", OrderedDict(mlp()), is_old)
    assert_is_the_fold(convert_file(path, SHAPE), mlp())
    assert_is_the_fold(convert_file(tmp_path, SHAPE), mlp())
    assert_goes_through_the_native_file(convert_file(tmp_path, SHAPE))


def test_prefix_tuning_state_dict_of_a_trainer(tmp_path: Path) -> None:
    inner = {f"model.{name}": tensor for name, tensor in mlp().items()}
    path = saved(tmp_path / "last.ckpt", {"epoch": 3, "state_dict": inner})
    assert_is_the_fold(convert_file(path, SHAPE), mlp())


def test_prefix_tuning_checkpoint_as_safetensors(tmp_path: Path) -> None:
    safetensors.torch.save_file(mlp(), tmp_path / "model.safetensors")
    assert_is_the_fold(convert_file(tmp_path / "model.safetensors", SHAPE), mlp())


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (mlp("_enc", "wte_enc"), "control_trans_enc (the encoder)"),
        (mlp("2", "wte2"), "control_trans2 (cross-attention)"),
        (mlp("_dec", "wte_dec"), "control_trans_dec (cross-attention)"),
    ],
)
def test_prefix_tuning_of_an_encoder_decoder_is_refused(
    tmp_path: Path, more: dict[str, torch.Tensor], what: str
) -> None:
    path = saved(tmp_path / "pytorch_model.bin", mlp() | more)
    refused(path, "expected an artefact of a decoder-only model, got an encoder-decoder's", what)


def test_prefix_tuning_infix_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "pytorch_model.bin", mlp() | {"wte2.weight": random(N, HIDDEN)})
    refused(path, "expected a prefix checkpoint, got an infix one: it has wte2.weight")


def test_prefix_tuning_with_a_deeper_mlp_is_refused(tmp_path: Path) -> None:
    # the middle layer would fit as the last one where its width happens to be the prefix's
    deeper = {"control_trans.4.weight": random(WIDTH, WIDTH), "control_trans.4.bias": random(WIDTH)}
    path = saved(tmp_path / "pytorch_model.bin", mlp() | deeper)
    refused(path, "expected an MLP of two linear layers (0 and 2), got a deeper one: 'control_trans.4.bias'")


def test_prefix_tuning_without_its_mlp_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "pytorch_model.bin", {"control_trans": random(N * WIDTH)})
    refused(path, "or wte.weight with control_trans.0/2.* (Li and Liang), got 'control_trans'")


def test_prefix_tuning_for_another_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "pytorch_model.bin", mlp())
    refused(path, "width must be 128 (2 * 4 layers * 2 KV heads * 8), got 96", shape=replace(SHAPE, num_layers=4))


# What none of the tools writes, and what must not run.


class Trap:
    """A pickle of it runs a command when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["decoder.pt", "cartridge.pt", "pytorch_model.bin", "checkpoint.ckpt"])
@pytest.mark.parametrize("is_old", [False, True])
def test_code_in_a_torch_file_is_named_and_not_run(tmp_path: Path, name: str, is_old: bool) -> None:
    path = saved(tmp_path / name, {"prompt": random(N, HIDDEN), "more": Trap(tmp_path / "ran")}, is_old)
    refused(path, f"{name}: expected weights alone, got a pickle that names posix.system: it is not run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_bare_pickle_is_refused_unrun(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "decoder.pt").write_bytes(pickle.dumps(Trap(tmp_path / "ran"), protocol))
    refused(tmp_path / "decoder.pt", "decoder.pt: expected weights alone", "got a pickle")
    assert not (tmp_path / "ran").exists()


def test_module_and_settings_objects_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "pytorch_model.bin", torch.nn.Linear(2, 2))
    refused(path, "expected weights alone, got a pickle that names torch.nn.modules.linear.Linear")
    path = saved(tmp_path / "last.ckpt", {"state_dict": mlp(), "hparams": argparse.Namespace(lr=1)})
    refused(path, "expected weights alone, got a pickle that names argparse.Namespace")


def test_code_inside_a_parameter_list_is_not_run(tmp_path: Path) -> None:
    lists = cartridge()
    lists["trainable_keys"].__dict__["_forward_hooks"] = Trap(tmp_path / "ran")
    refused(saved(tmp_path / "cartridge.pt", lists), "expected weights alone, got a pickle that names posix.system")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("body", [b"", b"PK\x03\x04 broken", b"hello, this is no file of weights" * 9, b"\x80\x02."])
def test_file_that_torch_did_not_write_is_refused(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "decoder.pt").write_bytes(body)
    refused(tmp_path / "decoder.pt", "decoder.pt: expected weights alone, written by torch.save; got ")


def test_cut_off_torch_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "decoder.pt", random(N, HIDDEN))
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "decoder.pt: expected weights alone, written by torch.save; got ")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "decoder.pt", "expected a file of weights, found nothing at")


@pytest.mark.parametrize("found", [7, "text", [1, 2], {}, {"a": 1}, {"a": torch.ones(2), "b": torch.ones(2)}])
def test_other_content_is_refused_with_what_came(tmp_path: Path, found: object) -> None:
    path = saved(tmp_path / "decoder.pt", found)
    came = (
        f"a dict with {', '.join(map(repr, found)) or 'nothing in it'}"
        if isinstance(found, dict)
        else type(found).__name__
    )
    refused(path, "decoder.pt: expected a .npy prompt, a prompt vector (one tensor)", f"got {came}")


def test_expanded_tensor_is_refused_before_it_is_made_whole(tmp_path: Path) -> None:
    path = saved(tmp_path / "decoder.pt", torch.ones(1, HIDDEN).expand(10**9, HIDDEN))
    assert path.stat().st_size < 10_000
    refused(path, f"[1000000000, {HIDDEN}] takes {10**9 * HIDDEN * 4} bytes, the file holds {HIDDEN * 4} for it")
    path = saved(tmp_path / "pytorch_model.bin", mlp() | {"wte.weight": torch.ones(1, HIDDEN).expand(10**9, HIDDEN)})
    refused(path, f"wte.weight: [1000000000, {HIDDEN}] takes")


def test_sparse_and_meta_tensors_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "decoder.pt", torch.ones(N, HIDDEN).to_sparse())
    refused(path, "decoder.pt: expected a dense tensor, got torch.sparse_coo")
    path = saved(tmp_path / "decoder.pt", torch.ones(N, HIDDEN, device="meta"))
    refused(path, "decoder.pt: expected a dense tensor, got torch.strided on meta")


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "decoder.pt", torch.zeros(50, HIDDEN))
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
    refused(tmp_path / "bomb.pt", "bomb.pt: expected uncompressed records, ", "is compressed")


def test_archive_that_uses_its_bytes_twice_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "decoder.pt", torch.zeros(50, HIDDEN))
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(100):
            again = copy.copy(largest)
            again.filename = f"decoder/data/{i + 1}"
            archive.filelist.append(again)
        archive.comment = b"written anew"
    refused(path, "decoder.pt: its records claim 9", f"bytes, {path.stat().st_size} are there")


def test_file_beyond_the_bound_is_refused_unread(tmp_path: Path) -> None:
    for name in ("decoder.pt", "prompt.npy", "model.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(weights_file.MAX_FILE_BYTES + 1)  # a hole: it takes no room on the disk
        refused(tmp_path / name, f"{name} must be <= {2**32} bytes, got {2**32 + 1}")


def test_native_and_peft_files_need_no_converting(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    for name in ("embeddings", "prompt_embeddings"):
        safetensors.torch.save_file({name: random(N, HIDDEN)}, path)
        refused(path, "expected a PrefixTuning checkpoint", f"got {name!r}; native and PEFT files need no converting")
