"""Which prefixes are in device memory, who holds them, and which goes when another needs the room."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from prefix_store.prefix import Layout
from server.engine.errors import PinnedRoomError, PrefixFaultError
from server.engine.kv_blocks import BlockAllocator
from server.engine.recent_evictions import RecentEvictions
from server.engine.recent_failures import RecentFailures
from server.engine.resident_prefix import ResidentPrefix
from server.engine.resident_shares import Need, ResidentShares
from server.engine.sequence import PrefixRef

PATIENCE_S = 1.0  # for which one task's requests may go on past those of a cold one of the same tenant


@dataclass
class ResidencyCounts:
    num_hits: int = 0
    num_misses: int = 0
    num_loads: int = 0
    num_failed_loads: int = 0
    num_evictions: int = 0
    num_thrash: int = 0  # loads of what had been evicted less than 60 s before, to make room
    load_s: float = 0.0  # seconds, of loads that ended well


class ResidentPrefixes:
    """LRU over prefixes that nobody holds, within the tenants' shares, by their refs' keys. Used from the step's thread
    only.

    `start_load` is called once for every prefix that has to be loaded, with its blocks already allocated; whoever
    loads it calls `finish_load` from the step's thread. A load is shared by all who ask meanwhile. Soft prompts whose K
    and V are still to be computed stand in `computing`; steps compute them and call `advance`.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        num_blocks_of: Callable[[Layout], int],
        start_load: Callable[[ResidentPrefix], None],
        shares: ResidentShares,
    ) -> None:
        self._allocator = allocator
        self._num_blocks_of = num_blocks_of
        self._start_load = start_load
        self._shares = shares
        self._residents: OrderedDict[str, ResidentPrefix] = OrderedDict()  # least recently used first
        self._pinned: set[str] = set()
        self._leaving: set[str] = set()  # that nobody new may hold
        self._evictions = RecentEvictions()
        self.failures = RecentFailures()
        self.computing: list[ResidentPrefix] = []
        self.counts = ResidencyCounts()

    def acquire(
        self, refs: Collection[PrefixRef], *, asked_by: str = "", may_load: bool = True
    ) -> list[ResidentPrefix] | None:
        """Hold prefixes, all or none, loading the cold ones if they `may_load`. None: not now, ask again. Check `state`
        before using one.

        Raises as `preload`.
        """
        if self._leaving and any(ref.key in self._leaving for ref in refs):
            return None
        num_cold = sum(ref.key not in self._residents for ref in refs)
        if num_cold and not (may_load and self._start_loads(refs, asked_by)):
            return None
        self._shares.touch(ref.tenant_id for ref in refs)
        self.counts.num_misses += num_cold
        self.counts.num_hits += len(refs) - num_cold
        found = []
        for ref in refs:
            self._residents.move_to_end(ref.key)
            found.append(self._residents[ref.key])
            self._count_idle(found[-1], -1)
            found[-1].ref_count += 1
        return found

    def release(self, resident: ResidentPrefix) -> None:
        assert resident.ref_count > 0
        resident.ref_count -= 1
        self._count_idle(resident, 1)

    def preload(self, refs: Collection[PrefixRef], *, asked_by: str = "") -> bool:
        """Start loading what is cold of `refs` if there is room for all. True: they are resident or on their way.

        Raises PrefixLoadError or PrefixAwayError while a failed load is remembered, PrefixFaultError if they can never
        fit together, or not within their tenant's limit, PinnedRoomError if they cannot beside what is pinned, or
        TenantPinnedError if that is what the asking tenant pinned itself.
        """
        self.begin_step()
        return self._start_loads(refs, asked_by)

    def begin_step(self) -> None:
        """Claims end."""
        self._shares.begin_step()
        self._leaving.clear()

    def claim(self, refs: Collection[PrefixRef], waited_s: float) -> bool:
        """For what `preload` found no room: nobody new may hold what has to go for it, until the next step begins.

        False: it waits by its own tenants' fault, whose other prefixes are in use and fill their shares or limits. It
        claims room of theirs, when it has waited for a while.
        """
        wanted = {ref.key: ref for ref in refs}
        need = self._need(wanted)
        if not need.cold:  # it waits for what is leaving
            return False
        is_due = self._shares.is_due(need)
        if not is_due and waited_s < PATIENCE_S:
            return False
        held = [
            resident
            for key, resident in self._residents.items()
            if resident.ref_count
            and resident.state == "ready"
            and not (key in wanted or key in self._pinned)
            and (resident.ref.tenant_id in need.cold) is not is_due
        ]
        victims = self._shares.victims(need, self._allocator.num_free, lambda: chain(self._idle(wanted), held))
        self._leaving.update(resident.ref.key for resident in victims or ())
        return is_due

    def claimed(self, held: Collection[ResidentPrefix]) -> list[ResidentPrefix]:
        """Of them, those that have to go."""
        return [resident for resident in held if resident.ref.key in self._leaving] if self._leaving else []

    def pin(self, key: str) -> None:
        resident = self._residents.get(key)
        if resident is not None:
            self._count_idle(resident, -1)
        self._pinned.add(key)

    def unpin(self, key: str) -> None:
        was_pinned = key in self._pinned
        self._pinned.discard(key)
        resident = self._residents.get(key)
        if resident is not None and was_pinned:
            self._count_idle(resident, 1)

    def finish_load(self, resident: ResidentPrefix, error: Exception | None) -> None:
        if error is None and resident.num_uncomputed_tokens:
            self.computing.append(resident)
            return
        if resident in self.computing:
            self.computing.remove(resident)
        if error is None:
            resident.state = "ready"
            self._count_idle(resident, 1)
            self.counts.num_loads += 1
            self.counts.load_s += time.monotonic() - resident.started_s
            return
        self.counts.num_failed_loads += 1
        self.failures.add(resident.ref.key, resident.ref.digest, error)
        self._drop(resident)

    def advance(self, resident: ResidentPrefix) -> None:
        """A step has computed its scheduled tokens."""
        resident.num_computed_tokens += resident.num_scheduled_tokens
        resident.num_scheduled_tokens = 0
        if not resident.num_uncomputed_tokens:
            resident.embeddings = None
            self.finish_load(resident, None)

    def evict(self, key: str) -> bool:
        """Drop a prefix that nobody holds. False: it is held, loading or not resident."""
        resident = self._residents.get(key)
        if resident is None or resident.ref_count or resident.state == "loading":
            return False
        self._drop(resident)
        self.counts.num_evictions += 1
        return True

    def get(self, key: str) -> ResidentPrefix | None:
        return self._residents.get(key)

    @property
    def sizes(self) -> dict[str, int]:
        """Blocks by key."""
        # It is read from other threads too: the tuple is made in one go.
        return {key: len(resident.block_table) for key, resident in tuple(self._residents.items())}

    @property
    def num_resident(self) -> int:
        return len(self._residents)

    @property
    def num_pinned(self) -> int:
        # It is read from other threads too: the tuple is made in one go.
        return sum(1 for key, r in tuple(self._residents.items()) if r.ref_count or key in self._pinned)

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
        self._shares.check_integrity(self._residents.values(), self._idle(()))

    def _start_loads(self, refs: Collection[PrefixRef], asked_by: str) -> bool:
        wanted = {ref.key: ref for ref in refs}
        cold = [ref for key, ref in wanted.items() if key not in self._residents]
        if not cold:
            return True
        for ref in cold:
            failure = self.failures.get(ref.key)
            if failure is not None:
                raise failure
        self._check_fit(wanted, asked_by)
        self._shares.touch(ref.tenant_id for ref in cold)
        if not self._make_room(wanted):
            return False
        for ref in cold:
            self.counts.num_thrash += self._evictions.pop(ref.key)
            resident = ResidentPrefix(ref, self._allocator.allocate(self._num_blocks_of(ref.layout)), asked_by)
            self._residents[ref.key] = resident
            self._shares.add(ref.tenant_id, len(resident.block_table))
            self._start_load(resident)
        return True

    def _check_fit(self, wanted: Mapping[str, PrefixRef], asked_by: str) -> None:
        """Could they be resident together, once nobody holds anything else?"""
        by_tenant = self._num_blocks_by_tenant(wanted.values())
        needed, num_blocks = by_tenant.total(), self._allocator.num_blocks
        if needed > num_blocks:
            raise PrefixFaultError(f"{len(wanted)} prefixes need {needed} blocks, the prefix pool has {num_blocks}")
        pinned = self._num_blocks_by_tenant(
            r.ref for key in self._pinned - set(wanted) if (r := self._residents.get(key)) is not None
        )
        if needed > num_blocks - pinned.total():  # how many those of others are is not this tenant's business
            raise PinnedRoomError(f"{len(wanted)} prefixes need {needed} blocks, more than pinned ones leave")
        self._shares.check_limits(by_tenant, pinned, asked_by)

    def _num_blocks_by_tenant(self, refs: Iterable[PrefixRef]) -> Counter[str]:
        found: Counter[str] = Counter()
        for ref in refs:
            found[ref.tenant_id] += self._num_blocks_of(ref.layout)
        return found

    def _need(self, wanted: Mapping[str, PrefixRef]) -> Need:
        residents = [resident for key in wanted if (resident := self._residents.get(key)) is not None]
        return Need(
            total=self._num_blocks_by_tenant(wanted.values()),
            cold=self._num_blocks_by_tenant(ref for key, ref in wanted.items() if key not in self._residents),
            idle=self._num_blocks_by_tenant(resident.ref for resident in residents if self._is_idle(resident)),
        )

    def _is_idle(self, resident: ResidentPrefix) -> bool:
        """It could be evicted."""
        return not (resident.ref_count or resident.state == "loading" or resident.ref.key in self._pinned)

    def _idle(self, wanted: Collection[str]) -> Iterator[ResidentPrefix]:
        """What could be evicted and is not wanted, the least recently used first."""
        return (r for r in self._residents.values() if self._is_idle(r) and r.ref.key not in wanted)

    def _count_idle(self, resident: ResidentPrefix, sign: int) -> None:
        """It was idle until now (-1), or may be from now on (1)."""
        if self._is_idle(resident):
            self._shares.add_idle(resident.ref.tenant_id, sign * len(resident.block_table))

    def _make_room(self, wanted: Mapping[str, PrefixRef]) -> bool:
        """Evict what is not `wanted`, as the shares will have it, until what is cold of it fits."""
        need, num_free = self._need(wanted), self._allocator.num_free
        if self._shares.has_room(need, num_free):
            return True
        if not self._shares.may_have_room(need, num_free):
            return False
        victims = self._shares.victims(need, num_free, lambda: self._idle(wanted))
        if victims is None:
            return False
        for resident in victims:
            self.evict(resident.ref.key)
            self._evictions.add(resident.ref.key)
        return True

    def _drop(self, resident: ResidentPrefix) -> None:
        self._count_idle(resident, -1)
        del self._residents[resident.ref.key]
        self._allocator.release(resident.block_table)
        self._shares.remove(resident.ref.tenant_id, len(resident.block_table))
