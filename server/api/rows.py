"""A request's rows in the engine: start them, wait for them, and free them when the caller is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.errors import RequestError
from server.api.state import AppState, Target
from server.engine.async_engine import RequestStream
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import TokenOutput

T = TypeVar("T")
CLIENT_CLOSED = 499


@dataclass(frozen=True)
class Row:
    """`first` has come: so an error before it still has its status code."""

    stream: RequestStream
    first: TokenOutput

    async def outputs(self) -> AsyncIterator[TokenOutput]:
        """Every token, the first included."""
        yield self.first
        async for output in self.stream:
            yield output

    async def finish(self) -> list[TokenOutput]:
        return [output async for output in self.outputs()]


async def start_row(
    state: AppState, request: Request, prompt: str | list[int], params: SamplingParams, target: Target
) -> Row:
    """Admit one row and wait for its first token. Raises the engine's errors."""
    stream = await state.engine.generate(prompt, params, target.prefix, state.row_id(request.state.request_id))
    try:
        first = await while_connected(request, anext(stream))
    except BaseException:
        stream.abort()
        raise
    return Row(stream, first)


class EventStream(StreamingResponse):
    """Server-sent events of `rows`. They are freed however it ends, also before its first event was asked for."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], rows: list[Row], headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers | {"Cache-Control": "no-store"})
        self._rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for row in self._rows:
                row.stream.abort()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, or cancel it when the caller disconnects (RequestError 499, which nobody reads)."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestError(CLIENT_CLOSED, "the caller closed the connection")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def answer_headers(target: Target, stream: RequestStream) -> dict[str, str]:
    """The task, its version and TGI's times in milliseconds (of a stream: until its first token)."""
    queue_ms, inference_ms = round(stream.queue_s * 1000), round(stream.inference_s * 1000)
    return {
        "X-Task": target.task or "",
        "X-Prefix-Version": str(target.version.version) if target.version else "",
        "x-queue-time": str(queue_ms),
        "x-inference-time": str(inference_ms),
        "x-total-time": str(queue_ms + inference_ms),
    }
