"""An unfolded table (P_theta and its MLP) to the keys and values that it stands for (Li and Liang, 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from prefix_store.errors import InvalidArtefactError
from prefix_store.prefix import ModelShape


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls P_theta and the MLP, whatever module they sit in."""

    table: str
    mlp: str

    @property
    def tensors(self) -> tuple[str, ...]:
        mlp = [f"{self.mlp}.{place}.{part}" for place in (0, 2) for part in ("weight", "bias")]
        return (f"{self.table}.weight", *mlp)

    def __str__(self) -> str:
        return f"{self.table}.weight with {self.mlp}.0/2.*"


def find(tensors: Mapping[str, torch.Tensor], names: Names) -> tuple[torch.Tensor, ...] | None:
    """The tensors of `names`; None if one is missing or there twice."""
    found = []
    for name in names.tensors:
        ending = [tensor for key, tensor in tensors.items() if f".{key}".endswith(f".{name}")]
        if len(ending) != 1:
            return None
        found.append(ending[0])
    return tuple(found)


@torch.inference_mode()
def fold(parts: tuple[torch.Tensor, ...], name: str, num_layers: int, shape: ModelShape) -> torch.Tensor:
    """`Linear(k, m)`, `Tanh`, `Linear(m, width)` over the rows of P_theta `[n, k]`; `parts` as `Names.tensors`.

    `[2 * num_layers, num_kv_heads, n, head_dim]`; `name` is the MLP's in reasons. Raises InvalidArtefactError.
    """
    table, w0, b0, w2, b2 = (tensor.float() for tensor in parts)
    sizes = [tuple(t.shape) for t in (table, w0, b0, w2, b2)]
    if [len(size) for size in sizes] != [2, 2, 1, 2, 1] or (
        w0.shape != (w2.shape[1], table.shape[1]) or b0.shape[0] != w0.shape[0] or w2.shape[0] != b2.shape[0]
    ):
        raise InvalidArtefactError(f"P_theta [n, k] and its MLP (k to m to width) do not fit each other: {sizes}")
    width = 2 * num_layers * shape.num_kv_heads * shape.head_dim
    if w2.shape[0] != width:
        raise InvalidArtefactError(
            f"{name}.2.weight: width must be {width} (2 * {num_layers} layers * {shape.num_kv_heads} KV heads * "
            f"{shape.head_dim}), got {w2.shape[0]}"
        )
    folded = torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(table, w0, b0)), w2, b2)
    return split_slots(folded, shape)


def split_slots(table: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """`[n, 2 * num_layers * num_kv_heads * head_dim]` as `[2 * num_layers, num_kv_heads, n, head_dim]`."""
    slots = table.view(table.shape[0], -1, shape.num_kv_heads, shape.head_dim)
    return slots.permute(1, 2, 0, 3).contiguous()
