"""Who has a place in the queue: requests from their arrival to their first token, counted before they are tokenised."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.errors import OverloadedError, TenantQueueFullError, TooManyAnswersError
from server.engine.tenant_policy import TenantPolicies
from server.metrics import Metrics


@dataclass(frozen=True)
class Place:
    tenant_id: str
    num_tokens: int  # of the prompt, estimated


class QueuePlaces:
    """Bounded in requests, in tokens, and by tenant. A tenant that has less than its part of the places, by weight
    among those that have any, gets one though others fill them, up to twice as many. Used from the event loop only."""

    def __init__(
        self,
        policies: TenantPolicies,
        metrics: Metrics,
        *,
        max_queued: int,
        max_queued_tokens: int,
        name: str = "the queue",
    ) -> None:
        self._name = name
        self._policies = policies
        self._metrics = metrics
        self._max_queued = max_queued
        self._max_queued_tokens = max_queued_tokens
        self._places: dict[str, Place] = {}  # by request

    def take(self, request_id: str, tenant_id: str, num_tokens: int) -> None:
        """Raises as `check`."""
        self.check(tenant_id, num_tokens)
        # The first may be of any size: it fills the queue, as it will, not the part that others have beyond.
        self._places[request_id] = Place(tenant_id, min(num_tokens, self._max_queued_tokens))

    def check(self, tenant_id: str, num_tokens: int) -> None:
        """Raises TenantQueueFullError if the tenant has all it may, OverloadedError if there is no place for it."""
        own = [place.num_tokens for place in self._places.values() if place.tenant_id == tenant_id]
        max_queued = self._policies.of(tenant_id).max_queued
        if max_queued is not None and len(own) >= max_queued:
            self._metrics.rejected("tenant_queue_full")
            raise TenantQueueFullError(f"the tenant has {len(own)} requests queued, its limit is {max_queued}")
        num_queued = len(self._places)
        if self._is_full(tenant_id, num_queued + 1, len(own) + 1, self._max_queued):
            self._metrics.rejected("queue_full")
            raise OverloadedError(f"{self._name} is full, its limit is {self._max_queued} requests")
        queued_tokens = sum(place.num_tokens for place in self._places.values())
        if queued_tokens and self._is_full(
            tenant_id, queued_tokens + num_tokens, sum(own) + num_tokens, self._max_queued_tokens
        ):
            self._metrics.rejected("queue_tokens")
            raise OverloadedError(f"{self._name} is full, its limit is {self._max_queued_tokens} tokens")

    def check_answers(self, num_answers: int, num_tokens: int) -> None:
        """Raises TooManyAnswersError for answers to one prompt of `num_tokens` that never find places together."""
        if num_answers > self._max_queued:
            raise TooManyAnswersError(f"a request must have <= {self._max_queued} answers, got {num_answers}")
        if num_answers > 1 and num_answers * num_tokens > self._max_queued_tokens:
            raise TooManyAnswersError(
                f"{num_answers} answers to a prompt of {num_tokens} tokens must be <= {self._max_queued_tokens} tokens "
                "together"
            )

    def leave(self, request_id: str) -> None:
        """May be called again."""
        self._places.pop(request_id, None)

    def _is_full(self, tenant_id: str, num_all: int, num_own: int, limit: int) -> bool:
        """With `num_own` of the tenant among `num_all`."""
        if num_all <= limit:
            return False
        tenant_ids = {tenant_id, *(place.tenant_id for place in self._places.values())}
        total = sum(self._policies.of(other).weight for other in tenant_ids)
        return num_all > 2 * limit or num_own > limit * self._policies.of(tenant_id).weight / total
