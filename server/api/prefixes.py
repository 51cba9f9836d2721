"""Prefixes as resources: list, describe, activate, share, pin, delete. Uploads have a file of their own."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from prefix_store.names import TaskRef, known_version
from prefix_store.task import Task
from server.api.auth import Asking, Caller
from server.api.bases import AcceptBase, BaseFingerprint
from server.api.errors import PROBLEMS
from server.api.json_bodies import JSONRoute
from server.api.listing import tasks_of
from server.api.manifests import described, task_response, version_response
from server.api.preconditions import IfMatch, IfNoneMatch, precondition_of
from server.api.schemas import ActivateRequest, ShareRequest
from server.api.state import AppState, State, full_name
from server.api.task_paths import OwnTask, TaskPath

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], responses=PROBLEMS, route_class=JSONRoute)


@router.get("", summary="List tasks by name")
async def list_tasks(
    state: State,
    caller: Asking,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=129, description="The last name of the page before.")] = "",
    tenant: Annotated[str | None, Query(max_length=64, description="An operator's: one tenant's, or `*` all.")] = None,
) -> dict[str, Any]:
    """The tenant's own, then those that others share with it, as OWNER/TASK. A key with task patterns sees those that
    it may use."""
    page = await tasks_of(state, caller, tenant, limit, after)
    named = None if tenant is None else full_name
    return {
        "prefixes": [described(state, caller, task, named and named(task)) for task in page.tasks],
        "next": page.next,
    }


@router.get("/{task:path}/versions/{version}/file", summary="The native file", response_class=Response)
async def download(state: State, path: OwnTask, version: str) -> Response:
    """Never of a task that is shared with the tenant."""
    one = await asyncio.to_thread(state.store.get_version, path.tenant, path.name, version)
    body = await state.remotely(state.store.file_bytes, one)
    disposition = f'attachment; filename="{one.task}-{one.version}.safetensors"'
    headers = {"ETag": f'"{one.digest}"', "Content-Disposition": disposition}
    return Response(body, media_type="application/octet-stream", headers=headers)


@router.get("/{task:path}/versions/{version}", summary="Describe a version")
async def describe_version(state: State, caller: Asking, task: str, version: str) -> Response:
    found = await _readable(state, caller, task)
    return version_response(state, caller, found, found.find(known_version(found.name, version)))


@router.get("/{task:path}", summary="Describe a task")
async def describe(state: State, caller: Asking, task: str) -> Response:
    """`TASK@VERSION` describes that version, `OWNER/TASK` a task that is shared with the tenant."""
    name, at, version = task.partition("@")
    if at:
        return await describe_version(state, caller, name, version)
    return task_response(state, caller, await _readable(state, caller, task))


@router.post("/{task:path}/activate", summary="Make a version live, or several by weight; `previous` rolls back")
async def activate(
    request: Request,
    state: State,
    caller: Asking,
    path: OwnTask,
    body: ActivateRequest,
    accept_base: AcceptBase = False,
    base_fingerprint: BaseFingerprint = None,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """A version whose `base` is `unverified` goes live with `accept_base` or `base_fingerprint`, and is 422 without.
    While weights are set `previous` is the version that was live when they were set, and the weights end."""
    precondition = precondition_of(if_match, if_none_match)
    tenant, name = path.tenant, path.task
    given: dict[str, Any] = {"accept_base": accept_base, "base_fingerprint": base_fingerprint}
    given["by"] = caller.author(request)
    if body.weights is not None:
        weights = {str(version): weight for version, weight in body.weights.items()}
        found = await state.remotely(state.store.set_weights, tenant, name, weights, precondition, **given)
    else:
        version = str(body.version)
        found = await state.remotely(state.store.activate, tenant, name, version, precondition, **given)
    await state.sync_pins()
    return task_response(state, caller, found)


@router.post("/{task:path}/disable", summary="Answer 423 until it is enabled")
async def disable(request: Request, state: State, caller: Asking, path: OwnTask) -> Response:
    return await _set_enabled(request, state, caller, path, is_enabled=False)


@router.post("/{task:path}/enable", summary="Serve it again")
async def enable(request: Request, state: State, caller: Asking, path: OwnTask) -> Response:
    return await _set_enabled(request, state, caller, path, is_enabled=True)


@router.post("/{task:path}/share", summary="Let other tenants use it, read-only, as OWNER/TASK")
async def share(request: Request, state: State, caller: Asking, path: OwnTask, body: ShareRequest) -> Response:
    """Exactly these tenants from now on; `*`, which only an operator may say, is all."""
    name = path.task
    if "*" in body.tenants:
        caller.check_scope("operator")
    by = caller.author(request)
    found = await state.remotely(state.store.share, path.tenant, name, tuple(body.tenants), by=by)
    return task_response(state, caller, found)


@router.post("/{task:path}/pin", summary="Make it resident and keep it so")
async def pin(request: Request, state: State, caller: Asking, path: OwnTask) -> Response:
    tenant, name = path.tenant, path.task
    version = await asyncio.to_thread(state.store.resolve, tenant, name)
    by = caller.author(request)
    await state.remotely(state.store.check_pinnable, tenant, name, state.servable_bytes)
    state.label([version])
    await state.preload(version)
    found = await state.remotely(state.store.set_pinned, tenant, name, True, state.servable_bytes, by=by)
    await state.sync_pins()
    return task_response(state, caller, found)


@router.post("/{task:path}/unpin", summary="Let it be evicted again")
async def unpin(request: Request, state: State, caller: Asking, path: OwnTask) -> Response:
    by = caller.author(request)
    found = await state.remotely(state.store.set_pinned, path.tenant, path.task, False, by=by)
    await state.sync_pins()
    return task_response(state, caller, found)


@router.post("/{task:path}/preload", summary="Make it resident now")
async def preload(state: State, caller: Asking, path: OwnTask) -> Response:
    version = await asyncio.to_thread(state.store.resolve, path.tenant, path.name)
    state.label([version])
    await state.preload(version)
    found = await asyncio.to_thread(state.store.get_task, path.tenant, version.task)
    return task_response(state, caller, found)


@router.delete("/{task:path}/versions/{version}", summary="Delete a version that is not active", status_code=204)
async def delete_version(
    request: Request,
    state: State,
    caller: Asking,
    path: OwnTask,
    version: str,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    precondition, by = precondition_of(if_match, if_none_match), caller.author(request)
    delete = state.store.delete_version
    gone = await state.remotely(delete, path.tenant, path.name, version, precondition, by=by)
    await state.free((gone,))
    return Response(status_code=204)


@router.delete("/{task:path}", summary="Delete a task and all its versions", status_code=204)
async def delete_task(
    request: Request,
    state: State,
    caller: Asking,
    path: OwnTask,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """`TASK@VERSION` deletes that version alone."""
    name, at, version = path.name.partition("@")
    if at:
        one = TaskPath(path.tenant, name)
        return await delete_version(request, state, caller, one, version, if_match, if_none_match)
    precondition, by = precondition_of(if_match, if_none_match), caller.author(request)
    gone = await state.remotely(state.store.delete_task, path.tenant, name, precondition, by=by)
    await state.sync_pins()
    await state.free(gone.versions)
    return Response(status_code=204)


async def _readable(state: AppState, caller: Caller, task: str) -> Task:
    """The caller's own task or one that is shared with it; an operator's may be anybody's. Raises NotFoundError."""
    caller.check_task(task)
    owner, slash, name = task.rpartition("/")
    ref = TaskRef(name, owner=owner if slash else None)
    return await asyncio.to_thread(state.store.usable_task, caller.tenant.name, ref, any_owner=caller.is_operator)


async def _set_enabled(
    request: Request, state: AppState, caller: Caller, path: TaskPath, *, is_enabled: bool
) -> Response:
    by = caller.author(request)
    found = await state.remotely(state.store.set_enabled, path.tenant, path.task, is_enabled, by=by)
    return task_response(state, caller, found)
