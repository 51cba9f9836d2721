"""OpenAI's routes: completions, chat completions, models. `model` is a task or the base model."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from prefix_store.errors import NotFoundError
from prefix_store.task import Task, Version
from server.api.answers import (
    Answer,
    EventStream,
    admit_rows,
    answer_headers,
    stream_answers,
    tokenised,
    while_connected,
)
from server.api.auth import Asking, Caller
from server.api.bill import Bill, admit
from server.api.errors import OPENAI_ERRORS, RequestError, also, openai_error, status_of
from server.api.generate import Session, check_least
from server.api.json_bodies import JSONRoute
from server.api.limits import default_tokens
from server.api.schemas import ChatRequest, CompletionRequest, OpenAIRequest, StreamOptions
from server.api.state import AppState, State, Target, named
from server.engine.chat_template import characters_in
from server.engine.detokenizer import Place
from server.engine.errors import ContextLengthError, EngineError
from server.engine.sequence import TokenOutput
from server.engine.token_texts import TokenTexts

router = APIRouter(tags=["openai"], responses=OPENAI_ERRORS, route_class=JSONRoute)
DEFAULT_COMPLETION_TOKENS, MAX_DEFAULT_CHAT_TOKENS = 16, 512
PLACEHOLDERS = ("dummy", "tgi")  # what clients made for TGI send where the URL alone names the model
TOO_LONG = "context_length_exceeded"
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """The fields that every chunk and answer of one request shares."""

    state: AppState
    target: Target
    model: str
    id: str
    kind: str  # text_completion, chat.completion
    created_s: int
    token_texts: TokenTexts

    def body(self, choices: list[dict[str, Any]], *, is_chunk: bool = False) -> dict[str, Any]:
        version = self.target.version
        return {
            "id": self.id,
            "object": "chat.completion.chunk" if is_chunk and self.kind == "chat.completion" else self.kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": str(version) if version else self.state.engine.shape.fingerprint[:12],
            "choices": choices,
        }


@router.post("/v1/completions", summary="Complete a text", responses=also(EventStream.media_type))
async def completions(
    request: Request, state: State, caller: Asking, body: CompletionRequest, session: Session = None
) -> Response:
    """OpenAI's completions; `n`, `logprobs`, `stream`, `stream_options`. The text goes to the model as it stands, as
    prefixes are trained. As OpenAI's, it is sampled at temperature 1 unless the request or the model's generation
    config says otherwise; `/generate` is greedy: `"temperature": 0` gives its answer here."""
    target = await _target(state, caller, body.model, session)
    limit = default_tokens(caller.tenant.limits, body.max_tokens, DEFAULT_COMPLETION_TOKENS)
    admitted = await admit(state, caller, target, len(body.text.encode()), body.n or 1, limit)
    with _in_openais_words("prompt", "max_tokens" if body.max_tokens else None), admitted as bill:
        return await _answer(request, state, body, body.text, limit, body.num_top_logprobs, "text_completion", bill)


@router.post("/v1/chat/completions", summary="Answer a conversation", responses=also(EventStream.media_type))
async def chat_completions(
    request: Request, state: State, caller: Asking, body: ChatRequest, session: Session = None
) -> Response:
    """OpenAI's chat. The messages become one text through the model's chat template. A prefix that was trained on text
    without the template answers otherwise behind it: ask such a task with `/v1/completions` or `/generate`. Sampled at
    temperature 1 unless the request or the model's generation config says otherwise."""
    target = await _target(state, caller, body.model, session)
    messages = [message.as_template_input() for message in body.messages]
    given = body.max_completion_tokens or body.max_tokens
    limit = default_tokens(caller.tenant.limits, given, MAX_DEFAULT_CHAT_TOKENS)
    num_bytes = sum(len(m["content"].encode()) + characters_in(m.get("tool_calls", [])) for m in messages)
    if not state.engine.has_chat_template:
        raise RequestError(422, "the model has no chat template; use /v1/completions")
    admitted = await admit(state, caller, target, num_bytes, body.n or 1, limit)
    limited_by = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    with _in_openais_words("messages", limited_by if given else None), admitted as bill:
        prompt = await tokenised(state, request, messages, given or 1, bill)
        if given is None:
            limit = max(1, min(limit, state.engine.max_new_tokens(target.members, len(prompt))))
        top = (body.top_logprobs or 0) if body.logprobs else None
        return await _answer(request, state, body, prompt, limit, top, "chat.completion", bill)


@router.get("/v1/models", summary="The base model and the tasks that are live")
async def models(state: State, caller: Asking) -> dict[str, Any]:
    """The tenant's own, and those that others share with it."""
    listed = [_model(state, state.model_name, 0)] if caller.allows_task(None) else []
    tenant, after = caller.tenant.name, ""
    while tasks := await asyncio.to_thread(state.store.list_tasks, tenant, 1000, after):
        live = _live(state, tasks)
        listed += [_model(state, v.task, int(v.created_at_s)) for v in live if caller.allows_task(v.task)]
        after = tasks[-1].name
    after = ""
    while tasks := await asyncio.to_thread(state.store.list_shared, tenant, 1000, after):
        live = _live(state, tasks)
        named_live = ((version, named(version, tenant)) for version in live)
        listed += [_model(state, name, int(v.created_at_s)) for v, name in named_live if caller.allows_task(name)]
        after = f"{tasks[-1].tenant}/{tasks[-1].name}"
    return {"object": "list", "data": listed}


@router.get("/v1/models/{model:path}", summary="One of them")
async def model(state: State, caller: Asking, model: str) -> dict[str, Any]:
    target = await _target(state, caller, model)
    return _model(state, model, int(max((version.created_at_s for version in target.versions), default=0)))


def _live(state: AppState, tasks: list[Task]) -> list[Version]:
    """The tasks' active versions, without those that were stored for another model."""
    active = (version for task in tasks for version in task.versions if version.version == task.active)
    return [version for version in active if state.store.is_compatible(version)]


def _model(state: AppState, name: str, created_s: int) -> dict[str, Any]:
    parent = None if name in state.model_names else state.model_name
    return {"id": name, "object": "model", "created": created_s, "owned_by": "prefixserve", "parent": parent}


async def _target(state: AppState, caller: Caller, name: str, session: str | None = None) -> Target:
    try:
        return await state.resolve_task(caller, None if name in state.model_names else name, session)
    except NotFoundError as error:
        if name in PLACEHOLDERS:
            return await state.resolve_task(caller, None)
        raise RequestError(404, f"the model {name[:140]!r} does not exist", "model") from error


@contextmanager
def _in_openais_words(read: str, limited_by: str | None) -> Iterator[None]:
    """Tell a caller whose prompt, in the field `read`, is too long what OpenAI would. `limited_by`: the field, if one
    was given, that the length of the answer comes from. Raises RequestError."""
    try:
        yield
    except ContextLengthError as error:
        num_all = error.num_virtual + error.num_read + error.num_new
        parts = {
            "of the task": error.num_virtual,
            "at the answer's start" if error.reads_start else f"in the {read}": error.num_read,
            "in the completion": error.num_new,
        }
        counts = ", ".join(f"{count} {where}" for where, count in parts.items() if count)
        raise RequestError(
            400,
            f"This model's maximum context length is {error.limit} tokens. However, you requested "
            f"{'at least ' if error.is_least else ''}{num_all} tokens ({counts}). "
            f"Please reduce the length of the {read} or completion ({TOO_LONG}).",  # langchain reads the text alone
            limited_by if error.fits_without_answer and limited_by else read,
            code=TOO_LONG,
        ) from error


async def _answer(
    request: Request,
    state: AppState,
    body: OpenAIRequest,
    prompt: str | list[int],
    max_new_tokens: int,
    num_top_logprobs: int | None,
    kind: str,
    bill: Bill,
) -> Response:
    target = bill.target
    is_new_name = isinstance(body, ChatRequest) and body.max_completion_tokens is not None
    check_least("min_tokens", body.min_tokens, "max_completion_tokens" if is_new_name else "max_tokens", max_new_tokens)
    defaults = state.defaults
    params = [body.sampling_params(max_new_tokens, num_top_logprobs, i, defaults) for i in range(body.n or 1)]
    rows = await admit_rows(state, request, prompt, params, bill)
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    texts = TokenTexts(state.engine.tokenizer)
    reply = Reply(state, target, body.model, f"{prefix}-{uuid.uuid4().hex}", kind, int(time.time()), texts)
    if body.stream:
        options = body.stream_options or StreamOptions()
        headers = partial(answer_headers, bill, rows.streams[0])
        return await stream_answers(request, rows, lambda found: _events(reply, found, options), _failure, headers)
    answers = await while_connected(request, rows.answers())
    try:
        finished = await while_connected(request, _finish_all(answers))
    finally:
        for answer in answers:
            answer.stream.abort()
    choices = []
    for i, (answer, outputs) in enumerate(zip(answers, finished, strict=True)):
        text = answer.stream.generated_text
        choice: dict[str, Any] = {"index": i, "finish_reason": _reason(outputs[-1]), "logprobs": None}
        if params[i].num_top_logprobs is not None:
            choice["logprobs"] = _logprobs(reply, outputs, text)
        if kind == "text_completion":
            choice["text"] = text
        else:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        choices.append(choice)
    usage = _usage(answers, sum(map(len, finished)))
    return JSONResponse({**reply.body(choices), "usage": usage}, headers=answer_headers(bill, answers[0].stream))


async def _finish_all(answers: list[Answer]) -> list[list[TokenOutput]]:
    return [await answer.finish() for answer in answers]


async def _events(reply: Reply, answers: list[Answer], options: StreamOptions) -> AsyncIterator[str]:
    merged: asyncio.Queue[tuple[int, TokenOutput | EngineError]] = asyncio.Queue()
    is_chat = reply.kind == "chat.completion"

    async def pump(index: int, answer: Answer) -> None:
        try:
            async for output in answer.outputs():
                merged.put_nowait((index, output))
        except EngineError as error:
            merged.put_nowait((index, error))

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        usage: dict[str, Any] = {"usage": None} if options.include_usage else {}
        if options.continuous_usage_stats:
            usage = {"usage": _usage(answers, num_read)}
        return f"data: {json.dumps({**reply.body(choices, is_chunk=True), **usage, **more})}\n\n"

    def choice(index: int, text: str, reason: str | None, logprobs: Any, **delta: str) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": {**delta, "content": text}} if is_chat else {"text": text}
        return {"index": index, **content, "finish_reason": reason, "logprobs": logprobs}

    pumps = [asyncio.create_task(pump(i, answer)) for i, answer in enumerate(answers)]
    num_running = len(answers)
    num_read = 0  # tokens of all answers
    texts = [""] * len(answers)
    unsent: list[list[TokenOutput]] = [[] for _ in answers]  # log-probabilities wait for the text of their token
    try:
        if is_chat:
            for i in range(len(answers)):
                yield chunk([choice(i, "", None, None, role="assistant")])
        while num_running:
            index, output = await merged.get()
            if isinstance(output, EngineError):
                yield _failure(output)
                return
            num_read += 1
            num_running -= output.finish_reason is not None
            reason = _reason(output) if output.finish_reason else None
            logprobs = None
            texts[index] += output.text
            if output.place is not None:
                waiting = [*unsent[index], output]
                num_sent = sum(reason is not None or _begins_in(each, texts[index]) for each in waiting)
                unsent[index] = waiting[num_sent:]
                logprobs = _logprobs(reply, waiting[:num_sent], texts[index]) if num_sent else None
            if output.text or logprobs or reason:
                yield chunk([choice(index, output.text, reason, logprobs)])
        if options.include_usage:
            yield chunk([], usage=_usage(answers, num_read))
        yield DONE
    finally:
        for task in pumps:
            task.cancel()
        for answer in answers:
            answer.stream.abort()


def _failure(error: EngineError) -> str:
    return f"data: {json.dumps({'error': openai_error(status_of(error), str(error))})}\n\n"


def _begins_in(output: TokenOutput, text: str) -> bool:
    return output.place is not None and output.place.offset < len(text)


def _reason(output: TokenOutput) -> str:
    return "length" if output.finish_reason == "length" else "stop"


def _usage(answers: list[Answer], generated: int) -> dict[str, Any]:
    """With `generated` tokens of all answers."""
    prompt = answers[0].stream.num_prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": answers[0].stream.num_cached_tokens},
    }


def _logprobs(reply: Reply, outputs: list[TokenOutput], text: str) -> dict[str, Any]:
    """In the shape of the reply's kind, of tokens of an answer that reads `text` up to now. A token that a stop string
    cut off stands at its end."""
    read = reply.token_texts.read
    places = [output.place for output in outputs if output.place is not None]
    if reply.kind == "chat.completion":

        def entry(token_id: int, logprob: float | None, place: Place) -> dict[str, Any]:
            token = read(token_id, place.behind)
            return {"token": token.text, "logprob": logprob, "bytes": list(token.encoded)}

        return {
            "content": [
                {
                    **entry(output.token_id, output.logprob, place),
                    "top_logprobs": [entry(token_id, value, place) for token_id, value in output.top_logprobs],
                }
                for output, place in zip(outputs, places, strict=True)
            ],
            "refusal": None,
        }
    top_logprobs = []
    for output, place in zip(outputs, places, strict=True):
        # The best and the chosen one. Where several tokens read the same (parts of a character), the best of them.
        found: dict[str, float | None] = {}
        for token_id, value in (*output.top_logprobs, (output.token_id, output.logprob)):
            found.setdefault(read(token_id, place.behind).text, value)
        top_logprobs.append(found)
    return {
        "tokens": [read(output.token_id, place.behind).text for output, place in zip(outputs, places, strict=True)],
        "token_logprobs": [output.logprob for output in outputs],
        "top_logprobs": top_logprobs,
        "text_offset": [min(place.offset, len(text)) for place in places],
    }
