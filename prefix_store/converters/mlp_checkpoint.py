"""Unfolded training checkpoints, folded: PEFT's, and Li and Liang's PrefixTuning (`pytorch_model.bin`).

A part is a table and an MLP: `wte` and `control_trans` for the (decoder's) self-attention, and in checkpoints of an
encoder-decoder one for the encoder and one for cross-attention beside it, all in the same order of slots. Those for
BART were trained with the text's positions counted from 0 in both stacks.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from prefix_store.converters.weights_file import plain_tensor
from prefix_store.errors import InvalidArtefactError
from prefix_store.fold import Names, find, fold
from prefix_store.peft_format import decoder_layers
from prefix_store.prefix import Layers, ModelShape, Prefix
from prefix_store.validation import check_architecture, validate

PEFT = Names("embedding", "transform")
SELF = Names("wte", "control_trans")
ENCODER = Names("wte_enc", "control_trans_enc")
CROSS = Names("wte2", "control_trans2")
CROSS_OF_OTHERS = Names("wte_dec", "control_trans_dec")  # what later programs call it
PARTS = (PEFT, SELF, ENCODER, CROSS, CROSS_OF_OTHERS)
OF_ENCODER_DECODERS = {
    ENCODER.mlp: "the encoder",
    CROSS.mlp: "cross-attention",
    CROSS_OF_OTHERS.mlp: "cross-attention",
}


def is_mlp_checkpoint(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether any name is a part of one, so that a wrong one is refused as what it is."""
    modules = _modules(tensors)
    return any(names.mlp in modules for names in PARTS)


def read_mlp_checkpoint(tensors: dict[str, torch.Tensor], shape: ModelShape) -> Prefix:
    """The folded KV prefix, validated. Raises InvalidArtefactError."""
    modules = _modules(tensors)
    parts = [names for names in PARTS if names.mlp in modules]
    deeper = [name for name in sorted(tensors) if any(_is_in(name, f"{names.mlp}.4") for names in parts)]
    if deeper:
        raise InvalidArtefactError(
            f"expected an MLP of two linear layers (0 and 2), got a deeper one: {deeper[0][:60]!r}"
        )
    wanted = {
        name: plain_tensor(name, tensor)
        for name, tensor in tensors.items()
        if any(_is_in(name, names.table) or _is_in(name, names.mlp) for names in parts)
    }
    of_encoder_decoder = [f"{mlp} ({what})" for mlp, what in OF_ENCODER_DECODERS.items() if mlp in modules]
    if of_encoder_decoder:
        prefix = _encoder_decoder(wanted, parts, of_encoder_decoder, shape)
    else:
        prefix = _one_part(wanted or tensors, CROSS.table in modules, shape)
    validate(prefix, shape)
    return prefix


def _one_part(tensors: dict[str, torch.Tensor], has_infix: bool, shape: ModelShape) -> Prefix:
    """PEFT's, or a decoder-only model's of Li and Liang."""
    found = find(tensors, PEFT)
    if found is not None:
        num_layers = shape.num_layers
        if shape.is_encoder_decoder:  # laid out by the encoder's layers, or as many as the trainer named
            num_layers = max(num_layers, found[-1].numel() // (2 * shape.num_kv_heads * shape.head_dim))
        slots = fold(found, PEFT.mlp, num_layers, shape)
        return Prefix("kv", layers=decoder_layers(slots, shape), is_seq2seq=shape.is_encoder_decoder)
    if has_infix:
        raise InvalidArtefactError(f"expected a prefix checkpoint, got an infix one: it has {CROSS.table}.weight")
    found = find(tensors, SELF)
    if found is None:
        _refuse(f"{PEFT} (PEFT) or {SELF} (Li and Liang)", tensors)
    check_architecture(False, shape)
    return Prefix("kv", layers=_layers(fold(found, SELF.mlp, shape.num_layers, shape)))


def _encoder_decoder(
    tensors: dict[str, torch.Tensor], parts: list[Names], described: list[str], shape: ModelShape
) -> Prefix:
    if not shape.is_encoder_decoder:
        raise InvalidArtefactError(
            f"expected an artefact of a decoder-only model, got an encoder-decoder's: its MLPs are "
            f"{SELF.mlp} and {', '.join(described)}"
        )
    if CROSS in parts and CROSS_OF_OTHERS in parts:
        raise InvalidArtefactError(f"expected one part for cross-attention, got {', '.join(described)}")
    if PEFT in parts:
        raise InvalidArtefactError(f"expected {SELF.mlp} beside {', '.join(described)}, got {PEFT.mlp}")
    layers: dict[Names, Layers] = {}
    for names in parts:
        found = find(tensors, names)
        if found is None:
            _refuse(str(names), tensors)
        num_layers = shape.num_encoder_layers if names == ENCODER else shape.num_layers
        layers[names] = _layers(fold(found, names.mlp, num_layers, shape))
    return Prefix(
        "kv",
        layers=layers.get(SELF, {}),
        encoder=layers.get(ENCODER, {}),
        cross=layers.get(CROSS, layers.get(CROSS_OF_OTHERS, {})),
        is_seq2seq=True,
    )


def _layers(slots: torch.Tensor) -> Layers:
    """Of layer l slot 2l is the key, slot 2l + 1 the value, each `[num_kv_heads, n, head_dim]`."""
    return {i: (slots[2 * i], slots[2 * i + 1]) for i in range(len(slots) // 2)}


def _refuse(expected: str, tensors: dict[str, torch.Tensor]) -> NoReturn:
    got = ", ".join(repr(name[:60]) for name in sorted(tensors)[:8])
    raise InvalidArtefactError(f"expected {expected}, got {got or 'none of them'}")


def _modules(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {part for name in tensors for part in name.split(".")}


def _is_in(name: str, module: str) -> bool:
    """`module` as whole dotted components of `name`."""
    return f".{module}." in f".{name}."
