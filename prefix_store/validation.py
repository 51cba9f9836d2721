"""Does an artefact fit the model, and are its values such that the model can compute with them?"""

from __future__ import annotations

import torch

from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import Layers, ModelShape, Prefix

MAX_MAGNITUDE = 65_504.0  # the largest fp16


def validate(prefix: Prefix, shape: ModelShape) -> None:
    """Raises InvalidArtefactError naming the tensor, what was expected and what came."""
    check_architecture(prefix.is_seq2seq, shape)
    _check_place(prefix, shape)
    if prefix.embeddings is not None:
        if shape.reads == "ids":
            raise InvalidArtefactError(
                f"{shape.model_name} takes no embeddings, expected a KV prefix, got a soft prompt"
            )
        check_rank("embeddings", prefix.embeddings, 2, "[num_virtual_tokens, hidden_size]")
        _check_size("embeddings", "hidden_size", prefix.embeddings.shape[1], shape.hidden_size)
        check_values("embeddings", prefix.embeddings, shape.dtype)
    elif not shape.takes_keys:
        raise InvalidArtefactError(
            f"{shape.model_name} keeps one compressed vector a token in place of keys and values: expected a soft "
            "prompt, got a KV prefix"
        )
    for part, layers in prefix.parts():
        _check_layers(f"{part}." if prefix.is_seq2seq else "", layers, shape, encoder=part == "encoder")
    limit = min(shape.max_virtual_tokens, shape.max_positions - 2)
    layout = prefix.layout
    for count in (layout.num_decoder_tokens, layout.num_encoder_tokens, layout.num_cross_tokens):
        if count > limit:
            raise InvalidArtefactError(f"num_virtual_tokens must be 1 to {limit}, got {count}")
    if layout.num_virtual_tokens < 1:
        raise InvalidArtefactError(f"num_virtual_tokens must be 1 to {limit}, got 0")


def check_architecture(is_seq2seq: bool, shape: ModelShape) -> None:
    """Raises InvalidArtefactError for a decoder-only model's artefact on an encoder-decoder, and the reverse."""
    if is_seq2seq != shape.is_encoder_decoder:
        kinds = ("a decoder-only model", "an encoder-decoder")
        raise InvalidArtefactError(
            f"expected a prefix for {kinds[shape.is_encoder_decoder]} ({shape.model_name}), "
            f"got one for {kinds[is_seq2seq]}"
        )


def _check_place(prefix: Prefix, shape: ModelShape) -> None:
    if prefix.placement == "prefix":
        if prefix.separator is not None:
            raise InvalidArtefactError("separator belongs to a KV infix, this is a prefix")
        return
    if prefix.placement != "infix":
        raise InvalidArtefactError(f"placement must be 'prefix' or 'infix', got {prefix.placement[:40]!r}")
    if shape.is_encoder_decoder:
        raise InvalidArtefactError(
            "an infix needs a decoder-only model: in an encoder-decoder the decoder's prefix stands between x and y"
        )
    if prefix.kind == "kv" and prefix.separator is None:
        raise InvalidArtefactError(
            "a KV infix needs a separator (a token id): there is no hidden state at a KV position to predict from"
        )
    if prefix.kind == "soft" and prefix.separator is not None:
        raise InvalidArtefactError("separator belongs to a KV infix, this is a soft one")
    if prefix.separator is not None and not 0 <= prefix.separator < shape.vocab_size:
        raise InvalidArtefactError(f"separator must be a token id 0 to {shape.vocab_size - 1}, got {prefix.separator}")


def _check_layers(where: str, layers: Layers, shape: ModelShape, *, encoder: bool) -> None:
    num_layers = shape.num_encoder_layers if encoder else shape.num_layers
    num_virtual_tokens = None
    for layer, pair in layers.items():
        if not 0 <= layer < num_layers:
            raise InvalidArtefactError(f"{where}layers.{layer}: the model has {num_layers} layers (0 to the last)")
        expected = shape.layer(0 if encoder else layer)
        if not encoder and expected.source != layer:
            raise InvalidArtefactError(
                f"{where}layers.{layer}: the layer reads the keys and values of layer {expected.source}, expected none "
                "of its own"
            )
        for name, tensor, dim in zip(("key", "value"), pair, (expected.key_dim, expected.value_dim), strict=True):
            full = f"{where}layers.{layer}.{name}"
            check_rank(full, tensor, 3, "[num_kv_heads, num_virtual_tokens, head_dim]")
            num_virtual_tokens = num_virtual_tokens or tensor.shape[1]
            _check_size(full, "num_kv_heads", tensor.shape[0], expected.num_kv_heads)
            _check_size(full, "num_virtual_tokens (as in the other layers)", tensor.shape[1], num_virtual_tokens)
            _check_size(full, "head_dim", tensor.shape[2], dim)
            check_values(full, tensor, shape.dtype)


def check_rank(name: str, tensor: torch.Tensor, rank: int, meaning: str) -> None:
    """Also that there is no dimension of size 0. Raises InvalidArtefactError."""
    if tensor.dim() != rank or 0 in tensor.shape:
        raise InvalidArtefactError(
            f"{name}: expected {rank} dimensions {meaning} of at least 1, got {list(tensor.shape)}"
        )


def check_values(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Finite, no magnitude above 65,504, finite after the cast to the model's dtype."""
    exact = tensor.double() if tensor.dtype == torch.float64 else tensor.float()
    if not bool(torch.isfinite(exact).all()):
        raise InvalidArtefactError(f"{name}: all values must be finite, got NaN or infinity")
    largest = float(exact.abs().max())
    if largest > MAX_MAGNITUDE:
        raise InvalidArtefactError(f"{name}: magnitudes must be <= {MAX_MAGNITUDE:.9g}, got {largest:.9g}")
    # as float again: not every floating dtype knows isfinite
    if not bool(torch.isfinite(exact.to(dtype).float()).all()):
        raise InvalidArtefactError(f"{name}: all values must stay finite as {dtype}, {largest:.9g} does not")


def _check_size(name: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise InvalidArtefactError(f"{name}: {what} must be {expected}, got {found}")
