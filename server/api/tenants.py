"""Tenants as resources: their limits, their keys. A key's text is in the answer that makes it and nowhere else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from prefix_store.audit import AuditEntry
from prefix_store.errors import NotFoundError
from prefix_store.tenants import SCOPES, Key, Limits, Tenant, known_tenant, new_key, new_tenant
from server.api.auth import Asking, Caller
from server.api.errors import PROBLEMS, RequestError, also
from server.api.json_bodies import JSONRoute
from server.api.state import AppState, State
from server.api.tenant_schemas import KeyRequest, LimitsModel, TenantRequest

router = APIRouter(prefix="/v1/tenants", tags=["tenants"], responses=PROBLEMS, route_class=JSONRoute)
NOT_STORED = {"Cache-Control": "no-store"}  # answers with a key's text


@router.put("/{name}", summary="Make a tenant, or set its limits", status_code=201, responses=also("application/json"))
async def put_tenant(
    request: Request, state: State, caller: Asking, name: str, body: TenantRequest | None = None
) -> Response:
    """201 with the first key of a new tenant, 200 for one that is there. Limits that are given replace all."""
    new = new_tenant(name)
    limits = None if body is None or body.limits is None else _limits(new.limits, body.limits)
    text, key = new_key(SCOPES, time.time())

    def change(found: Tenant | None) -> Tenant:
        if found is not None:
            return found if limits is None else replace(found, limits=limits)
        return replace(new, limits=limits or new.limits, keys=(key,))

    by = caller.author(request)

    def record(made: Tenant | None) -> Iterator[AuditEntry]:
        is_new = made is not None and key in made.keys
        yield by.entry(name, "create-tenant" if is_new else "set-limits", name)

    made = await _change(state, name, change, record)
    is_new = key in made.keys
    return JSONResponse(made.described() | ({"key": text} if is_new else {}), 201 if is_new else 200, NOT_STORED)


@router.get("", summary="List tenants by name")
async def list_tenants(state: State) -> dict[str, Any]:
    tenants = state.keys.tenants
    return {"tenants": [tenants[name].described() for name in sorted(tenants)]}


@router.get("/{name}", summary="Its limits and keys")
async def get_tenant(state: State, caller: Asking, name: str) -> dict[str, Any]:
    """An operator sees all, an `admin` key its own tenant."""
    return (await _visible(state, caller, name)).described()


@router.delete("/{name}", summary="Delete a tenant with its keys, tasks and files", status_code=204)
async def delete_tenant(request: Request, state: State, caller: Asking, name: str) -> Response:
    await _visible(state, caller, name)
    gone = await state.remotely(state.store.delete_tenant, name, by=caller.author(request))
    await asyncio.to_thread(state.keys.refresh)
    await state.sync_pins()
    await state.free(gone)
    return Response(status_code=204)


@router.post("/{name}/suspend", summary="Refuse all its keys")
async def suspend(request: Request, state: State, caller: Asking, name: str) -> dict[str, Any]:
    return await _set_suspended(request, state, caller, name, is_suspended=True)


@router.post("/{name}/resume", summary="Take its keys again")
async def resume(request: Request, state: State, caller: Asking, name: str) -> dict[str, Any]:
    return await _set_suspended(request, state, caller, name, is_suspended=False)


@router.post("/{name}/keys", summary="Make a key", status_code=201)
async def make_key(request: Request, state: State, caller: Asking, name: str, body: KeyRequest) -> Response:
    """A key that `replaces` another has its scopes and tasks where none are given; the other ends after
    `overlap_s`."""
    tenant = await _visible(state, caller, name)
    old = None if body.replaces is None else tenant.key(body.replaces)
    scopes = body.scopes or (old.scopes if old else SCOPES)
    tasks = body.tasks if body.tasks is not None else (old.tasks if old else ())
    _check_grant(caller, scopes, tasks)
    if old is not None:
        _check_hold(caller, old)
    now_s = time.time()
    expires_at_s = None if body.expires_in_s is None else now_s + body.expires_in_s
    text, key = new_key(scopes, now_s, tasks=tasks, expires_at_s=expires_at_s)

    def change(found: Tenant | None) -> Tenant:
        tenant = known_tenant(name, found)
        if old is not None:
            tenant = tenant.with_expiry([tenant.key(old.id).id], now_s + body.overlap_s)
        return tenant.with_key(key, now_s)

    by = caller.author(request)
    entries = [by.entry(name, "make-key", key.id)]
    if old is not None:
        entries.append(by.entry(name, "expire-key", old.id))
    await _change(state, name, change, lambda _: entries)
    shown = {"key": text, **key.described()}
    return JSONResponse(shown, 201, NOT_STORED)


@router.delete("/{name}/keys/{key_id}", summary="End a key at once", status_code=204)
async def delete_key(request: Request, state: State, caller: Asking, name: str, key_id: str) -> Response:
    tenant = await _visible(state, caller, name)
    _check_hold(caller, tenant.key(key_id))
    if not caller.is_operator and state.keys.is_last(tenant):
        raise RequestError(409, "expected another key to be left: without any, all on this machine are operators")

    def change(found: Tenant | None) -> Tenant:
        return known_tenant(name, found).without_key(key_id)

    entry = caller.author(request).entry(name, "delete-key", key_id)
    await _change(state, name, change, lambda _: [entry])
    return Response(status_code=204)


async def _change(
    state: AppState,
    name: str,
    change: Callable[[Tenant | None], Tenant],
    record: Callable[[Tenant | None], Iterable[AuditEntry]],
) -> Tenant:
    made = await state.remotely(state.registry.update_tenant, name, change, record)
    assert made is not None
    await asyncio.to_thread(state.keys.refresh)
    return made


async def _set_suspended(
    request: Request, state: AppState, caller: Caller, name: str, *, is_suspended: bool
) -> dict[str, Any]:
    def change(found: Tenant | None) -> Tenant:
        return replace(known_tenant(name, found), is_suspended=is_suspended)

    entry = caller.author(request).entry(name, "suspend" if is_suspended else "resume", name)
    made = await _change(state, name, change, lambda _: [entry])
    return made.described()


async def _visible(state: AppState, caller: Caller, name: str) -> Tenant:
    """As it is in the registry now. Another's and one that is not there read the same. Raises NotFoundError."""
    if caller.is_operator or caller.tenant.name == name:
        return known_tenant(name, await asyncio.to_thread(state.registry.get_tenant, name))
    raise NotFoundError(f"no tenant {name[:80]!r}")


def _limits(before: Limits, given: LimitsModel) -> Limits:
    """Those that are not given are a new tenant's."""
    return replace(before, **given.model_dump(exclude_unset=True))


def _check_hold(caller: Caller, key: Key) -> None:
    """An operator's key that a tenant has is not its own to end. Raises RequestError 403."""
    if not caller.is_operator and set(key.scopes) - set(SCOPES):
        raise RequestError(403, f"only an operator ends keys with the scope {', '.join(sorted(set(key.scopes)))}")


def _check_grant(caller: Caller, scopes: Sequence[str], tasks: Sequence[str]) -> None:
    """Nobody gives more than they have. Raises RequestError 403."""
    if caller.is_operator:
        return
    if beyond := set(scopes) - set(SCOPES):
        raise RequestError(403, f"only an operator makes keys with the scope {', '.join(sorted(beyond))}")
    own = caller.key.tasks if caller.key is not None else ()
    if own and (not tasks or set(tasks) - set(own)):
        raise RequestError(403, f"this key is for {', '.join(own)}; it makes keys for some of these only")
