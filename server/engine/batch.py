"""One step's packed token stream: what is computed, where it is written and what every row sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from prefix_store.prefix import Reads
from server.engine.attention_group import AttentionGroup, Hidden, SharedKeys
from server.engine.kv_blocks import BLOCK_SIZE, NULL_BLOCK, BlockIndex, KVBlocks, num_blocks_for
from server.engine.resident_prefix import ResidentPrefix
from server.engine.sequence import NEVER, Context, Positions, Row

SHORT_BLOCKS = 8  # rows up to this many blocks share a group, whatever their length
MIN_SHARED_TOKENS = 128  # of a prefix from which on it pays to attend to it once for all its rows


@dataclass(frozen=True)
class LongPrefix:
    """Of a row's keys, `num_tokens` from slot `start` on: a prefix that all its queries see whole."""

    start: int
    num_tokens: int
    layers: frozenset[int] | None  # None: all


@dataclass(frozen=True)
class Keys:
    """What the queries of a row see: blocks, the position in every slot of them, and what some layers lack."""

    block_table: list[int]
    positions: Positions  # [len(block_table) * BLOCK_SIZE] or longer
    hidden: tuple[Hidden, ...] = ()
    long_prefix: LongPrefix | None = None

    @property
    def long_blocks(self) -> tuple[int, ...]:
        """Of the long prefix: the same for all rows that have it."""
        assert self.long_prefix is not None
        first = self.long_prefix.start // BLOCK_SIZE
        return tuple(self.block_table[first : first + num_blocks_for(self.long_prefix.num_tokens)])

    def without_long_prefix(self) -> Keys:
        assert self.long_prefix is not None
        start, num_slots = self.long_prefix.start, len(self.long_blocks) * BLOCK_SIZE
        first, last = start // BLOCK_SIZE, (start + num_slots) // BLOCK_SIZE
        hidden = tuple(
            span if span.start < start else replace(span, start=span.start - num_slots, end=span.end - num_slots)
            for span in self.hidden
            if span.start != start
        )
        positions = np.concatenate((self.positions[:start], self.positions[start + num_slots :]))
        return Keys(self.block_table[:first] + self.block_table[last:], positions, hidden)


@dataclass(frozen=True)
class PackedRow:
    """One row's share of the stream. A negative token id -1-i takes row i of `embeddings` `[n, hidden_size]`. The first
    `num_embedded_tokens` are a soft prompt's or read with one.

    Token k of the stream is written to slot `start + k` of `own_blocks`.
    """

    token_ids: list[int]
    positions: Positions  # [num_tokens]
    start: int
    own_blocks: list[int]
    keys: Keys
    cross_keys: Keys | None = None
    embeddings: torch.Tensor | None = None
    num_embedded_tokens: int = 0
    wants_logits: bool = False

    def part(self, start: int, end: int) -> PackedRow:
        """Its tokens `start .. end - 1`, which want the logits if they are the last."""
        return replace(
            self,
            token_ids=self.token_ids[start:end],
            positions=self.positions[start:end],
            start=self.start + start,
            num_embedded_tokens=max(self.num_embedded_tokens - start, 0),
            wants_logits=self.wants_logits and end == len(self.token_ids),
        )


@dataclass
class Batch:
    """The step: ids `[1, num_tokens]` with explicit positions; `embeddings` replace the ids at `embedding_index`.

    Where the model computes something else from embeddings than from ids, a step may have two streams. Of one that
    `is_embedded` the model is handed embeddings only. If the other has tokens too, the embedded one is its `before`,
    which runs first; `logits_order` `[num_logits]` then takes the rows' logits out of those of `before` followed by its
    own.
    """

    input_ids: torch.Tensor  # [1, num_tokens]
    position_ids: torch.Tensor  # [1, num_tokens]
    slot_mapping: torch.Tensor  # from `KVBlocks.slots`
    groups: list[AttentionGroup]  # of what each row sees, without what is in `shared_keys`
    logits_index: torch.Tensor  # [num_logits]
    kv_blocks: KVBlocks
    embedding_index: torch.Tensor | None = None  # [n]
    embeddings: torch.Tensor | None = None  # [n, hidden_size]
    cross_groups: list[AttentionGroup] = field(default_factory=list)
    encoders: list[Batch] = field(default_factory=list)  # of the rows that start
    encoded_slots: torch.Tensor | None = None  # where cross-attention keeps K and V of their encoded tokens
    before: Batch | None = None
    logits_order: torch.Tensor | None = None
    is_embedded: bool = False
    shared_keys: list[SharedKeys] = field(default_factory=list)
    make_whole_groups: Callable[[], list[AttentionGroup]] = list
    _whole_groups: list[AttentionGroup] | None = field(default=None, init=False)

    @property
    def whole_groups(self) -> list[AttentionGroup]:
        """Of all that each row sees, for layers where a query does not see all of a prefix or weighs it otherwise."""
        if not self.shared_keys:
            return self.groups
        if self._whole_groups is None:
            self._whole_groups = self.make_whole_groups()
        return self._whole_groups


# Not an argument of the model's forward: some families do not hand those on to their attention (StableLM). A trial
# forward may run in another thread meanwhile, so it belongs to the context.
current_batch: ContextVar[Batch] = ContextVar("current_batch")


@contextmanager
def attending(batch: Batch) -> Iterator[None]:
    """Inside, every attention of the model is about `batch`."""
    token = current_batch.set(batch)
    try:
        yield
    finally:
        current_batch.reset(token)


def batch_of(
    rows: list[Row],
    sampled: set[Row],
    kv_blocks: KVBlocks,
    prefixes: Iterable[ResidentPrefix] = (),
    *,
    reads: Reads = "either",
) -> Batch:
    """The step of rows and of soft prompts with scheduled tokens; rows of `sampled` want the logits of their last one.
    A row may stand behind a prefix whose last tokens are computed in the same step. `reads` is the model's."""
    encoders: list[Batch] = []
    starting = [_encoder_row(row) for row in rows if row.num_unencoded_tokens]
    if starting:
        embedded, by_ids = _by_input(starting, reads)
        encoders += [make_batch(embedded, kv_blocks, is_causal=False, is_embedded=True)] if embedded else []
        encoders += [make_batch(by_ids, kv_blocks, is_causal=False)] if by_ids else []
    packed = [_decoder_row(row, wants_logits=row in sampled) for row in rows]
    packed += [_prefix_row(resident) for resident in prefixes]
    embedded, by_ids = _by_input(packed, reads)
    if not embedded:
        return make_batch(by_ids, kv_blocks, encoders=encoders)
    before = make_batch(embedded, kv_blocks, is_embedded=True)
    if not by_ids:
        return before
    is_by_ids = np.array([row.num_embedded_tokens < len(row.token_ids) for row in packed if row.wants_logits])
    order = np.argsort(np.argsort(is_by_ids, kind="stable"))  # of a row, its place where those by ids come last
    batch = make_batch(by_ids, kv_blocks)
    return replace(batch, before=before, logits_order=torch.from_numpy(order).to(kv_blocks.device))


def _by_input(rows: list[PackedRow], reads: Reads) -> tuple[list[PackedRow], list[PackedRow]]:
    """What the model is handed as embeddings, and what as ids; all of it in one stream unless it reads each apart."""
    if reads != "each":
        return [], rows
    embedded, by_ids = [], []
    for row in rows:
        if row.num_embedded_tokens:
            embedded.append(row.part(0, row.num_embedded_tokens))
        if row.num_embedded_tokens < len(row.token_ids):
            by_ids.append(row.part(row.num_embedded_tokens, len(row.token_ids)))
    return embedded, by_ids


def _decoder_row(row: Row, *, wants_logits: bool) -> PackedRow:
    start, end = row.num_computed_tokens, row.num_computed_tokens + row.num_scheduled_tokens
    return PackedRow(
        token_ids=row.token_ids[start:end],
        num_embedded_tokens=min(max(row.num_embedded_tokens - start, 0), end - start),
        positions=row.context.own_positions[start:end],
        start=start,
        own_blocks=row.block_table,
        keys=_keys(row, row.context, row.block_table[: num_blocks_for(end)]),
        cross_keys=_keys(row, row.cross_context, row.cross_table) if row.encoder_ids else None,
        embeddings=row.embeddings,
        wants_logits=wants_logits,
    )


def _prefix_row(resident: ResidentPrefix) -> PackedRow:
    """A soft prompt's next tokens: its K and V are the prefix."""
    start, end = resident.num_computed_tokens, resident.num_computed_tokens + resident.num_scheduled_tokens
    positions = np.arange(start, end)
    blocks = resident.block_table[: num_blocks_for(end)]
    slot_positions = Context([], np.arange(end)).slot_positions
    ids = [-1 - i for i in range(start, end)]
    keys = Keys(blocks, slot_positions)
    return PackedRow(ids, positions, start, blocks, keys, embeddings=resident.embeddings, num_embedded_tokens=len(ids))


def _encoder_row(row: Row) -> PackedRow:
    return PackedRow(
        token_ids=row.encoder_ids,
        num_embedded_tokens=len(row.encoder_ids) if row.is_soft else 0,
        positions=row.encoder_context.own_positions,
        start=0,
        own_blocks=row.cross_table,
        keys=_keys(row, row.encoder_context, row.cross_table),
        embeddings=row.embeddings,
    )


def _keys(row: Row, context: Context, own_blocks: list[int]) -> Keys:
    hidden = []
    long_prefix = None
    for span in context.spans:
        layers = row.residents[span.index].partial_layers.get(span.part)
        if layers is not None:
            hidden.append(Hidden(span.start, span.start + span.num_tokens, layers))
        is_seen_whole = row.prefixes[span.index].layout.placement == "prefix"
        if is_seen_whole and span.num_tokens >= max(MIN_SHARED_TOKENS, long_prefix.num_tokens if long_prefix else 0):
            long_prefix = LongPrefix(span.start, span.num_tokens, layers)
    return Keys(row.shared_blocks(context) + own_blocks, context.slot_positions, tuple(hidden), long_prefix)


def make_batch(
    rows: list[PackedRow],
    kv_blocks: KVBlocks,
    *,
    is_causal: bool = True,
    is_embedded: bool = False,
    encoders: list[Batch] | None = None,
) -> Batch:
    """Pack rows into one stream."""
    device = kv_blocks.device
    offsets: list[int] = []
    token_ids: list[int] = []
    slots: list[int] = []
    logits_index: list[int] = []
    tables: list[torch.Tensor] = []
    for row in rows:
        offsets.append(len(token_ids))
        token_ids += row.token_ids
        end = row.start + len(row.token_ids)
        slots += [row.own_blocks[k // BLOCK_SIZE] * BLOCK_SIZE + k % BLOCK_SIZE for k in range(row.start, end)]
        if row.wants_logits:
            logits_index.append(len(token_ids) - 1)
        if row.embeddings is not None:
            taken = [-1 - token for token in row.token_ids if token < 0]
            tables += [row.embeddings[torch.tensor(taken, device=row.embeddings.device)]] if taken else []
    embedding_index = torch.tensor([i for i, token in enumerate(token_ids) if token < 0])
    positions = np.concatenate([row.positions for row in rows])
    own_slots = torch.tensor(slots)
    keys = [row.keys for row in rows]
    shared, apart = _share(keys, rows, offsets, kv_blocks) if is_causal else ([], keys)
    return Batch(
        input_ids=torch.tensor([token_ids]).clamp_(min=0).to(device),
        position_ids=torch.from_numpy(positions)[None].to(device),
        slot_mapping=kv_blocks.slots(own_slots // BLOCK_SIZE, own_slots % BLOCK_SIZE),
        groups=_groups(apart, rows, offsets, kv_blocks, is_causal=is_causal),
        logits_index=torch.tensor(logits_index, dtype=torch.long, device=device),
        kv_blocks=kv_blocks,
        embedding_index=embedding_index.to(device) if tables else None,
        embeddings=torch.cat(tables) if tables else None,
        cross_groups=_groups([row.cross_keys for row in rows], rows, offsets, kv_blocks, is_causal=False),
        encoders=encoders or [],
        encoded_slots=torch.cat([encoder.slot_mapping for encoder in encoders]) if encoders else None,
        is_embedded=is_embedded,
        shared_keys=shared,
        make_whole_groups=lambda: _groups(keys, rows, offsets, kv_blocks, is_causal=is_causal),
    )


def _share(
    keys: list[Keys], rows: list[PackedRow], offsets: list[int], kv_blocks: KVBlocks
) -> tuple[list[SharedKeys], list[Keys]]:
    """Long prefixes that more than one row sees, and what is left to each row alone."""
    num_rows = Counter(seen.long_blocks for seen in keys if seen.long_prefix is not None)
    apart: list[Keys] = []
    tokens: dict[tuple[int, ...], list[int]] = {}
    found: dict[tuple[int, ...], LongPrefix] = {}
    for seen, row, offset in zip(keys, rows, offsets, strict=True):
        if seen.long_prefix is None or num_rows[seen.long_blocks] == 1:
            apart.append(seen)
            continue
        apart.append(seen.without_long_prefix())
        found[seen.long_blocks] = seen.long_prefix
        tokens.setdefault(seen.long_blocks, []).extend(range(offset, offset + len(row.token_ids)))
    shared = [
        SharedKeys(
            token_index=torch.tensor(tokens[blocks]).to(kv_blocks.device),
            block_index=BlockIndex(torch.tensor([blocks])),
            num_tokens=prefix.num_tokens,
            layers=prefix.layers,
        )
        for blocks, prefix in found.items()
    ]
    return shared, apart


def _groups(
    keys: Iterable[Keys | None], rows: list[PackedRow], offsets: list[int], kv_blocks: KVBlocks, *, is_causal: bool
) -> list[AttentionGroup]:
    by_size: dict[tuple[int, int], list[tuple[Keys, PackedRow, int]]] = {}
    for seen, row, offset in zip(keys, rows, offsets, strict=True):
        if seen is not None:
            num_blocks = max(len(seen.block_table), SHORT_BLOCKS)
            size = ((len(row.token_ids) - 1).bit_length(), (num_blocks - 1).bit_length())
            if kv_blocks.kernels is not None and len(row.token_ids) == 1:
                size = (0, 0)  # the kernel reads no more of a row than it has
            by_size.setdefault(size, []).append((seen, row, offset))
    return [_group(members, kv_blocks, is_causal=is_causal) for members in by_size.values()]


def _group(members: list[tuple[Keys, PackedRow, int]], kv_blocks: KVBlocks, *, is_causal: bool) -> AttentionGroup:
    device = kv_blocks.device
    counts = np.array([len(row.token_ids) for _, row, _ in members])[:, None]
    starts = np.array([offset for _, _, offset in members])[:, None]
    max_queries = int(counts.max())
    steps = np.arange(max_queries)[None]
    clamped = np.minimum(steps, counts - 1)
    query_index = starts + clamped  # [rows, max_queries]
    is_kept = steps < counts
    max_blocks = max(len(seen.block_table) for seen, _, _ in members)
    tables = np.full((len(members), max_blocks), NULL_BLOCK)
    key_positions = np.full((len(members), max_blocks * BLOCK_SIZE), NEVER)
    query_positions = np.empty((len(members), max_queries), dtype=np.int64)
    row_blocks = np.array([len(seen.block_table) for seen, _, _ in members])
    hidden: list[tuple[int, Hidden]] = []
    for i, (seen, row, _) in enumerate(members):
        num_slots = len(seen.block_table) * BLOCK_SIZE
        tables[i, : len(seen.block_table)] = seen.block_table
        key_positions[i, :num_slots] = seen.positions[:num_slots]
        query_positions[i] = row.positions[clamped[i]]
        hidden += [(i, span) for span in seen.hidden]
    return AttentionGroup(
        num_rows=len(members),
        query_index=torch.from_numpy(query_index.reshape(-1)).to(device),
        kept=None if is_kept.all() else torch.from_numpy(is_kept.reshape(-1).nonzero()[0]).to(device),
        out_index=torch.from_numpy(query_index[is_kept]).to(device),
        block_tables=torch.from_numpy(tables),
        row_blocks=torch.from_numpy(row_blocks),
        query_positions=torch.from_numpy(query_positions).to(device),
        key_positions=torch.from_numpy(key_positions).to(device),
        is_causal=is_causal,
        hidden=tuple(hidden),
    )
