"""One request from its admission to the end of its last stream: what it may take, what it took, who was at fault."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType

import structlog

from prefix_store.errors import PrefixStoreError, in_full
from prefix_store.usage import Usage
from server.api.auth import Caller
from server.api.errors import RequestError
from server.api.limits import BYTES_PER_TOKEN, Grant, check_request, estimate
from server.api.metering import today
from server.api.state import AppState, Target, named
from server.engine.errors import ContextLengthError
from server.engine.request_stream import RequestStream

log = structlog.get_logger()


class Bill:
    """Open until its `with` is left and every stream that it watches has ended: then tokens are settled, usage is
    counted and a version's fault noted. A prompt that was tokenised and is too long costs the tenant's rate as much as
    the longest that fits."""

    def __init__(self, state: AppState, caller: Caller, target: Target, grant: Grant, num_streams: int) -> None:
        self.caller = caller
        self.target = target
        self.num_streams = num_streams  # that its answers need at once
        self._state = state
        self._grant = grant
        self._streams: list[RequestStream] = []
        self._num_open = 1  # itself
        self._num_refused_tokens = 0
        self._ending: asyncio.Task[None] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """`x-ratelimit-*`, of tenants that have limits."""
        return self._grant.headers

    def watch(self, stream: RequestStream) -> None:
        self._streams.append(stream)
        self._num_open += 1
        stream.on_end = self._close_one

    def __enter__(self) -> Bill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ContextLengthError) and not error.is_least:
            self._num_refused_tokens = min(error.num_read, error.limit)
        self._close_one()

    def _close_one(self) -> None:
        self._num_open -= 1
        if not self._num_open:
            self._state.meter.add(self._usage())
            self._ending = asyncio.get_running_loop().create_task(self._settle())

    async def _settle(self) -> None:
        num_tokens = self._num_refused_tokens
        num_tokens += sum(s.num_rows * (s.num_prompt_tokens + s.num_generated_tokens) for s in self._streams)
        try:
            await self._state.limits.settle(self._grant, num_tokens)
            if len(self.target.versions) == 1 and self._is_faulty and not self._state.is_draining:
                (version,) = self.target.versions
                if self._state.faults.add(version, time.monotonic()):
                    await self._state.quarantine(version)
        except PrefixStoreError as error:
            log.warning("bill_not_settled", reason=in_full(error))
        except Exception:  # the request has its answer; nobody waits for this
            log.exception("bill_not_settled")

    @property
    def _is_faulty(self) -> bool:
        return any(stream.error is not None and stream.error.is_versions_fault for stream in self._streams)

    def _usage(self) -> list[Usage]:
        """Of a composition each part's virtual tokens, the rest on the first."""
        day, tenant, streams = today(), self.caller.tenant.name, self._streams
        counts = {
            "num_requests": 1,
            "num_errors": int(any(stream.error is not None for stream in streams)),
            "prompt_tokens": sum(stream.num_prompt_tokens for stream in streams),
            "cached_tokens": sum(stream.num_cached_tokens for stream in streams),
            "generated_tokens": sum(stream.num_generated_tokens for stream in streams),
        }
        versions = self.target.versions
        if not versions:
            return [Usage(day, tenant, "", 0, **counts)]
        if len(versions) == 1:
            num_virtual_tokens = [sum(stream.num_virtual_tokens for stream in streams)]
        else:
            num_virtual_tokens = [len(streams) * version.num_virtual_tokens for version in versions]
        return [
            Usage(
                day,
                tenant,
                named(version, tenant),
                version.version,
                **({} if i else counts),
                virtual_tokens=num_virtual_tokens[i],
            )
            for i, version in enumerate(versions)
        ]


async def admit(
    state: AppState, caller: Caller, target: Target, num_prompt_bytes: int, num_answers: int, max_new_tokens: int
) -> Bill:
    """Before a prompt is tokenised. Raises RequestError 422 for what the tenant may never ask, 429 beyond its rates,
    TooManyAnswersError, OverloadedError or TenantQueueFullError for a full queue."""
    num_virtual_tokens = sum(ref.layout.num_virtual_tokens for refs in target.members for ref in refs)
    num_rows = len(target.members)
    num_streams = num_answers * (num_rows if target.rule == "vote" else 1)
    check_request(caller.tenant.limits, num_rows, max_new_tokens, num_virtual_tokens, num_streams)
    state.engine.check_answers(num_streams, 0)
    state.engine.check_queue(caller.tenant.name)
    num_prompt_tokens = min(num_prompt_bytes // BYTES_PER_TOKEN + 1, state.engine.max_context)
    num_tokens = estimate(num_prompt_tokens, num_answers, max_new_tokens, num_rows)
    try:
        grant = await state.limits.admit(caller.tenant, num_tokens)
    except RequestError:
        state.metrics.rejected("rate_limit")
        raise
    return Bill(state, caller, target, grant, num_streams)
