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


@dataclass
class Grant:
    """What a request was let in with. `headers` go onto its answer."""

    tenant: Tenant
    num_tokens: int
    headers: dict[str, str]


class RateLimits:
    """Buckets that fill steadily to a minute's worth; they live in the registry, so that replicas share them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def admit(self, tenant: Tenant, num_tokens: int) -> Grant:
        """Let a request in that may take `num_tokens`. Raises RequestError 429 and takes nothing."""
        limits = tenant.limits
        grant = Grant(tenant, num_tokens, {})
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

    async def _take(self, grant: Grant, bucket: str, amount: int, limit: int) -> None:
        is_taken, left, wait_s = await asyncio.to_thread(
            self._registry.take, grant.tenant.name, bucket, amount, limit, limit / MINUTE_S, time.monotonic()
        )
        reset_s = (limit - left) * MINUTE_S / limit
        grant.headers |= {
            f"x-ratelimit-limit-{bucket}": str(limit),
            f"x-ratelimit-remaining-{bucket}": str(max(0, math.floor(left))),
            f"x-ratelimit-reset-{bucket}": f"{reset_s:.3f}s",
        }
        if is_taken:
            return
        text = f"this tenant may have {limit} {bucket} a minute; wait {wait_s:.1f} s"
        if amount > limit:
            text = f"{amount} {bucket} at once are more than this tenant's {limit} a minute; it cannot be served"
            raise RequestError(429, text, headers=grant.headers | NO_RETRY)
        headers = grant.headers | {"Retry-After": str(max(1, math.ceil(wait_s)))}
        raise RequestError(429, text, headers=headers)

    async def _give_back(self, tenant: Tenant, bucket: str, amount: int, limit: int) -> None:
        """More than was taken may be taken: then the bucket owes."""
        give = partial(self._registry.take, may_owe=True)
        await asyncio.to_thread(give, tenant.name, bucket, -amount, limit, limit / MINUTE_S, time.monotonic())


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
