"""A tenant's own limits, decided before a prompt is tokenised or a body read: 429, with the headers that OpenAI's
clients read. Tokens are estimated from bytes and settled when the request ends."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from functools import partial

from prefix_store.registry import Registry
from prefix_store.tenants import Limits, Tenant
from server.api.errors import NO_RETRY, RequestError

MINUTE_S = 60.0
BYTES_PER_TOKEN = 4
REQUESTS, TOKENS, UPLOADS = "requests", "tokens", "uploads"
MAX_REMEMBERED_S = 1.0  # a refusal, before the registry is asked again: other replicas may give tokens back


@dataclass
class Grant:
    """What a request was let in with. `headers` go onto its answer."""

    tenant: Tenant
    num_tokens: int
    headers: dict[str, str]


@dataclass(frozen=True)
class Refused:
    """A bucket that lacked `amount` at `at_s`, and has it after `wait_s`; `left` was in it."""

    amount: int
    limit: int
    left: float
    wait_s: float
    at_s: float

    def still(self, amount: int, limit: int, now_s: float) -> Refused | None:
        """What is left of it for a request now; None where the bucket must be asked."""
        passed_s = now_s - self.at_s
        if amount < self.amount or limit != self.limit or passed_s >= min(self.wait_s, MAX_REMEMBERED_S):
            return None
        left = min(limit, self.left + passed_s * limit / MINUTE_S)
        wait_s = self.wait_s - passed_s + (amount - self.amount) * MINUTE_S / limit
        return Refused(amount, limit, left, wait_s, now_s)

    def error(self, bucket: str) -> RequestError:
        """429, with when to try again, if ever."""
        headers = _headers(bucket, self.limit, self.left)
        if self.amount > self.limit:
            what = f"{self.amount} {bucket} at once are more than this tenant's {self.limit} a minute"
            return RequestError(429, f"{what}; it cannot be served", headers=headers | NO_RETRY)
        wait_s = min(self.wait_s, MINUTE_S)  # without end where replicas share the limit out: until they are one again
        text = f"this tenant may have {self.limit} {bucket} a minute; wait {wait_s:.1f} s"
        return RequestError(429, text, headers=headers | {"Retry-After": str(max(1, math.ceil(wait_s)))})


class RateLimits:
    """Buckets that fill steadily to a minute's worth; they live in the registry, so that replicas share them. A refusal
    is remembered for a moment: those that follow it cost no look-up."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._refused: dict[tuple[str, str], Refused] = {}

    def check_requests(self, tenant: Tenant) -> None:
        """Before a body is read. Raises RequestError 429 where the tenant was just refused another request."""
        if tenant.limits.requests_per_minute is not None:
            self._check(tenant, REQUESTS, 1, tenant.limits.requests_per_minute)

    async def admit(self, tenant: Tenant, num_tokens: int) -> Grant:
        """Let a request in that may take `num_tokens`. Raises RequestError 429 and takes nothing."""
        limits = tenant.limits
        grant = Grant(tenant, num_tokens, {})
        if limits.tokens_per_minute is not None:
            self._check(tenant, TOKENS, num_tokens, limits.tokens_per_minute)
        if limits.requests_per_minute is not None:
            await self._take(grant, REQUESTS, 1, limits.requests_per_minute)
        if limits.tokens_per_minute is not None:
            try:
                await self._take(grant, TOKENS, num_tokens, limits.tokens_per_minute)
            except RequestError:
                if limits.requests_per_minute is not None:
                    await self._give_back(tenant, REQUESTS, 1, limits.requests_per_minute)
                raise
        return grant

    async def settle(self, grant: Grant, num_tokens: int) -> None:
        """It used `num_tokens`: the rest of what was taken is given back, more is taken."""
        limit = grant.tenant.limits.tokens_per_minute
        if limit is not None:
            await self._give_back(grant.tenant, TOKENS, grant.num_tokens - num_tokens, limit)

    async def admit_upload(self, tenant: Tenant) -> None:
        """Raises RequestError 429."""
        if tenant.limits.uploads_per_minute is not None:
            await self._take(Grant(tenant, 0, {}), UPLOADS, 1, tenant.limits.uploads_per_minute)

    def _check(self, tenant: Tenant, bucket: str, amount: int, limit: int) -> None:
        """Raises RequestError 429 where a refusal of no more than this still holds."""
        refused = self._refused.get((tenant.name, bucket))
        still = refused and refused.still(amount, limit, time.monotonic())
        if still is not None:
            raise still.error(bucket)

    async def _take(self, grant: Grant, bucket: str, amount: int, limit: int) -> None:
        self._check(grant.tenant, bucket, amount, limit)
        name = grant.tenant.name
        is_taken, left, wait_s = await asyncio.to_thread(
            self._registry.take, name, bucket, amount, limit, limit / MINUTE_S, time.monotonic()
        )
        grant.headers |= _headers(bucket, limit, left)
        if is_taken:
            self._refused.pop((name, bucket), None)
            return
        refused = Refused(amount, limit, left, wait_s, time.monotonic())
        self._refused[name, bucket] = refused
        error = refused.error(bucket)
        raise RequestError(429, str(error), headers=grant.headers | error.headers)

    async def _give_back(self, tenant: Tenant, bucket: str, amount: int, limit: int) -> None:
        """More than was taken may be taken: then the bucket owes."""
        give = partial(self._registry.take, may_owe=True)
        await asyncio.to_thread(give, tenant.name, bucket, -amount, limit, limit / MINUTE_S, time.monotonic())
        self._refused.pop((tenant.name, bucket), None)


def _headers(bucket: str, limit: int, left: float) -> dict[str, str]:
    """What OpenAI's clients read of a bucket."""
    return {
        f"x-ratelimit-limit-{bucket}": str(limit),
        f"x-ratelimit-remaining-{bucket}": str(max(0, math.floor(left))),
        f"x-ratelimit-reset-{bucket}": f"{(limit - left) * MINUTE_S / limit:.3f}s",
    }


def estimate(num_prompt_tokens: int, num_answers: int, max_new_tokens: int, num_rows: int) -> int:
    """Tokens that a request could take, before it is tokenised: of every row of every answer."""
    return num_rows * num_answers * (num_prompt_tokens + max_new_tokens)


def default_tokens(limits: Limits, given: int | None, default: int) -> int:
    """`max_new_tokens` as the caller asks; where it does not, no more than the tenant may have."""
    if given is not None or limits.max_new_tokens is None:
        return given or default
    return min(default, limits.max_new_tokens)


def check_request(
    limits: Limits, num_rows: int, max_new_tokens: int, num_virtual_tokens: int, num_streams: int
) -> None:
    """Raises RequestError 422 for what this tenant may never ask."""
    for name, largest, got in (
        ("rows of a request", limits.max_rows, num_rows),
        ("max_new_tokens", limits.max_new_tokens, max_new_tokens),
        ("virtual_tokens", limits.max_virtual_tokens, num_virtual_tokens),
        ("answers of a request", limits.max_queued, num_streams),
    ):
        if largest is not None and got > largest:
            raise RequestError(422, f"{name} must be <= {largest} for this tenant, got {got}")
