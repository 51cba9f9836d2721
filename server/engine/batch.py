"""One step's packed token stream: what is computed, where it is written and what every row sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from server.engine.kv_blocks import BLOCK_SIZE, NULL_BLOCK, KVBlocks, num_blocks_for
from server.engine.sequence import Sequence

NEVER = 2**30  # the position of a slot that no query may see
SHORT_BLOCKS = 8  # rows up to this many blocks share a group, whatever their length


@dataclass(frozen=True)
class PackedRow:
    """One row's share of the stream: text tokens `start .. end - 1` behind `num_virtual_tokens` virtual ones."""

    token_ids: list[int] | None  # of the text tokens start..end-1; None for embeddings
    start: int
    end: int
    num_virtual_tokens: int
    prefix_blocks: list[int]
    own_blocks: list[int]
    wants_logits: bool

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass
class AttentionGroup:
    """Rows with queries and contexts of like length, attended together in batched products.

    `query_index` `[rows * max_queries]` takes the rows' queries out of the stream (short rows repeat their last one),
    `kept` `[num_tokens]` takes the outputs that count out of those, `out_index` `[num_tokens]` puts them back.
    `query_positions` `[rows, max_queries]`, `key_positions` `[rows, slots]`.
    """

    num_rows: int
    query_index: torch.Tensor
    kept: torch.Tensor | None  # None: all
    out_index: torch.Tensor
    block_index: torch.Tensor
    query_positions: torch.Tensor
    key_positions: torch.Tensor
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """`[rows, 1, 1, max_queries, slots]`, 0 where the query sees the key and -inf elsewhere."""
        found = self._masks.get(sliding_window)
        if found is None:
            distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
            seen = distance >= 0
            if sliding_window is not None:
                seen &= distance < sliding_window
            found = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            found = found[:, None, None]
            self._masks[sliding_window] = found
        return found


@dataclass
class Batch:
    """The step: `[1, num_tokens]` ids or `[1, num_tokens, hidden_size]` embeddings, with explicit positions."""

    position_ids: torch.Tensor  # [1, num_tokens]
    slot_mapping: torch.Tensor  # [2 * num_kv_heads * num_tokens]
    groups: list[AttentionGroup]
    logits_index: torch.Tensor  # [num_logits]
    kv_blocks: KVBlocks
    input_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None


def rows_of(scheduled: list[Sequence]) -> list[PackedRow]:
    """The packed rows of scheduled sequences; a row whose last known token is computed wants logits."""
    rows = []
    for sequence in scheduled:
        start = sequence.num_computed_tokens
        end = start + sequence.num_scheduled_tokens
        rows.append(
            PackedRow(
                token_ids=sequence.token_ids[start:end],
                start=start,
                end=end,
                num_virtual_tokens=sequence.num_virtual_tokens,
                prefix_blocks=sequence.resident.block_table if sequence.resident else [],
                own_blocks=sequence.block_table,
                wants_logits=end == len(sequence.token_ids),
            )
        )
    return rows


def make_batch(rows: list[PackedRow], kv_blocks: KVBlocks, inputs_embeds: torch.Tensor | None = None) -> Batch:
    """Pack rows. `inputs_embeds` `[num_tokens, hidden_size]` stands in for the rows' token ids."""
    device = kv_blocks.device
    offsets, num_tokens = [], 0
    token_ids: list[int] = []
    block_ids: list[int] = []
    slot_offsets: list[int] = []
    positions: list[int] = []
    logits_index: list[int] = []
    for row in rows:
        offsets.append(num_tokens)
        num_tokens += row.num_tokens
        if row.token_ids is not None:
            token_ids += row.token_ids
        for token in range(row.start, row.end):
            block_ids.append(row.own_blocks[token // BLOCK_SIZE])
            slot_offsets.append(token % BLOCK_SIZE)
            positions.append(row.num_virtual_tokens + token)
        if row.wants_logits:
            logits_index.append(num_tokens - 1)
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        num_blocks = max(len(row.prefix_blocks) + num_blocks_for(row.end), SHORT_BLOCKS)
        by_size.setdefault(((row.num_tokens - 1).bit_length(), (num_blocks - 1).bit_length()), []).append(i)
    groups = [
        _group([rows[i] for i in members], [offsets[i] for i in members], kv_blocks) for members in by_size.values()
    ]
    return Batch(
        position_ids=torch.tensor([positions], device=device),
        slot_mapping=kv_blocks.slots(torch.tensor(block_ids), torch.tensor(slot_offsets)),
        groups=groups,
        logits_index=torch.tensor(logits_index, dtype=torch.long, device=device),
        kv_blocks=kv_blocks,
        input_ids=torch.tensor([token_ids], device=device) if inputs_embeds is None else None,
        inputs_embeds=None if inputs_embeds is None else inputs_embeds[None].to(device),
    )


def _group(rows: list[PackedRow], offsets: list[int], kv_blocks: KVBlocks) -> AttentionGroup:
    device = kv_blocks.device
    num_queries = torch.tensor([row.num_tokens for row in rows])[:, None]
    starts = torch.tensor(offsets)[:, None]
    max_queries = int(num_queries.max())
    steps = torch.arange(max_queries)[None]
    clamped = torch.minimum(steps, num_queries - 1)
    query_index = starts + clamped  # [rows, max_queries]
    counts = steps < num_queries
    first = torch.tensor([row.num_virtual_tokens + row.start for row in rows])[:, None]
    tables = [row.prefix_blocks + row.own_blocks[: num_blocks_for(row.end)] for row in rows]
    max_blocks = max(len(table) for table in tables)
    block_tables = torch.tensor([table + [NULL_BLOCK] * (max_blocks - len(table)) for table in tables])
    # A prefix fills whole blocks, so its last one may end in slots that nobody sees; text starts at a new block.
    num_virtual = torch.tensor([row.num_virtual_tokens for row in rows])[:, None]
    prefix_slots = torch.tensor([len(row.prefix_blocks) * BLOCK_SIZE for row in rows])[:, None]
    slots = torch.arange(max_blocks * BLOCK_SIZE)[None]
    text_positions = slots - prefix_slots + num_virtual
    key_positions = torch.where(slots < num_virtual, slots, torch.where(slots < prefix_slots, NEVER, text_positions))
    return AttentionGroup(
        num_rows=len(rows),
        query_index=query_index.reshape(-1).to(device),
        kept=None if bool(counts.all()) else counts.reshape(-1).nonzero()[:, 0].to(device),
        out_index=query_index[counts].to(device),
        block_index=kv_blocks.blocks(block_tables),
        query_positions=(first + clamped).to(device),
        key_positions=key_positions.to(device),
    )
