"""What single families need so that a packed stream can pass through their own modules: T5's bias, BART's positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server.engine.batch import current_batch


class PackedPositions(torch.nn.Module):
    """In place of `embed_positions` (BART, mBART, Pegasus, …), which takes a token's position from its place in the
    tensor: in a packed stream it comes with the batch."""

    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self._own = embedding
        self._offset = int(getattr(embedding, "offset", 0))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch = current_batch.get(None)
        if batch is None:
            found: torch.Tensor = self._own(*args, **kwargs)
            return found
        return torch.nn.functional.embedding(batch.position_ids + self._offset, self._own.weight)


def prepare(model: Any) -> None:
    """Fit a loaded encoder-decoder for packed streams. Outside of them it computes what it did."""
    for stack in (model.get_encoder(), model.get_decoder()):
        embedding = getattr(stack, "embed_positions", None)
        if isinstance(embedding, torch.nn.Embedding):
            stack.embed_positions = PackedPositions(embedding)
        for module in stack.modules():
            if getattr(module, "has_relative_attention_bias", False):
                # The first layer's bias is handed to all layers: the table travels, each group makes its bias of it.
                module.compute_bias = _table_in_packed_streams(module, module.compute_bias)


def _table_in_packed_streams(module: Any, own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def bias_or_table(*args: Any, **kwargs: Any) -> torch.Tensor:
        if current_batch.get(None) is None:
            return own(*args, **kwargs)
        table: torch.Tensor = module.relative_attention_bias.weight
        return table

    return bias_or_table


def bias_of_distance(module: Any, table: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """T5's bias `[..., num_heads]` of key position - query position (Raffel et al., 2020), by the module's buckets."""

    def bias(distance: torch.Tensor) -> torch.Tensor:
        buckets = module._relative_position_bucket(
            distance,
            bidirectional=not module.is_decoder,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
        return torch.nn.functional.embedding(buckets, table)

    return bias
