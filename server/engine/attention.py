"""Attention over the packed stream, called by every layer of the model in place of its own.

`softmax(Q [P_k; K]^T * scaling) [P_v; V]` (Li and Liang, 2021): the row's block table puts the prefix's blocks before
its own, so both are one gather and one batched product.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from server.engine.batch import AttentionGroup, Batch, current_batch

NAME = "prefixserve"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write the step's K and V, then attend group by group.

    `query` `[1, num_heads, num_tokens, head_dim]`, `key` and `value` `[1, num_kv_heads, num_tokens, head_dim]` (in
    cross-attention: of the encoded tokens of rows that start); returns `[1, num_tokens, num_heads, head_dim]`. `s_aux`
    `[num_heads]` are sinks: logits that take weight and give nothing. `position_bias` is T5's, by distance
    `[2 * max_distance + 1, num_heads]` (see `model_families`).
    """
    assert attention_mask is None, "the stream carries its own masks"
    batch = current_batch.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    is_cross = bool(batch.cross_groups) and not module.is_causal
    groups, written = (batch.cross_groups, batch.encoder) if is_cross else (batch.groups, batch)
    if written is not None:  # rows that start keep K and V of their encoded tokens in the slots that the encoder passed
        batch.kv_blocks.write(layer, written.slot_mapping, key[0], value[0])
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    queries = query[0].transpose(0, 1)  # [num_tokens, num_heads, head_dim]
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for group in groups:
        bias = None if position_bias is None or is_cross else group.bias(position_bias)
        attended = _attend(layer, queries, group, batch, scaling, sliding_window, softcap, s_aux, bias)
        if group.kept is not None:
            attended = attended.index_select(0, group.kept)
        out.index_copy_(0, group.out_index, attended)
    return out[None], None


def _attend(
    layer: int,
    queries: torch.Tensor,
    group: AttentionGroup,
    batch: Batch,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The group's outputs `[rows * max_queries, num_heads, head_dim]`."""
    num_heads, head_dim = queries.shape[1:]
    num_kv_heads = batch.kv_blocks.num_kv_heads
    rows, shared = group.num_rows, num_heads // num_kv_heads
    keys, values = batch.kv_blocks.gather(layer, group.block_index, rows)
    q = queries.index_select(0, group.query_index).view(rows, -1, num_kv_heads, shared, head_dim)
    max_queries = q.shape[1]
    q = q.permute(0, 2, 3, 1, 4).reshape(rows * num_kv_heads, shared * max_queries, head_dim)
    scores = torch.bmm(q, keys.transpose(1, 2)).mul_(scaling)
    if softcap is not None:
        scores = torch.tanh_(scores / softcap).mul_(softcap)
    scores = scores.view(rows, num_kv_heads, shared, max_queries, -1)
    if bias is not None:
        scores += bias.view(scores.shape)
    scores += group.mask(layer, sliding_window, scores.dtype)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, num_kv_heads, shared, 1, 1).expand(rows, -1, -1, max_queries, -1)
        weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    out = torch.bmm(weights.reshape(rows * num_kv_heads, shared * max_queries, -1), values)
    out = out.view(rows, num_kv_heads, shared, max_queries, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(rows * max_queries, num_heads, head_dim)


AttentionInterface.register(NAME, packed_attention)
