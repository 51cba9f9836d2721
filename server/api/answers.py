"""A request's answers: start their rows in the engine, wait for them, free them when the caller is gone; a vote."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.bill import Bill
from server.api.errors import RequestError
from server.api.state import AppState
from server.engine.chat_template import Messages
from server.engine.request_stream import RequestStream
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Composition, TokenOutput

T = TypeVar("T")
CLIENT_CLOSED = 499


@dataclass(frozen=True)
class Vote:
    """One answer of an ensemble's members, and how many gave it. `logprob` is that of the most probable of them."""

    text: str
    count: int
    logprob: float


@dataclass(frozen=True)
class Answer:
    """One answer as it comes, and the seed that gives it again. `had` have come before: so an error before them still
    has its status code."""

    stream: RequestStream
    had: tuple[TokenOutput, ...]
    seed: int | None
    votes: tuple[Vote, ...] = ()

    async def outputs(self) -> AsyncIterator[TokenOutput]:
        """Every token, also those had."""
        for output in self.had:
            yield output
        async for output in self.stream:
            yield output

    async def finish(self) -> list[TokenOutput]:
        return [*self.had, *await self.stream.rest()]


async def tokenised(
    state: AppState, request: Request, text: str | Messages, max_new_tokens: int, bill: Bill
) -> list[int]:
    """The ids of a prompt or a conversation. Raises as `AsyncEngine.tokenise`; a long text is given up when its caller
    disconnects."""
    work = state.engine.tokenise(text, bill.target.members, max_new_tokens, bill.caller.tenant.name)
    return await (while_connected(request, work) if state.engine.takes_long(text) else work)


async def start_answers(
    state: AppState, request: Request, prompt: str | list[int], params: list[SamplingParams], bill: Bill
) -> list[Answer]:
    """Start one answer for each of `params`, all or none, and wait for their first tokens, or where members vote for
    their last. Raises the engine's errors."""
    if isinstance(prompt, list):
        token_ids = prompt
    else:
        token_ids = await tokenised(state, request, prompt, params[0].max_new_tokens, bill)
    state.engine.check_answers(bill.num_streams, len(token_ids))
    streams: list[RequestStream] = []
    target, tenant = bill.target, bill.caller.tenant.name

    async def admit(one: SamplingParams, members: tuple[Composition, ...]) -> RequestStream:
        row_id = state.row_id(request.state.request_id)
        stream = await state.engine.generate(token_ids, one, members, row_id, tenant)
        streams.append(stream)
        bill.watch(stream)
        return stream

    try:
        if target.rule == "vote":
            polls = [
                [await admit(_voter(one, i), (member,)) for i, member in enumerate(target.members)] for one in params
            ]
            finished = [await while_connected(request, _finish_all(voters)) for voters in polls]
            return [_elect(*poll) for poll in zip(polls, finished, params, strict=True)]
        for one in params:
            await admit(one, target.members)
        firsts = await while_connected(request, _firsts(streams))
        return [Answer(stream, (first,), one.seed) for stream, first, one in zip(streams, firsts, params, strict=True)]
    except BaseException:
        for stream in streams:
            stream.abort()
        raise


def _voter(params: SamplingParams, index: int) -> SamplingParams:
    """Each member samples for itself, in every choice; the probabilities that break a tie are asked of all."""
    seed = None if params.seed is None else (params.seed + (index << 32)) % 2**64
    return replace(params, num_top_logprobs=params.num_top_logprobs or 0, seed=seed)


def _elect(voters: list[RequestStream], outputs: list[list[TokenOutput]], params: SamplingParams) -> Answer:
    """The answer of most, of as many the most probable; from the member that found it most probable."""
    texts = [voter.generated_text for voter in voters]
    logprobs = [sum(output.logprob or 0.0 for output in tokens) for tokens in outputs]
    counts = Counter(texts)
    best = max(range(len(voters)), key=lambda i: (counts[texts[i]], logprobs[i]))
    highest: dict[str, float] = {}
    for text, logprob in zip(texts, logprobs, strict=True):
        highest[text] = max(logprob, highest.get(text, logprob))
    votes = [Vote(text, count, highest[text]) for text, count in counts.items()]
    votes.sort(key=lambda vote: (-vote.count, -vote.logprob))
    had = outputs[best]
    if params.num_top_logprobs is None:  # the caller did not ask
        had = [replace(output, logprob=None, place=None) for output in had]
    return Answer(voters[best], tuple(had), params.seed, tuple(votes))


async def _finish_all(streams: list[RequestStream]) -> list[list[TokenOutput]]:
    return [await stream.rest() for stream in streams]


async def _firsts(streams: list[RequestStream]) -> list[TokenOutput]:
    return [await anext(stream) for stream in streams]


class EventStream(StreamingResponse):
    """Server-sent events of `answers`. They are freed however it ends, also before its first event was asked for."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], answers: list[Answer], headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers | {"Cache-Control": "no-store"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._answers:
                answer.stream.abort()


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


def answer_headers(bill: Bill, stream: RequestStream) -> dict[str, str]:
    """The task, its version, TGI's times in milliseconds (of a stream: until its first token), what is left of the
    tenant's rates."""
    target = bill.target
    queue_ms, inference_ms = round(stream.queue_s * 1000), round(stream.inference_s * 1000)
    return {
        "X-Task": target.task or "",
        "X-Prefix-Version": "" if target.version is None else str(target.version),
        "x-queue-time": str(queue_ms),
        "x-inference-time": str(inference_ms),
        "x-total-time": str(queue_ms + inference_ms),
        **bill.headers,
    }
