"""Cartridges' `cartridge.pt`: the keys and values of every layer, trained directly (Eyuboglu et al., 2025).

The library saves four lists with one tensor a layer. Its first tokens are frozen while training (they hold the
attention sink) and kept in lists of their own, which come first; text positions start after all of them.
"""

from __future__ import annotations

from typing import TypeGuard

import torch

from prefix_store.converters.weights_file import SavedList, plain_tensor
from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import ModelShape, Prefix
from prefix_store.validation import check_architecture

# The lists of frozen tokens were called fixed_* until July 2025.
FROZEN_NAMES = ("frozen", "fixed")


def is_cartridge(found: object) -> TypeGuard[dict[str, object]]:
    return isinstance(found, dict) and ("trainable_keys" in found or "trainable_values" in found)


def read_cartridge(found: dict[str, object], shape: ModelShape) -> Prefix:
    """Each tensor is `[1, num_kv_heads, num_tokens, head_dim]`. Raises InvalidArtefactError."""
    check_architecture(False, shape)
    frozen = next((name for name in FROZEN_NAMES if f"{name}_keys" in found), FROZEN_NAMES[0])
    names = {f"{kind}_{part}" for kind in ("trainable", frozen) for part in ("keys", "values")}
    if set(found) != names:
        got = ", ".join(repr(name)[:40] for name in list(found)[:8])
        raise InvalidArtefactError(f"a cartridge has {', '.join(sorted(names))} (or fixed_* for frozen_*); got {got}")
    lists = {name: _tensors(name, found[name], shape) for name in names}
    for name, tensors in lists.items():
        may_be_empty = name.startswith(frozen)
        if len(tensors) != shape.num_layers and (tensors or not may_be_empty):
            raise InvalidArtefactError(f"{name}: expected {shape.num_layers} layers, got {len(tensors)}")
    layers = {}
    for i in range(shape.num_layers):
        pair = []
        for part in ("keys", "values"):
            head, tail = lists[f"{frozen}_{part}"], lists[f"trainable_{part}"]
            # [num_kv_heads, num_virtual_tokens, head_dim]: the frozen tokens, then the trained ones
            pair.append(torch.cat([tokens[i][0] for tokens in (head, tail) if tokens], dim=1))
        layers[i] = (pair[0], pair[1])
    return Prefix("kv", layers=layers)


def _tensors(name: str, found: object, shape: ModelShape) -> list[torch.Tensor]:
    if isinstance(found, SavedList):
        found = _parameters(name, found.state)
    if not isinstance(found, list | tuple):
        raise InvalidArtefactError(f"{name}: expected a list with one tensor a layer, got {type(found).__name__}")
    tensors = []
    for i, entry in enumerate(found):
        tensor = plain_tensor(f"{name}.{i}", entry)
        expected = (1, shape.num_kv_heads, shape.head_dim)
        if tensor.dim() != 4 or (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != expected:
            raise InvalidArtefactError(
                f"{name}.{i}: expected [1, {shape.num_kv_heads}, num_tokens, {shape.head_dim}], "
                f"got {list(tensor.shape)}"
            )
        tensors.append(tensor)
    return tensors


def _parameters(name: str, state: object) -> list[object]:
    """A saved ParameterList's entries: it numbers them from 0 in `_parameters`."""
    entries = state.get("_parameters") if isinstance(state, dict) else None
    if not isinstance(entries, dict):
        raise InvalidArtefactError(f"{name}: expected a ParameterList, got none of its parameters")
    expected = [str(i) for i in range(len(entries))]
    if sorted(entries, key=str) != sorted(expected):
        got = ", ".join(repr(key)[:20] for key in list(entries)[:8])
        raise InvalidArtefactError(f"{name}: expected parameters 0 to {len(entries) - 1}, got {got}")
    return [entries[key] for key in expected]
