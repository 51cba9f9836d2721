"""One prefix in device memory: its blocks, and how far its load has come."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import torch

from prefix_store.prefix import PARTS
from server.engine.kv_blocks import BLOCK_SIZE, num_blocks_for
from server.engine.sequence import PrefixRef


@dataclass(eq=False)
class ResidentPrefix:
    """A prefix's place in the pool, loaded for the tenant `asked_by`. `ref_count` counts rows, running or waiting, that
    hold it.

    `was_used` once a row has started behind it. `partial_layers` names, of KV parts that are for some layers only,
    those layers. `embeddings` are a soft prompt's, on the device: for good where they stay embeddings, else until the
    model has computed their K and V.
    """

    ref: PrefixRef
    block_table: list[int]
    asked_by: str = ""
    state: Literal["loading", "ready"] = "loading"
    ref_count: int = 0
    was_used: bool = False
    partial_layers: dict[str, frozenset[int]] = field(default_factory=dict)
    embeddings: torch.Tensor | None = None
    num_computed_tokens: int = 0  # of a soft prompt, whose K and V are in the pool
    num_scheduled_tokens: int = 0  # of them, how many this step computes
    started_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.part_tables: dict[str, list[int]] = {}  # shares of `block_table`, one after another
        start = 0
        for part in PARTS:
            end = start + num_blocks_for(getattr(self.ref.layout, f"num_{part}_tokens"))
            self.part_tables[part] = self.block_table[start:end]
            start = end

    @property
    def num_copied_tokens(self) -> int:
        """Of all parts, those that no step computes."""
        layout = self.ref.layout
        if layout.kind == "soft" and not layout.stays_embeddings:
            return 0
        return layout.num_decoder_tokens + layout.num_encoder_tokens + layout.num_cross_tokens

    @property
    def scheduled_blocks(self) -> list[int]:
        """Where this step writes."""
        end = self.num_computed_tokens + self.num_scheduled_tokens
        return self.block_table[self.num_computed_tokens // BLOCK_SIZE : num_blocks_for(end)]

    @property
    def num_uncomputed_tokens(self) -> int:
        layout = self.ref.layout
        if layout.kind == "kv" or layout.stays_embeddings:
            return 0
        return layout.num_decoder_tokens - self.num_computed_tokens
