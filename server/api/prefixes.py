"""Prefixes as resources: upload, list, describe, activate, pin, delete."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from prefix_store.ensemble import Ensemble
from prefix_store.local_files import CONFIG, WEIGHTS
from prefix_store.prefix import PARTS, Prefix
from prefix_store.registry import Precondition, Task, Version
from prefix_store.store import Published
from server.api.errors import PROBLEMS, RequestError
from server.api.schemas import EXAMPLE_ENSEMBLE, ActivateRequest, EnsembleRequest
from server.api.state import TENANT, AppState, State

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], responses=PROBLEMS)
NATIVE_TYPES = (
    "application/octet-stream",
    "application/safetensors",
    "application/x-safetensors",
    "application/vnd.safetensors",
)
IfMatch = Annotated[str | None, Header(alias="If-Match", description="The task's revision (a version's digest).")]
IfNoneMatch = Annotated[str | None, Header(alias="If-None-Match", description="`*`: only if there is none yet.")]
ETAG = re.compile(r'"([^"]*)"|(\*)')
UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary"},
                "examples": {"native": {"summary": "curl -T films.safetensors …", "value": "(a .safetensors file)"}},
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [CONFIG, WEIGHTS],
                    "properties": {name: {"type": "string", "format": "binary"} for name in (CONFIG, WEIGHTS)},
                },
                "examples": {
                    "peft": {
                        "summary": f"curl -X PUT -F {CONFIG}=@{CONFIG} -F {WEIGHTS}=@{WEIGHTS} …",
                        "value": {CONFIG: "(a JSON file)", WEIGHTS: "(a .safetensors file)"},
                    }
                },
            },
            "application/json": {
                "schema": EnsembleRequest.model_json_schema(),
                "examples": {"ensemble": {"summary": "An ensemble of versions", "value": EXAMPLE_ENSEMBLE}},
            },
        },
    }
}


@router.put("/{task}", summary="Upload a new version", status_code=201, openapi_extra=UPLOAD_BODY)
async def upload(
    request: Request,
    state: State,
    task: str,
    index: Annotated[int | None, Query(ge=0, description="One task of a multitask file.")] = None,
    note: Annotated[str, Query(max_length=200)] = "",
    activate: Annotated[Literal["auto", "true", "false"], Query()] = "auto",
    accept_base: Annotated[bool, Query(description="Store it although it names another base model.")] = False,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """A native `.safetensors` body, multipart with PEFT's two files, or an ensemble of versions as JSON. 201 with the
    manifest; known content is 200."""
    state.store.check_name(task)
    precondition = _precondition(if_match, if_none_match)
    async with state.uploads:
        options: dict[str, Any] = {
            "note": note,
            "activate": {"auto": None, "true": True, "false": False}[activate],
            "precondition": precondition,
        }
        if _content_type(request) == "application/json":
            if index is not None:
                raise RequestError(422, "index picks a task of a PEFT multitask file; an ensemble names its members")
            wanted = _ensemble(await request.body())
            ensemble = await asyncio.to_thread(state.store.make_ensemble, TENANT, wanted.members, wanted.rule)
            state.check_ensemble(ensemble)
            publish = partial(state.store.publish_ensemble, TENANT, task, ensemble, **options)
        else:
            prefix = await _read(request, state, index)
            base = state.store.match_base(prefix, accept_base)
            await state.engine.check(prefix)
            publish = partial(state.store.publish, TENANT, task, prefix, base=base, **options)
        published: Published = await asyncio.to_thread(publish)
    await state.sync_pins()
    headers = {
        "ETag": f'"{published.task.revision}"',
        "Location": f"/v1/prefixes/{task}/versions/{published.version.version}",
    }
    return JSONResponse(_manifest(state, published.task, published.version), 201 if published.is_new else 200, headers)


@router.get("", summary="List tasks by name")
async def list_tasks(
    state: State,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=64, description="The last name of the page before.")] = "",
) -> dict[str, Any]:
    tasks = await asyncio.to_thread(state.store.list_tasks, TENANT, limit + 1, after)
    page = tasks[:limit]
    return {
        "prefixes": [_described(state, task) for task in page],
        "next": page[-1].name if len(tasks) > limit else None,
    }


@router.get("/{task}", summary="Describe a task")
async def describe(state: State, task: str) -> Response:
    """`TASK@VERSION` describes that version."""
    name, at, version = task.partition("@")
    if at:
        return await describe_version(state, name, version)
    found = await asyncio.to_thread(state.store.get_task, TENANT, task)
    return _task_response(state, found)


@router.get("/{task}/versions/{version}", summary="Describe a version")
async def describe_version(state: State, task: str, version: str) -> Response:
    found = await asyncio.to_thread(state.store.get_task, TENANT, task)
    one = await asyncio.to_thread(state.store.get_version, TENANT, task, version)
    return JSONResponse(_manifest(state, found, one), headers={"ETag": f'"{one.digest}"'})


@router.get("/{task}/versions/{version}/file", summary="The native file", response_class=Response)
async def download(state: State, task: str, version: str) -> Response:
    one = await asyncio.to_thread(state.store.get_version, TENANT, task, version)
    body = await asyncio.to_thread(state.store.file_bytes, one)
    disposition = f'attachment; filename="{task}-{one.version}.safetensors"'
    headers = {"ETag": f'"{one.digest}"', "Content-Disposition": disposition}
    return Response(body, media_type="application/octet-stream", headers=headers)


@router.post("/{task}/activate", summary="Make a version live; `previous` rolls back")
async def activate(
    state: State, task: str, body: ActivateRequest, if_match: IfMatch = None, if_none_match: IfNoneMatch = None
) -> Response:
    precondition = _precondition(if_match, if_none_match)
    found = await asyncio.to_thread(state.store.activate, TENANT, _name(task), str(body.version), precondition)
    await state.sync_pins()
    return _task_response(state, found)


@router.post("/{task}/pin", summary="Make it resident and keep it so")
async def pin(state: State, task: str) -> Response:
    version = await asyncio.to_thread(state.store.resolve, TENANT, _name(task))
    await state.preload(version)
    found = await asyncio.to_thread(state.store.set_pinned, TENANT, task, True)
    await state.sync_pins()
    return _task_response(state, found)


@router.post("/{task}/unpin", summary="Let it be evicted again")
async def unpin(state: State, task: str) -> Response:
    found = await asyncio.to_thread(state.store.set_pinned, TENANT, _name(task), False)
    await state.sync_pins()
    return _task_response(state, found)


@router.post("/{task}/preload", summary="Make it resident now")
async def preload(state: State, task: str) -> Response:
    version = await asyncio.to_thread(state.store.resolve, TENANT, task)
    await state.preload(version)
    return _task_response(state, await asyncio.to_thread(state.store.get_task, TENANT, version.task))


@router.delete("/{task}", summary="Delete a task and all its versions", status_code=204)
async def delete_task(state: State, task: str, if_match: IfMatch = None, if_none_match: IfNoneMatch = None) -> Response:
    """`TASK@VERSION` deletes that version alone."""
    name, at, version = task.partition("@")
    if at:
        return await delete_version(state, name, version, if_match, if_none_match)
    gone = await asyncio.to_thread(state.store.delete_task, TENANT, task, _precondition(if_match, if_none_match))
    await state.sync_pins()
    await state.free(gone.versions)
    return Response(status_code=204)


@router.delete("/{task}/versions/{version}", summary="Delete a version that is not active", status_code=204)
async def delete_version(
    state: State, task: str, version: str, if_match: IfMatch = None, if_none_match: IfNoneMatch = None
) -> Response:
    precondition = _precondition(if_match, if_none_match)
    gone = await asyncio.to_thread(state.store.delete_version, TENANT, task, version, precondition)
    await state.free((gone,))
    return Response(status_code=204)


async def _read(request: Request, state: AppState, index: int | None) -> Prefix:
    """The upload as a validated prefix; nothing is stored yet."""
    kind = _content_type(request)
    if kind == "multipart/form-data":
        config, weights = await _parts(request)
        return await asyncio.to_thread(state.store.parse_peft, config, weights, index)
    if kind and kind not in NATIVE_TYPES:
        raise RequestError(
            415,
            f"Content-Type must be multipart/form-data, application/json or one of {', '.join(NATIVE_TYPES)}, "
            f"got {kind[:80]!r}",
        )
    if index is not None:
        raise RequestError(422, "index picks a task of a PEFT multitask file; a native file has one")
    return await asyncio.to_thread(state.store.parse_native, await request.body())


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _ensemble(body: bytes) -> EnsembleRequest:
    try:
        return EnsembleRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from error


async def _parts(request: Request) -> tuple[bytes, bytes]:
    found: dict[str, bytes] = {}
    async with request.form(max_files=4, max_fields=4) as form:
        for name, part in form.multi_items():
            if name not in (CONFIG, WEIGHTS):
                raise RequestError(422, f"multipart parts must be {CONFIG} and {WEIGHTS}, got {name[:80]!r}")
            if name in found:
                raise RequestError(422, f"multipart part {name} came twice")
            found[name] = await part.read() if isinstance(part, UploadFile) else part.encode()
    for name in (CONFIG, WEIGHTS):
        if name not in found:
            raise RequestError(422, f"multipart part {name} is missing")
    return found[CONFIG], found[WEIGHTS]


def _precondition(if_match: str | None, if_none_match: str | None) -> Precondition:
    if if_none_match not in (None, "*"):
        raise RequestError(422, f"If-None-Match must be *, got {str(if_none_match)[:80]!r}")
    if if_match is None:
        return Precondition(must_be_new=if_none_match is not None)
    parts = [part.strip() for part in if_match.split(",")]
    matches = [ETAG.fullmatch(part) for part in parts]
    if not all(matches):
        raise RequestError(422, f'If-Match must be "ETAG", a list of them, or *; got {if_match[:80]!r}')
    return Precondition(frozenset(m.group(1) or m.group(2) or "" for m in matches if m), if_none_match is not None)


def _name(task: str) -> str:
    """What is of the task, never of one version: which is active, and whether that one stays resident."""
    if "@" in task:
        raise RequestError(422, f"activate, pin and unpin take a task without a version, got {task[:80]!r}")
    return task


def _task_response(state: AppState, task: Task) -> JSONResponse:
    return JSONResponse(_described(state, task), headers={"ETag": f'"{task.revision}"'})


def _described(state: AppState, task: Task) -> dict[str, Any]:
    active = next((version for version in task.versions if version.version == task.active), None)
    return {
        "task": task.name,
        "revision": task.revision,
        "active": task.active,
        "previous": task.previous,
        "pinned": task.is_pinned,
        "residency": state.residency(active) if active else "cold",
        "resident_bytes": state.device_bytes(task.versions, resident=True),
        "versions": [_version(state, version) for version in task.versions],
    }


def _manifest(state: AppState, task: Task, version: Version) -> dict[str, Any]:
    return {
        "task": task.name,
        **_version(state, version),
        "active": task.active,
        "previous": task.previous,
        "revision": task.revision,
    }


def _version(state: AppState, version: Version) -> dict[str, Any]:
    content: dict[str, Any]
    if isinstance(version.content, Ensemble):
        content = {"members": [str(member) for member in version.content.members], "rule": version.content.rule}
    else:
        content = {"placement": version.content.placement}
        if version.content.separator is not None:
            content["separator"] = version.content.separator
        if state.engine.shape.is_encoder_decoder:
            content["parts"] = {part: getattr(version.content, f"num_{part}_tokens") for part in PARTS}
    return {
        "version": version.version,
        "digest": version.digest,
        "kind": version.kind,
        **content,
        "num_virtual_tokens": version.num_virtual_tokens,
        "num_bytes": version.num_bytes,
        "device_bytes": state.device_bytes([version], resident=False),
        "base": version.base,
        "base_model": version.base_model,
        "fingerprint": version.fingerprint,
        "status": "ok" if state.store.is_compatible(version) else "incompatible",
        "residency": state.residency(version),
        "note": version.note,
        "created_at_s": version.created_at_s,
    }
