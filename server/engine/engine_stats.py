"""The engine's state between two steps, for gauges and `/info`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from server.engine.engine import Engine
from server.engine.kv_blocks import BLOCK_SIZE, block_bytes
from server.engine.resident_prefixes import ResidencyCounts


@dataclass(frozen=True)
class EngineStats:
    num_running: int
    num_waiting: int
    num_rows_max: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    block_size: int
    prefix_bytes_used: int
    prefix_bytes_total: int
    num_resident: int
    num_pinned: int
    num_preemptions: int
    residency: ResidencyCounts
    served_tokens: dict[str, float]  # by tenant, read ones once and generated ones twice
    service_skew: float  # how far the counters of tenants that wait are apart


def stats_of(engine: Engine, num_waiting: int) -> EngineStats:
    """`num_waiting` are the requests that were admitted and do not run."""
    num_bytes = block_bytes(engine.runner.shape)
    return EngineStats(
        num_running=len(engine.scheduler.running),
        num_waiting=num_waiting,
        num_rows_max=engine.scheduler.max_rows,
        kv_blocks_used=engine.own_blocks.num_used,
        kv_blocks_cached=engine.own_blocks.num_cached,
        kv_blocks_total=engine.own_blocks.num_blocks,
        block_size=BLOCK_SIZE,
        prefix_bytes_used=engine.prefix_allocator.num_used * num_bytes,
        prefix_bytes_total=engine.prefix_allocator.num_blocks * num_bytes,
        num_resident=engine.residents.num_resident,
        num_pinned=engine.residents.num_pinned,
        num_preemptions=engine.scheduler.num_preemptions,
        residency=replace(engine.residents.counts),
        served_tokens=engine.scheduler.waiting.service,
        service_skew=engine.scheduler.waiting.skew,
    )
