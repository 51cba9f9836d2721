"""How much of the prefix pool each tenant has and may have, and so whose prefixes go when one needs room."""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from server.engine.errors import PinnedRoomError, PrefixFaultError, TenantPinnedError
from server.engine.resident_prefix import ResidentPrefix
from server.engine.tenant_policy import TenantPolicies

ACTIVE_S = 60.0


@dataclass(frozen=True)
class Need:
    """Blocks by tenant that a request has when it runs: all, of them those still cold, and those resident that only it
    keeps from being evicted."""

    total: Counter[str]
    cold: Counter[str]
    idle: Counter[str]


class ResidentShares:
    """A tenant is active for 60 s after a prefix of its own was asked for. The active ones share the pool by weight,
    and all may use what others leave. A prefix counts for its owner, whoever uses it.

    When room is needed the prefixes of inactive tenants go first, then those of tenants above their shares, with what
    they are about to add, of tenants that have more than the one that adds before others. So one that is within its
    share loses nothing to others, unless a single request needs more than its tenant's share: that request may take the
    rest from all. Used from the step's thread only.
    """

    def __init__(self, num_blocks: int, block_bytes: int, policies: TenantPolicies) -> None:
        self._num_blocks = num_blocks
        self._block_bytes = block_bytes
        self._policies = policies
        self._num_used: Counter[str] = Counter()  # blocks, of tenants that have any
        self._num_idle: Counter[str] = Counter()  # of these, of prefixes that could be evicted
        self._active: OrderedDict[str, float] = OrderedDict()  # tenant -> when, longest ago first
        self._share_of_one: float | None = None  # blocks, of a tenant of weight 1, in this step
        self._num_above: int | None = None  # idle blocks of inactive tenants and those above their shares, in this step

    def begin_step(self) -> None:
        """Time has passed, and policies may be others."""
        self._share_of_one = self._num_above = None

    def touch(self, tenant_ids: Iterable[str]) -> None:
        """Prefixes of these tenants are asked for."""
        now = time.monotonic()
        for tenant_id in tenant_ids:
            if tenant_id not in self._active:
                self.begin_step()
            self._active[tenant_id] = now
            self._active.move_to_end(tenant_id)

    def add(self, tenant_id: str, num_blocks: int) -> None:
        self._num_used[tenant_id] += num_blocks

    def remove(self, tenant_id: str, num_blocks: int) -> None:
        self._num_used[tenant_id] -= num_blocks
        if not self._num_used[tenant_id]:
            del self._num_used[tenant_id]

    def add_idle(self, tenant_id: str, num_blocks: int) -> None:
        """So many more could be evicted, or fewer."""
        self._num_idle[tenant_id] += num_blocks
        if not self._num_idle[tenant_id]:
            del self._num_idle[tenant_id]

    def check_limits(self, needed: Mapping[str, int], pinned: Counter[str], asked_by: str) -> None:
        """Blocks by tenant that a request needs, beside others that are pinned. Raises PrefixFaultError for more than a
        tenant may ever have; for more than the pinned ones leave TenantPinnedError if these are the asking tenant's,
        else PinnedRoomError. Without the limit: who asks may be another tenant, with whom it shares a task."""
        for tenant_id, num_blocks in needed.items():
            num_bytes, limit = num_blocks * self._block_bytes, self._max_bytes(tenant_id)
            if num_bytes > limit:
                raise PrefixFaultError(f"a request's prefixes need {num_bytes} bytes, more than their tenant may have")
            if num_bytes > limit - pinned[tenant_id] * self._block_bytes:
                kind = TenantPinnedError if tenant_id == asked_by else PinnedRoomError
                raise kind(f"a request's prefixes need {num_bytes} bytes, more than their tenant's pinned ones leave")

    def has_room(self, need: Need, num_free: int) -> bool:
        """Whether it fits as it is."""
        is_allowed = all(self._is_allowed(t, self._num_used[t] + n) for t, n in need.cold.items())
        return is_allowed and need.cold.total() <= num_free

    def is_due(self, need: Need) -> bool:
        """Whether what keeps it waiting is others' fault: its tenants would be within their limits and shares, of which
        one request alone is always a part."""
        for tenant_id, num_cold in need.cold.items():
            num_held = self._num_used[tenant_id] - self._num_idle[tenant_id] + need.idle[tenant_id] + num_cold
            allowed = max(self._share(tenant_id), need.total[tenant_id])
            if num_held > allowed or not self._is_allowed(tenant_id, num_held):
                return False
        return True

    def may_have_room(self, need: Need, num_free: int) -> bool:
        """False: no choice of victims would be enough. Cheap, for those who ask at every step."""
        if self.is_due(need):
            num_idle = self._num_idle.total()
        else:
            num_idle = self._idle_above() + sum(self._num_idle[tenant_id] for tenant_id in need.cold)
        return need.cold.total() <= num_free + num_idle

    def victims(
        self, need: Need, num_free: int, candidates: Callable[[], Iterable[ResidentPrefix]]
    ) -> list[ResidentPrefix] | None:
        """Those of the `candidates`, which come least recently used first, that go to make room. None: there is not
        enough."""
        missing = need.cold.total() - num_free
        chosen: dict[ResidentPrefix, None] = {}
        left = Counter({t: self._num_used[t] + n for t, n in need.cold.items()})  # blocks, of tenants met so far

        def num_left(tenant_id: str) -> int:
            return left[tenant_id] if tenant_id in left else self._num_used[tenant_id]

        def is_above(tenant_id: str) -> bool:
            return num_left(tenant_id) > self._share(tenant_id)

        def by_weight(tenant_id: str) -> float:
            return num_left(tenant_id) / self._policies.of(tenant_id).weight

        def choose(may_go: Callable[[str], bool]) -> None:
            nonlocal missing
            for resident in candidates():
                tenant_id = resident.ref.tenant_id
                if resident not in chosen and may_go(tenant_id):
                    chosen[resident] = None
                    left[tenant_id] = num_left(tenant_id) - len(resident.block_table)
                    missing -= len(resident.block_table)
                    if missing <= 0 and is_allowed():
                        return

        def is_allowed() -> bool:
            return all(self._is_allowed(tenant_id, left[tenant_id]) for tenant_id in need.cold)

        if not is_allowed():
            choose(lambda tenant_id: tenant_id in need.cold and not self._is_allowed(tenant_id, left[tenant_id]))
            if not is_allowed():
                return None
        if missing > 0 and self._num_idle.keys() - self._active.keys():
            choose(lambda tenant_id: tenant_id not in self._active)
        if missing > 0:
            choose(lambda tenant_id: is_above(tenant_id) and by_weight(tenant_id) >= max(map(by_weight, need.cold)))
        if missing > 0:
            choose(is_above)
        if missing > 0 and self.is_due(need) and any(need.total[t] > self._share(t) for t in need.cold):
            choose(lambda _: True)
        return list(chosen) if missing <= 0 else None

    def check_integrity(self, residents: Iterable[ResidentPrefix], idle: Iterable[ResidentPrefix]) -> None:
        """Each tenant has the blocks of its prefixes."""
        for counted, found in ((self._num_used, residents), (self._num_idle, idle)):
            num_blocks: Counter[str] = Counter()
            for resident in found:
                num_blocks[resident.ref.tenant_id] += len(resident.block_table)
            assert counted == num_blocks, "a tenant's blocks are miscounted"

    def _max_bytes(self, tenant_id: str) -> float:
        max_bytes = self._policies.of(tenant_id).max_resident_bytes
        return math.inf if max_bytes is None else max_bytes

    def _is_allowed(self, tenant_id: str, num_blocks: int) -> bool:
        return num_blocks * self._block_bytes <= self._max_bytes(tenant_id)

    def _share(self, tenant_id: str) -> float:
        """Blocks that an active tenant may have while others need theirs."""
        if self._share_of_one is None:
            now = time.monotonic()
            while len(self._active) > 1 and now - next(iter(self._active.values())) > ACTIVE_S:
                self._active.popitem(last=False)
            self._share_of_one = self._num_blocks / sum(self._policies.of(other).weight for other in self._active)
        return round(self._share_of_one * self._policies.of(tenant_id).weight, 6)

    def _idle_above(self) -> int:
        if self._num_above is None:
            self._num_above = sum(
                num_blocks
                for tenant_id, num_blocks in self._num_idle.items()
                if tenant_id not in self._active or self._num_used[tenant_id] > self._share(tenant_id)
            )
        return self._num_above
