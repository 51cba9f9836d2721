"""A request's answers: start their rows in the engine, wait for them, free them when the caller is gone; a vote."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from server.api.bill import Bill
from server.api.errors import RequestError
from server.api.state import AppState, Target
from server.engine.chat_template import Messages
from server.engine.errors import EngineError
from server.engine.request_stream import RequestStream
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Composition, TokenOutput

T = TypeVar("T")
CLIENT_CLOSED = 499
KEEP_ALIVE, KEEP_ALIVE_S = ": keep-alive\n\n", 15.0
COMMIT_S = 15.0  # before an answer's first token; proxies and clients give up after 30 s or more
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


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
    """The ids of a prompt or a conversation; given up when the caller disconnects. Raises as `AsyncEngine.tokenise`."""
    tenant = bill.caller.tenant.name
    return await while_connected(request, state.engine.tokenise(text, bill.target.members, max_new_tokens, tenant))


class Rows:
    """The rows of a request's answers from their admission on: `polls` has those of each answer, several where the
    members of an ensemble vote."""

    def __init__(self, target: Target, params: list[SamplingParams], polls: list[list[RequestStream]]) -> None:
        self._target = target
        self._params = params
        self.polls = polls

    @property
    def streams(self) -> list[RequestStream]:
        return [stream for poll in self.polls for stream in poll]

    async def answers(self) -> list[Answer]:
        """Wait for the first token of each answer, or where members vote for their last. Raises the engine's errors,
        and then, or when it is cancelled, frees all rows."""
        try:
            if self._target.rule == "vote":
                finished = [[await stream.rest() for stream in poll] for poll in self.polls]
                return [_elect(*poll) for poll in zip(self.polls, finished, self._params, strict=True)]
            firsts = [await anext(stream) for stream in self.streams]
            return [
                Answer(stream, (first,), one.seed)
                for stream, first, one in zip(self.streams, firsts, self._params, strict=True)
            ]
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Free those that still run."""
        for stream in self.streams:
            stream.abort()


async def admit_rows(
    state: AppState, request: Request, prompt: str | list[int], params: list[SamplingParams], bill: Bill
) -> Rows:
    """Start the rows of one answer for each of `params`, all or none. Raises the engine's errors."""
    if isinstance(prompt, list):
        token_ids = prompt
    else:
        token_ids = await tokenised(state, request, prompt, params[0].max_new_tokens, bill)
    state.engine.check_answers(bill.num_streams, len(token_ids))
    target, tenant = bill.target, bill.caller.tenant.name
    rows = Rows(target, params, [[] for _ in params])

    async def admit(one: SamplingParams, members: tuple[Composition, ...]) -> RequestStream:
        row_id = state.row_id(request.state.request_id)
        stream = await state.engine.generate(token_ids, one, members, row_id, tenant)
        bill.watch(stream)
        return stream

    try:
        for one, poll in zip(params, rows.polls, strict=True):
            if target.rule != "vote":
                poll.append(await admit(one, target.members))
                continue
            for i, member in enumerate(target.members):
                poll.append(await admit(_voter(one, i), (member,)))
    except BaseException:
        rows.abort()
        raise
    return rows


async def start_answers(
    state: AppState, request: Request, prompt: str | list[int], params: list[SamplingParams], bill: Bill
) -> list[Answer]:
    """Admit the rows and wait for the answers to begin. Raises the engine's errors."""
    rows = await admit_rows(state, request, prompt, params, bill)
    return await while_connected(request, rows.answers())


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


class EventStream(StreamingResponse):
    """Server-sent events, with a comment whenever none came for `KEEP_ALIVE_S`, as proxies close what is quiet. `end`
    is called however the stream ends, also before its first event was asked for."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers | UNBUFFERED)
        self._end = end
        self._sent_s = 0.0
        self._is_sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()

    async def stream_response(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        self._sent_s = now()

        async def send_on(message: Message) -> None:
            self._is_sending = True
            await send(message)
            self._is_sending, self._sent_s = False, now()

        async def keep_alive() -> None:
            while True:
                wait_s = self._sent_s + KEEP_ALIVE_S - now()
                if wait_s > 0 or self._is_sending:  # a caller who does not read needs none
                    await asyncio.sleep(max(wait_s, 1.0))
                else:
                    await send_on({"type": "http.response.body", "body": KEEP_ALIVE.encode(), "more_body": True})

        beating = asyncio.create_task(keep_alive())
        try:
            await super().stream_response(send_on)
        finally:
            beating.cancel()


async def stream_answers(
    request: Request,
    rows: Rows,
    events: Callable[[list[Answer]], AsyncIterator[str]],
    failure: Callable[[EngineError], str],
    headers: Callable[[], dict[str, str]],
) -> EventStream:
    """The events of the answers. An error within `COMMIT_S` keeps its status: until then nothing is sent. Later it is
    the event `failure`, as amid a stream. Raises the engine's errors."""
    waiting = asyncio.ensure_future(rows.answers())
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask for it

    def end() -> None:
        waiting.cancel()
        rows.abort()

    async def late() -> AsyncIterator[str]:
        yield KEEP_ALIVE
        try:
            answers = await waiting
        except EngineError as error:
            yield failure(error)
            return
        async for event in events(answers):
            yield event

    try:
        await while_connected(request, asyncio.wait({waiting}, timeout=COMMIT_S))
        return EventStream(events(waiting.result()) if waiting.done() else late(), end, headers())
    except BaseException:
        end()
        raise


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
