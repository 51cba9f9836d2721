"""Does an artefact fit the model, and are its values such that the model can compute with them?"""

from __future__ import annotations

import torch

from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import ModelShape, Prefix

MAX_MAGNITUDE = 65_504.0  # the largest fp16


def validate(prefix: Prefix, shape: ModelShape) -> None:
    """Raises InvalidArtefactError naming the tensor, what was expected and what came."""
    if prefix.placement != "prefix":
        raise InvalidArtefactError(f"placement must be 'prefix', got {prefix.placement!r}: infixes are not served yet")
    if prefix.embeddings is not None:
        check_rank("embeddings", prefix.embeddings, 2, "[num_virtual_tokens, hidden_size]")
        _check_size("embeddings", "hidden_size", prefix.embeddings.shape[1], shape.hidden_size)
        check_values("embeddings", prefix.embeddings, shape.dtype)
    for layer, pair in prefix.layers.items():
        if layer >= shape.num_layers:
            raise InvalidArtefactError(f"layers.{layer}: the model has {shape.num_layers} layers (0 to the last)")
        for part, tensor in zip(("key", "value"), pair, strict=True):
            name = f"layers.{layer}.{part}"
            check_rank(name, tensor, 3, "[num_kv_heads, num_virtual_tokens, head_dim]")
            _check_size(name, "num_kv_heads", tensor.shape[0], shape.num_kv_heads)
            _check_size(name, "num_virtual_tokens (as in the other layers)", tensor.shape[1], prefix.num_virtual_tokens)
            _check_size(name, "head_dim", tensor.shape[2], shape.head_dim)
            check_values(name, tensor, shape.dtype)
    limit = min(shape.max_virtual_tokens, shape.max_positions - 2)
    if not 1 <= prefix.num_virtual_tokens <= limit:
        raise InvalidArtefactError(f"num_virtual_tokens must be 1 to {limit}, got {prefix.num_virtual_tokens}")


def check_rank(name: str, tensor: torch.Tensor, rank: int, meaning: str) -> None:
    if tensor.dim() != rank:
        raise InvalidArtefactError(f"{name}: expected {rank} dimensions {meaning}, got {list(tensor.shape)}")


def check_values(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Finite, no magnitude above 65,504, finite after the cast to the model's dtype."""
    exact = tensor.double() if tensor.dtype == torch.float64 else tensor.float()
    if not bool(torch.isfinite(exact).all()):
        raise InvalidArtefactError(f"{name}: all values must be finite, got NaN or infinity")
    largest = float(exact.abs().max())
    if largest > MAX_MAGNITUDE:
        raise InvalidArtefactError(f"{name}: magnitudes must be <= {MAX_MAGNITUDE:g}, got {largest:g}")
    if not bool(torch.isfinite(exact.to(dtype)).all()):
        raise InvalidArtefactError(f"{name}: all values must stay finite as {dtype}, {largest:g} does not")


def _check_size(name: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise InvalidArtefactError(f"{name}: {what} must be {expected}, got {found}")
