"""Bodies on their way in: bounded in size, in time, and all together in memory."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

GRACE_S = 30.0  # for a body, and beyond that
MIN_BYTES_PER_S = 64 * 1024
MAX_DROP_S = 5.0
FREE_BYTES = 64 * 1024  # of a body that is read at once
PACE_BYTES_PER_S = 16 * 2**20  # of one tenant's larger ones
CONTAINER_BYTES = 32  # that a list or an object costs like, to read
MAX_PACE_S = 2.0


class BodyMemory:
    """How many bytes of bodies the requests hold that are served now."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Raises HTTPException 503."""
        if self.num_bytes + num_bytes > self.max_bytes:
            raise HTTPException(503, "too many bodies at once; try again", {"Retry-After": "1"})
        self.num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes


class BodyPace:
    """When a tenant's next large body is read: JSON is parsed on the event loop, where everybody waits meanwhile."""

    def __init__(self) -> None:
        self._free_s: dict[str, float] = {}  # by tenant, from when on it may have the next one read

    def reserve(self, tenant: str, num_bytes: int) -> float:
        """Seconds to wait for a body of `num_bytes`. Raises HTTPException 429 where many of the tenant wait already."""
        now_s = asyncio.get_running_loop().time()
        self._free_s = {name: free_s for name, free_s in self._free_s.items() if free_s > now_s}
        wait_s = self._free_s.get(tenant, now_s) - now_s
        if wait_s > MAX_PACE_S:
            raise HTTPException(
                429,
                f"large bodies of this tenant are read at {PACE_BYTES_PER_S} bytes/s, and wait {wait_s:.1f} s",
                {"Retry-After": str(math.ceil(wait_s))},
            )
        self._free_s[tenant] = now_s + wait_s + num_bytes / PACE_BYTES_PER_S
        return wait_s


class Body:
    """One request's. What was received of it counts in `memory` until `release`. `tenant`: whose it is, if it must
    keep to the pace."""

    def __init__(
        self,
        receive: Receive,
        memory: BodyMemory,
        max_bytes: int,
        pace: BodyPace,
        *,
        is_whole: bool = False,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self._pace = pace
        self.tenant: str | None = None
        self._num_containers = 0
        self._receive = receive
        self._is_gone = is_gone
        self._memory = memory
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self._num_held = 0
        self._started_s = asyncio.get_running_loop().time()
        self._is_late = False
        self.is_whole = is_whole

    async def receive(self) -> Message:
        """As ASGI's; of a caller who is gone by the end of the body a disconnect, so that nobody parses it. Raises
        HTTPException 408 for one that comes too slowly, 413 as soon as there is too much of it, 503 when there are too
        many, 429 when its tenant sends more large ones than are read."""
        if self.is_whole:
            return await self._receive()
        due_s = self._started_s + GRACE_S + self.num_bytes / MIN_BYTES_PER_S
        try:
            async with asyncio.timeout_at(due_s):
                message = await self._receive()
        except TimeoutError:
            self._is_late = True
            raise HTTPException(
                408, f"the body must come at {MIN_BYTES_PER_S} bytes/s after {GRACE_S:g} s, got {self.num_bytes} bytes"
            ) from None
        self.is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        content = message.get("body", b"")
        num_bytes = len(content)
        self.num_bytes += num_bytes
        if self.num_bytes > self._max_bytes:
            raise HTTPException(413, f"the body must be <= {self._max_bytes} bytes, got more")
        self._memory.take(num_bytes)
        self._num_held += num_bytes
        if self.tenant is not None:
            self._num_containers += content.count(b"[") + content.count(b"{")
            if self.is_whole and self.num_bytes > FREE_BYTES and not self._is_gone():
                cost = self.num_bytes + CONTAINER_BYTES * self._num_containers
                await asyncio.sleep(self._pace.reserve(self.tenant, cost))
        if self.is_whole and self._is_gone():
            return {"type": "http.disconnect"}
        return message

    async def drop_rest(self) -> None:
        """Take what the caller is still sending, for a while: closing on it could cost it the answer."""
        if self._is_late:
            return
        try:
            async with asyncio.timeout(MAX_DROP_S):
                while not self.is_whole:
                    message = await self._receive()
                    self.is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:  # too slow or too much: it may lose the answer
            pass

    def release(self) -> None:
        self._memory.give_back(self._num_held)
        self._num_held = 0
