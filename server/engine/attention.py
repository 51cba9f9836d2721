"""Attention over the packed stream, called by every layer of the model in place of its own.

`softmax(Q [P_k; K]^T * scaling) [P_v; V]` (Li and Liang, 2021): the row's block table puts the prefix's blocks before
its own. A kernel reads them where they are for rows of few queries; for others they are gathered into batched products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface

from server.engine.attention_group import AttentionGroup
from server.engine.batch import Batch, current_batch
from server.engine.kv_blocks import as_wide
from server.engine.reach import Reach

NAME = "prefixserve"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write the step's K and V, then attend group by group.

    `query` `[1, num_heads, num_tokens, head_dim]`, `key` and `value` `[1, num_kv_heads, num_tokens, head_dim]` (in
    cross-attention: of the encoded tokens of rows that start); returns `[1, num_tokens, num_heads, value_dim]`. A layer
    that is handed another layer's K and V writes none. `s_aux` `[num_heads]` are sinks: logits that take weight and
    give nothing. `position_bias` is T5's, by distance `[2 * max_distance + 1, num_heads]` (see `model_families`).
    """
    assert attention_mask is None, "the stream carries its own masks"
    batch = current_batch.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    source = batch.kv_blocks.sources[layer]
    reach = batch.kv_blocks.reaches[layer]
    value_dim = value.shape[-1]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    dim = max(query.shape[-1], value_dim)
    query = as_wide(query, dim)
    is_cross = bool(batch.cross_groups) and not module.is_causal
    slots = batch.encoded_slots if is_cross else batch.slot_mapping
    if slots is not None and source == layer:
        batch.kv_blocks.write(layer, slots, key[0], value[0])
    is_plain = softcap is None and s_aux is None and position_bias is None
    may_share = is_plain and reach.is_whole and not is_cross
    groups = batch.cross_groups if is_cross else batch.groups if may_share else batch.whole_groups
    seen = _attend_shared(source, query, batch, scaling) if may_share and batch.shared_keys else None
    queries = query[0].transpose(0, 1)  # [num_tokens, num_heads, head_dim]
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    kernels = batch.kv_blocks.kernels
    fits = kernels is not None and query.stride(-1) == 1 and query.dtype is batch.kv_blocks.dtype
    for group in groups:
        if kernels is not None and fits and group.has_few_queries and reach.chunk is None and (is_plain or is_cross):
            decode = group.decode(source, reach.window, scaling)
            kernels.attend_decode(decode, query, out, batch.kv_blocks.layers[source], seen)
            continue
        bias = None if position_bias is None or is_cross else group.bias(position_bias)
        attended = _attend(source, queries, group, batch, scaling, reach, softcap, s_aux, bias, seen)
        if group.kept is not None:
            attended = attended.index_select(0, group.kept)
        out.index_copy_(0, group.out_index, attended)
    return out[None, ..., :value_dim].contiguous(), None


class Seen(NamedTuple):
    """What the stream's queries have attended already, in fp32: `out` `[num_tokens, num_heads, head_dim]` and the
    logarithm of the weights' sum `lse` `[num_tokens, num_heads]`, -inf for a query that has seen nothing."""

    out: torch.Tensor
    lse: torch.Tensor


def _attend_shared(layer: int, query: torch.Tensor, batch: Batch, scaling: float) -> Seen:
    """Prefixes that rows share, each once for all its rows' queries (Juravsky et al., "Hydragen", 2024)."""
    _, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = batch.kv_blocks.layers[layer].shape[2]
    seen = Seen(
        torch.zeros(num_tokens, num_heads, head_dim, device=query.device),
        torch.full((num_tokens, num_heads), float("-inf"), device=query.device),
    )
    for shared in batch.shared_keys:
        if shared.layers is not None and layer not in shared.layers:
            continue
        keys, values = batch.kv_blocks.gather(layer, shared.block_index, 1)
        keys, values = keys[None, :, : shared.num_tokens], values[None, :, : shared.num_tokens]
        rows = query.index_select(2, shared.token_index).view(1, num_kv_heads, -1, head_dim)
        out, lse = _attend_with_lse(rows, keys, values, scaling)
        seen.out.index_copy_(0, shared.token_index, out.reshape(num_heads, -1, head_dim).transpose(0, 1).float())
        seen.lse.index_copy_(0, shared.token_index, lse.reshape(num_heads, -1).T)
    return seen


def _attend_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[1, heads, queries, head_dim]` over keys that all see whole; the outputs and `[1, heads, queries]` in fp32."""
    if query.device.type == "cpu" and query.dtype is torch.float32:  # in bf16 it takes 1.6x the products' time
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scaling)
        return out, lse
    return _products_with_lse(query, key, value, scaling)


def _products_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of batched products. The largest weight is e^(largest score - lse)."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    weights = torch.softmax(scores, -1)
    return weights @ value, scores.amax(-1).float() - weights.amax(-1).float().log()


def _attend(
    layer: int,
    queries: torch.Tensor,
    group: AttentionGroup,
    batch: Batch,
    scaling: float,
    reach: Reach,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    bias: torch.Tensor | None,
    seen: Seen | None,
) -> torch.Tensor:
    """The group's outputs `[rows * max_queries, num_heads, head_dim]`."""
    num_heads, head_dim = queries.shape[1:]
    num_kv_heads = batch.kv_blocks.layers[layer].shape[2]
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
    scores += group.mask(layer, reach, scores.dtype)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, num_kv_heads, shared, 1, 1).expand(rows, -1, -1, max_queries, -1)
        weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    out = torch.bmm(weights.reshape(rows * num_kv_heads, shared * max_queries, -1), values)
    out = out.view(rows, num_kv_heads, shared, max_queries, head_dim).permute(0, 3, 1, 2, 4)
    out = out.reshape(rows * max_queries, num_heads, head_dim)
    if seen is None:
        return out
    lse = scores.float().logsumexp(-1).permute(0, 3, 1, 2).reshape(rows * max_queries, num_heads)
    share = torch.sigmoid(lse - seen.lse.index_select(0, group.query_index))[..., None]
    return torch.lerp(seen.out.index_select(0, group.query_index), out.float(), share).to(out.dtype)


AttentionInterface.register(NAME, packed_attention)
