"""TGI's routes: `POST /generate`, `/generate_stream` and `/`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response

from server.api.answers import (
    Answer,
    EventStream,
    admit_rows,
    answer_headers,
    start_answers,
    stream_answers,
    while_connected,
)
from server.api.auth import Asking, Caller
from server.api.bill import admit
from server.api.errors import TGI_ERRORS, RequestError, also, status_of, tgi_type
from server.api.json_bodies import JSONRoute
from server.api.limits import default_tokens
from server.api.schemas import DEFAULT_NEW_TOKENS, MAX_MODEL_LENGTH, GenerateParameters, GenerateRequest
from server.api.state import AppState, State, Target
from server.engine.errors import EngineError
from server.engine.sequence import TokenOutput

router = APIRouter(tags=["generate"], responses=TGI_ERRORS, route_class=JSONRoute)
TaskQuery = Annotated[
    str | None,
    Query(
        max_length=MAX_MODEL_LENGTH,
        description="A task, TASK@VERSION, OWNER/TASK of one that is shared, or several with commas (KV prefixes, one "
        "infix); none: the bare model.",
        examples=["films"],
    ),
]
Session = Annotated[
    str | None,
    Header(alias="X-Session-Id", max_length=256, description="Keeps to one version where a task serves several."),
]


@router.post("/generate", summary="Answer, or stream with `stream`", responses=also(EventStream.media_type))
@router.post("/", summary="As /generate", operation_id="generate_root", responses=also(EventStream.media_type))
async def generate(
    request: Request,
    state: State,
    caller: Asking,
    body: GenerateRequest,
    task: TaskQuery = None,
    session: Session = None,
) -> Response:
    """TGI's request and answer. `details` adds tokens with log-probabilities, the task and its version. Greedy, and the
    text goes to the model as it stands, as prefixes are trained; OpenAI's routes sample unless `temperature` is 0."""
    return await _answer(request, state, caller, body, task, session, streams=bool(body.stream))


@router.post(
    "/generate_stream",
    summary="Stream tokens as server-sent events",
    response_class=Response,
    responses=also(EventStream.media_type),
)
async def generate_stream(
    request: Request,
    state: State,
    caller: Asking,
    body: GenerateRequest,
    task: TaskQuery = None,
    session: Session = None,
) -> Response:
    """One event a token; the last has the whole text and the details."""
    return await _answer(request, state, caller, body, task, session, streams=True)


def check_least(name: str, least: int | None, name_of_most: str, most: int) -> None:
    """Raises RequestError for more tokens at least than the answer may have."""
    if least is not None and least > most:
        raise RequestError(422, f"{name} must be <= {name_of_most} ({most}), got {least}", name)


async def _answer(
    request: Request,
    state: AppState,
    caller: Caller,
    body: GenerateRequest,
    task: str | None,
    session: str | None,
    *,
    streams: bool,
) -> Response:
    parameters = body.parameters or GenerateParameters()
    if task is not None and parameters.adapter_id not in (None, task):
        raise RequestError(422, f"task {task[:80]!r} and adapter_id {str(parameters.adapter_id)[:80]!r} must agree")
    name = task if task is not None else parameters.adapter_id
    target = await state.resolve_task(caller, None if name in state.model_names else name, session)
    max_new_tokens = default_tokens(caller.tenant.limits, parameters.max_new_tokens, DEFAULT_NEW_TOKENS)
    check_least("min_new_tokens", parameters.min_new_tokens, "max_new_tokens", max_new_tokens)
    lead = body.inputs if parameters.return_full_text else ""
    with await admit(state, caller, target, len(body.inputs.encode()), 1, max_new_tokens) as bill:
        params = [parameters.sampling_params(max_new_tokens, state.defaults)]
        if streams:
            rows = await admit_rows(state, request, body.inputs, params, bill)
            headers = partial(answer_headers, bill, rows.streams[0])
            return await stream_answers(request, rows, lambda found: _events(found[0], target, lead), _failure, headers)
        (answer,) = await start_answers(state, request, body.inputs, params, bill)
        async with answer.stream:
            outputs = await while_connected(request, answer.finish())
    reply: dict[str, Any] = {"generated_text": lead + answer.stream.generated_text}
    if parameters.details:
        tokens = [_token(output) for output in outputs]
        reply["details"] = {**_details(answer, target), "prefill": [], "tokens": tokens}
    return JSONResponse(reply, headers=answer_headers(bill, answer.stream))


async def _events(answer: Answer, target: Target, lead: str) -> AsyncIterator[str]:
    async with answer.stream:
        try:
            async for output in answer.outputs():
                is_last = output.finish_reason is not None
                event = {
                    "index": output.index,
                    "token": _token(output),
                    "generated_text": lead + answer.stream.generated_text if is_last else None,
                    "details": {**_details(answer, target), "input_length": answer.stream.num_prompt_tokens}
                    if is_last
                    else None,
                }
                yield f"data: {json.dumps(event)}\n\n"
        except EngineError as error:
            yield _failure(error)


def _failure(error: EngineError) -> str:
    failure = {"error": str(error), "error_type": tgi_type(status_of(error))}
    return f"data: {json.dumps(failure)}\n\n"


def _token(output: TokenOutput) -> dict[str, Any]:
    """The texts of all tokens join to the answer: a character's first bytes and special tokens have none."""
    return {"id": output.token_id, "text": output.text, "logprob": output.logprob, "special": output.special}


def _details(answer: Answer, target: Target) -> dict[str, Any]:
    stream = answer.stream
    return {
        "finish_reason": stream.finish_reason,
        "generated_tokens": stream.num_generated_tokens,
        "seed": answer.seed,
        "task": target.task,
        "version": target.version,
        "prompt_tokens": stream.num_prompt_tokens,
        "virtual_tokens": stream.num_virtual_tokens,
        "cached_tokens": stream.num_cached_tokens,
        **({"votes": [asdict(vote) for vote in answer.votes]} if answer.votes else {}),
    }
