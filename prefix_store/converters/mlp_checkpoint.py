"""Li and Liang's PrefixTuning checkpoints (`pytorch_model.bin`): P_theta and its MLP, folded (Li and Liang, 2021).

A part is a table and an MLP: `wte` and `control_trans` for the (decoder's) self-attention, and in checkpoints of an
encoder-decoder two parts more, one for the encoder and one for cross-attention.
"""

from __future__ import annotations

import torch

from prefix_store.converters.prompt_vector import encoder_decoder_error
from prefix_store.converters.weights_file import plain_tensor
from prefix_store.errors import InvalidArtefactError
from prefix_store.fold import NAMES, fold
from prefix_store.prefix import ModelShape, Prefix

ENCODER_DECODER_PARTS = {
    "control_trans_enc": "the encoder",
    "control_trans2": "cross-attention",
    "control_trans_dec": "cross-attention",
}
INFIX_TABLE = "wte2"
MLPS = tuple(mlp for _, mlp in NAMES)


def is_mlp_checkpoint(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether any name is a part of one, so that a wrong one is refused as what it is."""
    modules = _modules(tensors)
    return any(name in modules for name in (*MLPS, *ENCODER_DECODER_PARTS))


def read_mlp_checkpoint(tensors: dict[str, torch.Tensor], shape: ModelShape) -> Prefix:
    """The folded KV prefix. Raises InvalidArtefactError."""
    modules = _modules(tensors)
    others = [f"{name} ({what})" for name, what in ENCODER_DECODER_PARTS.items() if name in modules]
    if others:
        raise encoder_decoder_error(f"its MLPs are control_trans and {', '.join(others)}")
    if INFIX_TABLE in modules:
        raise InvalidArtefactError(f"expected a prefix checkpoint, got an infix one: it has {INFIX_TABLE}.weight")
    deeper = [name for name in tensors if any(_is_in(name, f"{mlp}.4") for mlp in MLPS)]
    if deeper:
        raise InvalidArtefactError(f"expected an MLP of two linear layers (0 and 2), got a deeper one: {deeper[0]}")
    wanted = [name for name in tensors if any(_is_in(name, table) or _is_in(name, mlp) for table, mlp in NAMES)]
    return fold({name: plain_tensor(name, tensors[name]) for name in wanted}, shape)


def _modules(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {part for name in tensors for part in name.split(".")}


def _is_in(name: str, module: str) -> bool:
    """`module` as whole dotted components of `name`."""
    return f".{module}." in f".{name}."
