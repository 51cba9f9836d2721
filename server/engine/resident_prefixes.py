"""Which prefixes are in device memory, who holds them, and which goes when another needs the room."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from prefix_store.prefix import PARTS, Layout
from server.engine.errors import PinnedRoomError, PrefixFaultError, PrefixLoadError
from server.engine.kv_blocks import BlockAllocator, num_blocks_for
from server.engine.sequence import PrefixRef

FAILED_LOAD_REMEMBERED_S = 10.0


@dataclass(eq=False)
class ResidentPrefix:
    """A prefix's place in the pool. `ref_count` counts rows, running or waiting, that hold it.

    `partial_layers` names, of KV parts that are for some layers only, those layers. `embeddings` are a soft prompt's,
    on the device: for good where they stay embeddings, else until the model has computed their K and V.
    """

    ref: PrefixRef
    block_table: list[int]
    state: Literal["loading", "ready"] = "loading"
    ref_count: int = 0
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
    def num_uncomputed_tokens(self) -> int:
        layout = self.ref.layout
        if layout.kind == "kv" or layout.stays_embeddings:
            return 0
        return layout.num_decoder_tokens - self.num_computed_tokens


@dataclass
class ResidencyCounts:
    num_hits: int = 0
    num_misses: int = 0
    num_loads: int = 0
    num_failed_loads: int = 0
    num_evictions: int = 0
    load_s: float = 0.0  # seconds, of loads that ended well


class ResidentPrefixes:
    """LRU over prefixes that nobody holds. Used from the step's thread only.

    `start_load` is called once for every prefix that has to be loaded, with its blocks already allocated; whoever
    loads it calls `finish_load` from the step's thread. A load is shared by all who ask meanwhile. Soft prompts whose K
    and V are still to be computed stand in `computing`; steps compute them and call `advance`.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        num_blocks_of: Callable[[Layout], int],
        start_load: Callable[[ResidentPrefix], None],
    ) -> None:
        self._allocator = allocator
        self._num_blocks_of = num_blocks_of
        self._start_load = start_load
        self._residents: OrderedDict[str, ResidentPrefix] = OrderedDict()  # least recently used first
        self._pinned: set[str] = set()
        self._failures: dict[str, tuple[float, str]] = {}  # digest -> (when, why)
        self.computing: list[ResidentPrefix] = []
        self.counts = ResidencyCounts()

    def acquire(self, refs: Collection[PrefixRef], *, may_load: bool = True) -> list[ResidentPrefix] | None:
        """Hold prefixes, all or none, loading the cold ones if they `may_load`. None: not now, ask again. Check `state`
        before using one.

        Raises as `preload`.
        """
        num_cold = sum(ref.digest not in self._residents for ref in refs)
        if num_cold and not (may_load and self.preload(refs)):
            return None
        self.counts.num_misses += num_cold
        self.counts.num_hits += len(refs) - num_cold
        found = []
        for ref in refs:
            self._residents.move_to_end(ref.digest)
            found.append(self._residents[ref.digest])
            found[-1].ref_count += 1
        return found

    def release(self, resident: ResidentPrefix) -> None:
        assert resident.ref_count > 0
        resident.ref_count -= 1

    def preload(self, refs: Collection[PrefixRef]) -> bool:
        """Start loading what is cold of `refs` if there is room for all. True: they are resident or on their way.

        Raises PrefixLoadError while a failed load is remembered, PrefixFaultError if they can never fit together,
        PinnedRoomError if they cannot beside what is pinned.
        """
        wanted = {ref.digest: ref for ref in refs}
        cold = [ref for digest, ref in wanted.items() if digest not in self._residents]
        if not cold:
            return True
        for ref in cold:
            failure = self.failure(ref.digest)
            if failure is not None:
                raise failure
        self._check_fit(wanted)
        if not self._make_room(wanted, cold):
            return False
        for ref in cold:
            resident = ResidentPrefix(ref, self._allocator.allocate(self._num_blocks_of(ref.layout)))
            self._residents[ref.digest] = resident
            self._start_load(resident)
        return True

    def pin(self, digest: str) -> None:
        self._pinned.add(digest)

    def unpin(self, digest: str) -> None:
        self._pinned.discard(digest)

    def finish_load(self, resident: ResidentPrefix, error: Exception | None) -> None:
        if error is None and resident.num_uncomputed_tokens:
            self.computing.append(resident)
            return
        if resident in self.computing:
            self.computing.remove(resident)
        if error is None:
            resident.state = "ready"
            self.counts.num_loads += 1
            self.counts.load_s += time.monotonic() - resident.started_s
            return
        self.counts.num_failed_loads += 1
        self._failures[resident.ref.digest] = (time.monotonic(), str(error))
        del self._residents[resident.ref.digest]
        self._allocator.release(resident.block_table)

    def advance(self, resident: ResidentPrefix) -> None:
        """A step has computed its scheduled tokens."""
        resident.num_computed_tokens += resident.num_scheduled_tokens
        resident.num_scheduled_tokens = 0
        if not resident.num_uncomputed_tokens:
            resident.embeddings = None
            self.finish_load(resident, None)

    def evict(self, digest: str) -> bool:
        """Drop a prefix that nobody holds. False: it is held, loading or not resident."""
        resident = self._residents.get(digest)
        if resident is None or resident.ref_count or resident.state == "loading":
            return False
        del self._residents[digest]
        self._allocator.release(resident.block_table)
        self.counts.num_evictions += 1
        return True

    def failure(self, digest: str) -> PrefixLoadError | None:
        """The remembered failure of a load, for 10 s."""
        found = self._failures.get(digest)
        if found is None:
            return None
        when, why = found
        if time.monotonic() - when > FAILED_LOAD_REMEMBERED_S:
            del self._failures[digest]
            return None
        return PrefixLoadError(f"prefix {digest[:12]} could not be loaded: {why}")

    def get(self, digest: str) -> ResidentPrefix | None:
        return self._residents.get(digest)

    @property
    def num_resident(self) -> int:
        return len(self._residents)

    @property
    def num_pinned(self) -> int:
        # It is read from other threads too: the tuple is made in one go.
        return sum(1 for digest, r in tuple(self._residents.items()) if r.ref_count or digest in self._pinned)

    @property
    def num_references(self) -> int:
        """Rows, running or waiting, that hold a prefix."""
        return sum(resident.ref_count for resident in self._residents.values())

    def check_integrity(self) -> None:
        """Every block of the pool is free or belongs to exactly one prefix."""
        used = [block for resident in self._residents.values() for block in resident.block_table]
        assert len(used) == len(set(used)), "two prefixes share a block"
        assert not self._allocator.free_ids() & set(used), "a used block is in the free list"
        assert len(used) == self._allocator.num_used, "a block leaked"
        assert all(resident.ref_count >= 0 for resident in self._residents.values())

    def _check_fit(self, wanted: Mapping[str, PrefixRef]) -> None:
        """Could they be resident together, once nobody holds anything else?"""
        needed, num_blocks = self._num_blocks(wanted.values()), self._allocator.num_blocks
        if needed > num_blocks:
            raise PrefixFaultError(f"{len(wanted)} prefixes need {needed} blocks, the prefix pool has {num_blocks}")
        pinned = [r.ref for digest in self._pinned - set(wanted) if (r := self._residents.get(digest)) is not None]
        num_left = num_blocks - self._num_blocks(pinned)
        if needed > num_left:
            raise PinnedRoomError(
                f"{len(wanted)} prefixes need {needed} blocks of prefix memory, "
                f"pinned ones leave {num_left} of {num_blocks}"
            )

    def _num_blocks(self, refs: Iterable[PrefixRef]) -> int:
        return sum(self._num_blocks_of(ref.layout) for ref in refs)

    def _make_room(self, wanted: Mapping[str, PrefixRef], cold: list[PrefixRef]) -> bool:
        """Evict what is not `wanted`, the least recently used first, until the `cold` fit."""
        missing = self._num_blocks(cold) - self._allocator.num_free
        victims: list[str] = []
        for digest, resident in self._residents.items():
            if missing <= 0:
                break
            if digest in wanted or resident.ref_count or resident.state == "loading" or digest in self._pinned:
                continue
            victims.append(digest)
            missing -= len(resident.block_table)
        if missing > 0:
            return False
        for digest in victims:
            self.evict(digest)
        return True
