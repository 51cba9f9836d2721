"""Rows of a step that attend together: their queries, the blocks of their keys, and who sees what."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from server.engine.cpu_kernels import NO_WINDOW, Decode
from server.engine.kv_blocks import BlockIndex
from server.engine.reach import Reach
from server.engine.sequence import NEVER

KERNEL_QUERIES = 16  # of a row, up to which the kernel that takes them one by one is faster than products


@dataclass(frozen=True)
class Hidden:
    """Slots `start .. end - 1` of a row's keys are there only in `layers`: a prefix for some layers."""

    start: int
    end: int
    layers: frozenset[int]


@dataclass
class AttentionGroup:
    """Rows with queries and contexts of like length, attended together in batched products.

    `query_index` `[rows * max_queries]` takes the rows' queries out of the stream (short rows repeat their last one),
    `kept` `[num_tokens]` takes the outputs that count out of those, `out_index` `[num_tokens]` puts them back.
    `block_tables` `[rows, max_blocks]`, of which a row has `row_blocks` `[rows]`.
    `query_positions` `[rows, max_queries]`, `key_positions` `[rows, slots]`.
    """

    num_rows: int
    query_index: torch.Tensor
    kept: torch.Tensor | None  # None: all
    out_index: torch.Tensor
    block_tables: torch.Tensor
    row_blocks: torch.Tensor
    query_positions: torch.Tensor
    key_positions: torch.Tensor
    is_causal: bool
    hidden: tuple[tuple[int, Hidden], ...] = ()  # (row, what some layers lack)
    _masks: dict[tuple[Reach, tuple[bool, ...]], torch.Tensor] = field(default_factory=dict, init=False)
    _biases: dict[int, torch.Tensor] = field(default_factory=dict, init=False)
    _decodes: dict[tuple[bool, ...], Decode] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.block_index = BlockIndex(self.block_tables)

    @property
    def has_few_queries(self) -> bool:
        return len(self.query_index) <= self.num_rows * KERNEL_QUERIES

    def decode(self, layer: int, window: int | None, scaling: float) -> Decode:
        """The group for the kernel, a row for each query; what depends on the layer's tensors is still missing."""
        present = self._present(layer)
        found = self._decodes.get(present)
        if found is None:
            key_positions = self._key_positions(present)
            positions = self.query_positions if self.is_causal else torch.full_like(self.query_positions, NEVER - 1)
            tables, row_blocks = self.block_tables, self.row_blocks
            if len(self.query_index) > self.num_rows:
                rows = torch.arange(self.num_rows)[:, None].expand_as(positions).reshape(-1)
                rows = rows if self.kept is None else rows[self.kept]
                positions = positions.view(-1) if self.kept is None else positions.view(-1)[self.kept]
                key_positions, tables, row_blocks = key_positions[rows], tables[rows], row_blocks[rows]
            found = Decode(
                query_index=self.out_index.data_ptr(),
                block_tables=tables.data_ptr(),
                row_blocks=row_blocks.data_ptr(),
                key_positions=key_positions.data_ptr(),
                positions=positions.data_ptr(),
                rows=len(self.out_index),
                max_blocks=tables.shape[1],
            )
            found.tensors = (key_positions, positions, tables, row_blocks)  # the structure itself keeps nothing alive
            self._decodes[present] = found
        found.window = NO_WINDOW if window is None else window
        found.scaling = scaling
        return found

    def _present(self, layer: int) -> tuple[bool, ...]:
        """Which of `hidden` this layer has."""
        return tuple(layer in hidden.layers for _, hidden in self.hidden)

    def _key_positions(self, present: tuple[bool, ...]) -> torch.Tensor:
        """The positions of all keys, NEVER for those of the `hidden` that are not there."""
        if all(present):
            return self.key_positions
        key_positions = self.key_positions.clone()
        for (row, hidden), is_there in zip(self.hidden, present, strict=True):
            if not is_there:
                key_positions[row, hidden.start : hidden.end] = NEVER
        return key_positions

    def mask(self, layer: int, reach: Reach, dtype: torch.dtype) -> torch.Tensor:
        """`[rows, 1, 1, max_queries, slots]`, 0 where the query sees the key and -inf elsewhere."""
        present = self._present(layer)
        found = self._masks.get((reach, present))
        if found is None:
            key_positions = self._key_positions(present)
            if self.is_causal:
                seen = reach.sees(self.query_positions[:, :, None], key_positions[:, None, :])
            else:
                seen = (key_positions != NEVER)[:, None, :].expand(-1, self.query_positions.shape[1], -1)
            found = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            found = found[:, None, None]
            self._masks[reach, present] = found
        return found

    def bias(self, by_distance: torch.Tensor) -> torch.Tensor:
        """Of `by_distance` `[2 * max_distance + 1, heads]` (key - query, from -max_distance on; farther is as far as
        that), for every query and key `[rows, heads, max_queries, slots]`, made once a step."""
        found = self._biases.get(id(by_distance))
        if found is None:
            max_distance = by_distance.shape[0] // 2
            distance = self.key_positions[:, None, :] - self.query_positions[:, :, None]
            index = distance.clamp_(-max_distance, max_distance) + max_distance
            found = torch.nn.functional.embedding(index, by_distance).permute(0, 3, 1, 2).contiguous()
            self._biases[id(by_distance)] = found
        return found


@dataclass(frozen=True)
class SharedKeys:
    """Keys that several rows see whole, attended once for all their queries: a prefix of which there is one copy.

    `token_index` `[tokens]` takes the rows' queries out of the stream; `block_index` gathers the `num_tokens` keys.
    """

    token_index: torch.Tensor
    block_index: BlockIndex
    num_tokens: int
    layers: frozenset[int] | None  # None: all
