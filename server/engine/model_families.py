"""What single families need so that a packed stream can pass through their own modules: T5's bias, BART's positions,
Llama 4's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server.engine.batch import current_batch


class PackedPositions(torch.nn.Module):
    """In place of `embed_positions` (BART, mBART, Pegasus, M2M100, …), which takes a token's position from its place in
    the tensor: in a packed stream it comes with the batch."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self._own = embedding
        self._offset = int(getattr(embedding, "offset", 0))
        if hasattr(embedding, "create_position_ids_from_input_ids"):  # its first position is the padding token's
            self._offset = int(embedding.padding_idx) + 1

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch = current_batch.get(None)
        if batch is None:
            found: torch.Tensor = self._own(*args, **kwargs)
            return found
        table = self._own.weights if hasattr(self._own, "weights") else self._own.weight
        return torch.nn.functional.embedding(batch.position_ids + self._offset, table)


class PackedLengths:
    """In place of a cache, for families whose layers take a token's position from the cache's length and the token's
    place in the tensor (Llama 4's temperature): the length is then one a token."""

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        positions = current_batch.get().position_ids[0]
        return positions - torch.arange(len(positions), device=positions.device)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


def counts_by_cache(model: Any) -> bool:
    """Whether its layers ask a cache for their tokens' positions."""
    return any(getattr(module, "attn_temperature_tuning", False) for module in model.modules())


@torch.no_grad()
def prepare(model: Any) -> None:
    """Fit a loaded encoder-decoder for packed streams. Outside of them it computes what it did."""
    for stack in (model.get_encoder(), model.get_decoder()):
        if getattr(stack, "embed_positions", None) is not None:
            stack.embed_positions = PackedPositions(stack.embed_positions)
        for index, layer in enumerate(getattr(stack, "layers", ())):
            for module in layer.modules():  # without a cache no encoder layer needs its number, and some have none
                if getattr(module, "layer_idx", index) is None:
                    module.layer_idx = index
        for module in stack.modules():
            if getattr(module, "has_relative_attention_bias", False):
                module.compute_bias = _by_distance_in_packed_streams(module, module.compute_bias)


def _by_distance_in_packed_streams(module: Any, own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """T5's bias (Raffel et al., 2020) depends on key position - query position only, and from the module's largest
    distance on no more. The first layer's is handed to all layers: what travels is `[2 * max_distance + 1, num_heads]`,
    of which every attention takes its own."""
    max_distance = int(module.relative_attention_max_distance)
    by_distance = own(1, 2 * max_distance + 1, past_seen_tokens=max_distance)[0, :, 0].T.contiguous()
    module.register_buffer("bias_by_distance", by_distance, persistent=False)

    def bias(*args: Any, **kwargs: Any) -> torch.Tensor:
        if current_batch.get(None) is None:
            return own(*args, **kwargs)
        found: torch.Tensor = module.bias_by_distance
        return found

    return bias
