"""What a file is, told by its content (and `encoder.pt` by its name), and the Prefix that it stands for.

convert_file, fold_file (the last of these alone)
├── read_numpy_prompt      .npy            Google's prompt-tuning
├── read_prompt_vector     decoder.pt      caikit, IBM's text generation server
├── read_cartridge         cartridge.pt    Cartridges
└── read_mlp_checkpoint    pytorch_model.bin, .safetensors   Li and Liang's PrefixTuning, PEFT while training
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from prefix_store.converters.cartridge import is_cartridge, read_cartridge
from prefix_store.converters.mlp_checkpoint import is_mlp_checkpoint, read_mlp_checkpoint
from prefix_store.converters.numpy_prompt import MAGIC, read_numpy_prompt
from prefix_store.converters.prompt_vector import (
    DECODER,
    ENCODER,
    encoder_decoder_error,
    is_prompt_vector,
    read_prompt_vector,
)
from prefix_store.converters.weights_file import check_file_size, read_weights_file
from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import ModelShape, Prefix
from prefix_store.safetensors_header import load_tensors, max_header_bytes, read_header
from prefix_store.validation import validate

FOLDER_NAMES = (DECODER, ENCODER, "cartridge.pt", "pytorch_model.bin")
EXPECTED = (
    "a .npy prompt, a prompt vector (one tensor), a cartridge (trainable_keys and more) "
    "or a PrefixTuning checkpoint (wte.weight and control_trans.0/2.*)"
)


def convert_file(path: Path, shape: ModelShape) -> Prefix:
    """A validated prefix from another tool's file, or from the folder that holds it. Raises InvalidArtefactError."""
    path = _file_in(path, shape) if path.is_dir() else path
    check_file_size(path)
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if path.suffix == ".npy" or start == MAGIC:
        prefix = read_numpy_prompt(path, shape)
    elif path.suffix == ".safetensors":
        tensors = _read_safetensors(path, shape)
        if not is_mlp_checkpoint(tensors):
            raise InvalidArtefactError(
                f"{path.name}: expected a PrefixTuning checkpoint (wte.weight and control_trans.0/2.*), "
                f"got {_some(tensors)}; native and PEFT files need no converting"
            )
        prefix = read_mlp_checkpoint(tensors, shape)
    else:
        prefix = _convert(path.name, read_weights_file(path), shape)
    validate(prefix, shape)
    return prefix


def fold_file(path: Path, shape: ModelShape) -> Prefix:
    """A validated KV prefix from an unfolded checkpoint, and from nothing else. Raises InvalidArtefactError."""
    check_file_size(path)
    if path.suffix == ".safetensors":
        return read_mlp_checkpoint(_read_safetensors(path, shape), shape)
    found = read_weights_file(path)
    if not isinstance(found, dict):
        raise InvalidArtefactError(f"{path.name}: expected named tensors, got {type(found).__name__}")
    return read_mlp_checkpoint(_state_dict(found), shape)


def _read_safetensors(path: Path, shape: ModelShape) -> dict[str, torch.Tensor]:
    body = path.read_bytes()
    read_header(body, max_header_bytes(shape.num_layers))
    return load_tensors(body)


def _state_dict(found: dict[object, object]) -> dict[str, torch.Tensor]:
    """The tensors by name, also where a trainer keeps them with its own state."""
    inner = found.get("state_dict")
    weights = inner if isinstance(inner, dict) else found
    return {str(key): value for key, value in weights.items() if isinstance(value, torch.Tensor)}


def _convert(name: str, found: object, shape: ModelShape) -> Prefix:
    if is_cartridge(found):
        return read_cartridge(found, shape)
    if isinstance(found, dict):
        tensors = _state_dict(found)
        if is_mlp_checkpoint(tensors):
            return read_mlp_checkpoint(tensors, shape)
    if is_prompt_vector(found):
        return read_prompt_vector(name, found, shape)
    got = f"a dict with {_some(found)}" if isinstance(found, dict) else type(found).__name__
    raise InvalidArtefactError(f"{name}: expected {EXPECTED}; got {got}")


def _file_in(folder: Path, shape: ModelShape) -> Path:
    found = [name for name in FOLDER_NAMES if (folder / name).is_file()]
    if found == [DECODER, ENCODER]:
        both = f"{folder.name!r} has both {DECODER} and {ENCODER}"
        if not shape.is_encoder_decoder:
            raise encoder_decoder_error(both)
        raise InvalidArtefactError(
            f"expected {ENCODER} alone, {both}: soft prompts on the decoder are not served, and the answers of one "
            "without the other would not be those of training"
        )
    if len(found) != 1:
        raise InvalidArtefactError(
            f"expected one of {', '.join(FOLDER_NAMES)} in {folder}, found {', '.join(found) or 'none'}"
        )
    return folder / found[0]


def _some(names: Iterable[object]) -> str:
    return ", ".join(sorted(repr(name)[:40] for name in names)[:8]) or "nothing in it"
