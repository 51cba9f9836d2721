"""Prefixes as resources: list, describe, activate, share, pin, delete. Uploads have a file of their own."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from prefix_store.errors import QuotaError
from prefix_store.task import Task
from server.api.auth import Asking, Caller
from server.api.errors import PROBLEMS, RequestError
from server.api.json_bodies import JSONRoute
from server.api.manifests import described, manifest, task_response
from server.api.preconditions import IfMatch, IfNoneMatch, precondition_of
from server.api.schemas import ActivateRequest, ShareRequest
from server.api.state import AppState, State

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], responses=PROBLEMS, route_class=JSONRoute)


@router.get("", summary="List tasks by name")
async def list_tasks(
    state: State,
    caller: Asking,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=64, description="The last name of the page before.")] = "",
) -> dict[str, Any]:
    """The tenant's own. A key with task patterns sees those that it may use."""
    found: list[Task] = []
    while len(found) <= limit:
        tasks = await asyncio.to_thread(state.store.list_tasks, caller.tenant.name, limit + 1, after)
        found += [task for task in tasks if caller.allows_task(task.name)]
        if len(tasks) <= limit:
            break
        after = tasks[-1].name
    page = found[:limit]
    return {
        "prefixes": [described(state, task) for task in page],
        "next": page[-1].name if len(found) > limit else None,
    }


@router.get("/{task}", summary="Describe a task")
async def describe(state: State, caller: Asking, task: str) -> Response:
    """`TASK@VERSION` describes that version."""
    name, at, version = task.partition("@")
    if at:
        return await describe_version(state, caller, name, version)
    caller.check_task(task)
    found = await asyncio.to_thread(state.store.get_task, caller.tenant.name, task)
    return task_response(state, found)


@router.get("/{task}/versions/{version}", summary="Describe a version")
async def describe_version(state: State, caller: Asking, task: str, version: str) -> Response:
    caller.check_task(task)
    found = await asyncio.to_thread(state.store.get_task, caller.tenant.name, task)
    one = await asyncio.to_thread(state.store.get_version, caller.tenant.name, task, version)
    return JSONResponse(manifest(state, found, one), headers={"ETag": f'"{one.digest}"'})


@router.get("/{task}/versions/{version}/file", summary="The native file", response_class=Response)
async def download(state: State, caller: Asking, task: str, version: str) -> Response:
    """Of the tenant's own tasks only, never of one that is shared with it."""
    caller.check_task(task)
    one = await asyncio.to_thread(state.store.get_version, caller.tenant.name, task, version)
    body = await state.remotely(state.store.file_bytes, one)
    disposition = f'attachment; filename="{task}-{one.version}.safetensors"'
    headers = {"ETag": f'"{one.digest}"', "Content-Disposition": disposition}
    return Response(body, media_type="application/octet-stream", headers=headers)


@router.post("/{task}/activate", summary="Make a version live, or several by weight; `previous` rolls back")
async def activate(
    request: Request,
    state: State,
    caller: Asking,
    task: str,
    body: ActivateRequest,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    precondition = precondition_of(if_match, if_none_match)
    tenant, name = caller.tenant.name, _name(caller, task)
    by = caller.author(request)
    if body.weights is not None:
        weights = {str(version): weight for version, weight in body.weights.items()}
        found = await state.remotely(state.store.set_weights, tenant, name, weights, precondition, by=by)
    else:
        version = str(body.version)
        found = await state.remotely(state.store.activate, tenant, name, version, precondition, by=by)
    await state.sync_pins()
    return task_response(state, found)


@router.post("/{task}/disable", summary="Answer 423 until it is enabled")
async def disable(request: Request, state: State, caller: Asking, task: str) -> Response:
    return await _set_enabled(request, state, caller, task, is_enabled=False)


@router.post("/{task}/enable", summary="Serve it again")
async def enable(request: Request, state: State, caller: Asking, task: str) -> Response:
    return await _set_enabled(request, state, caller, task, is_enabled=True)


@router.post("/{task}/share", summary="Let other tenants use it, read-only, as OWNER/TASK")
async def share(request: Request, state: State, caller: Asking, task: str, body: ShareRequest) -> Response:
    """Exactly these tenants from now on; `*`, which only an operator may say, is all."""
    name = _name(caller, task)
    if "*" in body.tenants:
        caller.check_scope("operator")
    found = await state.remotely(
        state.store.share, caller.tenant.name, name, tuple(body.tenants), by=caller.author(request)
    )
    return task_response(state, found)


@router.post("/{task}/pin", summary="Make it resident and keep it so")
async def pin(request: Request, state: State, caller: Asking, task: str) -> Response:
    tenant, name = caller.tenant.name, _name(caller, task)
    version = await asyncio.to_thread(state.store.resolve, tenant, name)
    limit = caller.tenant.limits.max_pinned_bytes
    if limit is not None:
        pinned = await asyncio.to_thread(state.store.pinned_versions)
        own = [each for each in pinned if each.tenant == tenant]
        num_bytes = state.device_bytes([*own, version], resident=False)
        if num_bytes > limit:
            raise QuotaError(f"this tenant may pin {limit} bytes of device memory, with {name!r} it were {num_bytes}")
    state.label([version])
    await state.preload(version)
    found = await state.remotely(state.store.set_pinned, tenant, name, True, by=caller.author(request))
    await state.sync_pins()
    return task_response(state, found)


@router.post("/{task}/unpin", summary="Let it be evicted again")
async def unpin(request: Request, state: State, caller: Asking, task: str) -> Response:
    name = _name(caller, task)
    found = await state.remotely(state.store.set_pinned, caller.tenant.name, name, False, by=caller.author(request))
    await state.sync_pins()
    return task_response(state, found)


@router.post("/{task}/preload", summary="Make it resident now")
async def preload(state: State, caller: Asking, task: str) -> Response:
    caller.check_task(task.partition("@")[0])
    tenant = caller.tenant.name
    version = await asyncio.to_thread(state.store.resolve, tenant, task)
    state.label([version])
    await state.preload(version)
    return task_response(state, await asyncio.to_thread(state.store.get_task, tenant, version.task))


@router.delete("/{task}", summary="Delete a task and all its versions", status_code=204)
async def delete_task(
    request: Request,
    state: State,
    caller: Asking,
    task: str,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """`TASK@VERSION` deletes that version alone."""
    name, at, version = task.partition("@")
    if at:
        return await delete_version(request, state, caller, name, version, if_match, if_none_match)
    caller.check_task(task)
    precondition = precondition_of(if_match, if_none_match)
    gone = await state.remotely(
        state.store.delete_task, caller.tenant.name, task, precondition, by=caller.author(request)
    )
    await state.sync_pins()
    await state.free(gone.versions)
    return Response(status_code=204)


@router.delete("/{task}/versions/{version}", summary="Delete a version that is not active", status_code=204)
async def delete_version(
    request: Request,
    state: State,
    caller: Asking,
    task: str,
    version: str,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    caller.check_task(task)
    precondition = precondition_of(if_match, if_none_match)
    gone = await state.remotely(
        state.store.delete_version, caller.tenant.name, task, version, precondition, by=caller.author(request)
    )
    await state.free((gone,))
    return Response(status_code=204)


async def _set_enabled(request: Request, state: AppState, caller: Caller, task: str, *, is_enabled: bool) -> Response:
    name = _name(caller, task)
    found = await state.remotely(
        state.store.set_enabled, caller.tenant.name, name, is_enabled, by=caller.author(request)
    )
    return task_response(state, found)


def _name(caller: Caller, task: str) -> str:
    """What is of the task, never of one version: which is active, who may use it, whether it stays resident."""
    if "@" in task:
        raise RequestError(422, f"only preload takes a version, expected a task, got {task[:80]!r}")
    caller.check_task(task)
    return task
