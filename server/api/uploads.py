"""`PUT /v1/prefixes/T`: what comes in becomes a version, or a reason why not."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from prefix_store.local_files import CONFIG, WEIGHTS
from prefix_store.prefix import Prefix
from prefix_store.task_changes import Published
from server.api.auth import Asking, check_again
from server.api.bases import AcceptBase, BaseFingerprint
from server.api.errors import PROBLEMS, RequestError, also
from server.api.json_bodies import read_body
from server.api.manifests import manifest
from server.api.preconditions import IfMatch, IfNoneMatch, precondition_of
from server.api.schemas import EXAMPLE_ENSEMBLE, EnsembleRequest
from server.api.state import AppState, State, name_for
from server.api.task_paths import OwnTask

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], responses=PROBLEMS)
NATIVE_TYPES = (
    "application/octet-stream",
    "application/safetensors",
    "application/x-safetensors",
    "application/vnd.safetensors",
)
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


@router.put(
    "/{task:path}",
    summary="Upload a new version",
    status_code=201,
    responses=also("application/json"),
    openapi_extra=UPLOAD_BODY,
)
async def upload(
    request: Request,
    state: State,
    caller: Asking,
    path: OwnTask,
    index: Annotated[int | None, Query(ge=0, lt=2**31, description="One task of a multitask file.")] = None,
    note: Annotated[str, Query(max_length=200)] = "",
    activate: Annotated[Literal["auto", "true", "false"], Query()] = "auto",
    accept_base: AcceptBase = False,
    base_fingerprint: BaseFingerprint = None,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """A native `.safetensors` body, multipart with PEFT's two files, or an ensemble of versions as JSON. 201 with the
    manifest; content that the task has already is 200 with `unchanged`, and keeps the `note`, `accept_base` and
    `base_fingerprint` that come with it. A key that may not publish stores the version and leaves what is live.

    `base` says how the file was matched with the model: `verified` by a fingerprint, `name-match` by a full name,
    `unverified` where the file names nothing or a path, `mismatch` where it names another model, which is refused
    unless accepted. With `activate=auto` an unverified version is stored and not made live, and `next_step` says how it
    goes live; with `activate=true` it is refused and not stored."""
    tenant, task = path.tenant, path.name
    state.store.check_name(task)
    if activate == "true":
        caller.check_scope("publish")
    goes_live = {"auto": None if caller.may("publish") else False, "true": True, "false": False}[activate]
    precondition = precondition_of(if_match, if_none_match)
    await state.limits.admit_upload(caller.tenant)
    kind = _content_type(request)
    if kind == "application/json" or kind in NATIVE_TYPES or not kind:
        files: tuple[bytes, ...] = (await request.body(),)
    elif kind == "multipart/form-data":
        files = await _parts(request)
    else:
        raise RequestError(
            415,
            f"Content-Type must be multipart/form-data, application/json or one of {', '.join(NATIVE_TYPES)}, "
            f"got {kind[:80]!r}",
        )
    await check_again(request)
    async with state.uploads:  # nobody waits here for a caller who sends slowly
        options: dict[str, Any] = {
            "note": note,
            "activate": goes_live,
            "precondition": precondition,
            "within_limits": True,
            "by": caller.author(request),
        }
        if kind == "application/json":
            if index is not None:
                raise RequestError(422, "index picks a task of a PEFT multitask file; an ensemble names its members")
            if base_fingerprint is not None:
                raise RequestError(422, "base_fingerprint is of a file's base model; an ensemble's members have theirs")
            wanted = _ensemble(*files)
            for member in wanted.members:
                name = member.partition("@")[0]
                caller.check_task(name if "/" in name else f"{tenant}/{name}")
            ensemble = await asyncio.to_thread(state.store.make_ensemble, tenant, wanted.members, wanted.rule)
            state.check_ensemble(ensemble)
            publish = partial(state.store.publish_ensemble, tenant, task, ensemble, accept_base=accept_base, **options)
        else:
            prefix = await asyncio.to_thread(_parse, state, files, index)
            base = state.store.match_base(prefix, accept_base, base_fingerprint)
            await state.engine.check(prefix, tenant)
            options |= {"base": base, "accept_base": accept_base}
            publish = partial(state.store.publish, tenant, task, prefix, **options)
        await check_again(request)
        published: Published = await asyncio.to_thread(publish)
    if published.is_repair:
        state.faults.forget(published.version)
        state.engine.forget_failures(tenant)
    await state.sync_pins()
    shown = name_for(caller.tenant.name, published.task)
    headers = {
        "ETag": f'"{published.task.revision}"',
        "Location": f"{state.settings.root_path}/v1/prefixes/{shown}/versions/{published.version.version}",
    }
    body = manifest(state, caller, published.task, published.version) | {"unchanged": not published.is_new}
    return JSONResponse(body, 201 if published.is_new else 200, headers)


def _parse(state: AppState, files: tuple[bytes, ...], index: int | None) -> Prefix:
    """PEFT's two files, or a native one, as a validated prefix; nothing is stored yet."""
    if len(files) == 2:
        config, weights = files
        return state.store.parse_peft(config, weights, index)
    if index is not None:
        raise RequestError(422, "index picks a task of a PEFT multitask file; a native file has one")
    return state.store.parse_native(*files)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _ensemble(body: bytes) -> EnsembleRequest:
    given = read_body(body)
    try:
        return EnsembleRequest.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()], body=given) from error


async def _parts(request: Request) -> tuple[bytes, bytes]:
    try:
        return await _read_parts(request)
    except UnicodeError as error:  # of a charset that the caller names
        raise RequestError(422, "multipart text must be UTF-8") from error


async def _read_parts(request: Request) -> tuple[bytes, bytes]:
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
