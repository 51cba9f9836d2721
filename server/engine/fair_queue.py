"""What waits, a queue a tenant, and the counters that say whose turn it is."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from itertools import chain
from typing import Generic, Protocol, TypeVar

from server.engine.tenant_policy import TenantPolicies

INPUT_WEIGHT = 1.0  # w_p, of a token that is read
OUTPUT_WEIGHT = 2.0  # w_q, of a token that is generated
MAX_ACCOUNTS = 4096


class OfTenant(Protocol):
    """What a tenant waits for: a sequence for rows, a text to be tokenised."""

    @property
    def tenant_id(self) -> str: ...


Waiting = TypeVar("Waiting", bound=OfTenant)


@dataclass
class Account:
    """`service` is what the tenant was charged, tokens by their weights. `counter` is that by the tenant's own weight,
    and lifted after it had nothing waiting."""

    counter: float = 0.0
    service: float = 0.0


class FairQueue(Generic[Waiting]):
    """Virtual token counters with weights (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024).

    The turn is with the backlogged tenant, one that has a sequence waiting, whose counter is smallest. A tenant that
    becomes backlogged is lifted to the smallest counter of those that are, or of the last one that was, so nobody saves
    up turns. Two tenants backlogged over some time are charged in it, by weight, alike to within
    2 * max(w_p * L, w_q * M) / their smaller weight: L tokens that a sequence reads at most, M tokens that the running
    rows hold at most when they end (rows times the longest prompt and answer).

    Who is not backlogged and was not charged for longest is forgotten beyond 4,096. Used from one thread at a time,
    but for `service` and `skew`.
    """

    def __init__(self, policies: TenantPolicies) -> None:
        self._policies = policies
        self._queues: dict[str, deque[Waiting]] = {}  # of the backlogged, in the order in which they became so
        self._accounts: OrderedDict[str, Account] = OrderedDict()  # least recently charged first
        self._last_left = Account()  # of who had a sequence waiting last

    def __iter__(self) -> Iterator[Waiting]:
        return chain.from_iterable(self._queues.values())

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __contains__(self, sequence: Waiting) -> bool:
        return sequence in self._queues.get(sequence.tenant_id, ())

    def append(self, sequence: Waiting) -> None:
        self._queue(sequence.tenant_id).append(sequence)

    def append_first(self, sequence: Waiting) -> None:
        """Before all others of its tenant."""
        self._queue(sequence.tenant_id).appendleft(sequence)

    def remove(self, sequence: Waiting) -> None:
        queue = self._queues[sequence.tenant_id]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.tenant_id]
            self._last_left = self._accounts[sequence.tenant_id]

    def in_turn(self, num_rows: Mapping[str, int]) -> Iterator[Waiting]:
        """Every waiting sequence once, the tenant's with the smallest counter first, each tenant's in their order. Of
        equal tenants the one comes first that has fewer rows running, `num_rows`, then the one backlogged for longer.
        The sequence given last may be removed, and its tenant charged, before the next is asked for."""
        turns = [
            (self._accounts[tenant_id].counter, num_rows.get(tenant_id, 0), place, tenant_id, deque(queue))
            for place, (tenant_id, queue) in enumerate(self._queues.items())
        ]
        heapify(turns)
        while len(turns) > 1:
            _, _, place, tenant_id, left = turns[0]
            yield left.popleft()
            if left:
                counter = self._accounts[tenant_id].counter
                heapreplace(turns, (counter, num_rows.get(tenant_id, 0), place, tenant_id, left))
            else:
                heappop(turns)
        for *_, left in turns:
            yield from left

    def charge_input(self, tenant_id: str, num_tokens: int) -> None:
        """For tokens that are read: of a prompt, or of a prefix that is loaded or tried."""
        self._charge(tenant_id, INPUT_WEIGHT * num_tokens)

    def charge_output(self, tenant_id: str, num_tokens: int) -> None:
        self._charge(tenant_id, OUTPUT_WEIGHT * num_tokens)

    def lift(self, tenant_id: str) -> None:
        """A tenant comes, or something else is done for it, that may have had nothing waiting."""
        if tenant_id not in self._queues:
            account = self._account(tenant_id)
            account.counter = max(account.counter, self._level(self._queues))

    def forgo(self, tenant_ids: Collection[str]) -> None:
        """Backlogged tenants that could not use their turn do not save it up: the others' level is theirs."""
        others = self._queues.keys() - set(tenant_ids)
        if others:
            level = self._level(others)
            for tenant_id in self._queues.keys() & set(tenant_ids):
                account = self._accounts[tenant_id]
                account.counter = max(account.counter, level)

    def counter(self, tenant_id: str) -> float:
        account = self._accounts.get(tenant_id)
        return 0.0 if account is None else account.counter

    @property
    def service(self) -> dict[str, float]:
        """Tokens by their weights that tenants were charged since the start, or since they were last forgotten."""
        # It is read from other threads too: the tuple is made in one go.
        return {tenant_id: account.service for tenant_id, account in tuple(self._accounts.items())}

    @property
    def skew(self) -> float:
        """How far the counters of backlogged tenants are apart."""
        counters = [self.counter(tenant_id) for tenant_id in tuple(self._queues)]
        return max(counters) - min(counters) if counters else 0.0

    def _queue(self, tenant_id: str) -> deque[Waiting]:
        queue = self._queues.get(tenant_id)
        if queue is None:
            self.lift(tenant_id)
            queue = self._queues[tenant_id] = deque()
        return queue

    def _level(self, tenant_ids: Collection[str]) -> float:
        if not tenant_ids:
            return self._last_left.counter
        return min(self._accounts[tenant_id].counter for tenant_id in tenant_ids)

    def _charge(self, tenant_id: str, cost: float) -> None:
        account = self._account(tenant_id)
        self._accounts.move_to_end(tenant_id)
        account.service += cost
        account.counter += cost / self._policies.of(tenant_id).weight

    def _account(self, tenant_id: str) -> Account:
        account = self._accounts.get(tenant_id)
        if account is None:
            if len(self._accounts) >= MAX_ACCOUNTS:
                idle = next((other for other in self._accounts if other not in self._queues), None)
                if idle is not None:
                    del self._accounts[idle]
            account = self._accounts[tenant_id] = Account()
        return account
