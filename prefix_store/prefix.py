"""The trained artefact (`Prefix`) and the frozen model's measures that it must fit (`ModelShape`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

Kind = Literal["kv", "soft"]
Placement = Literal["prefix", "infix"]


@dataclass(frozen=True)
class ModelShape:
    """What an artefact is validated against. The server makes it from the loaded model.

    `dtype` is the dtype the model computes in: values must stay finite after a cast to it.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: torch.dtype
    model_name: str
    fingerprint: str
    model_aliases: tuple[str, ...] = ()
    max_virtual_tokens: int = 4096


@dataclass(frozen=True, eq=False)
class Prefix:
    """One trained prefix, in its source form.

    `layers[i]` is `(key, value)`, each `[num_kv_heads, num_virtual_tokens, head_dim]`; a layer that is not in
    the mapping sees no prefix. `embeddings` is `[num_virtual_tokens, hidden_size]`. Exactly one of the two is
    set, by `kind`.
    """

    kind: Kind
    layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    embeddings: torch.Tensor | None = None
    placement: Placement = "prefix"
    separator: int | None = None
    base_model: str | None = None
    fingerprint: str | None = None

    @property
    def num_virtual_tokens(self) -> int:
        if self.embeddings is not None:
            return self.embeddings.shape[0]
        key, _ = next(iter(self.layers.values()))
        return key.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the source form in memory."""
        tensors = [t for pair in self.layers.values() for t in pair]
        if self.embeddings is not None:
            tensors.append(self.embeddings)
        return sum(t.numel() * t.element_size() for t in tensors)
