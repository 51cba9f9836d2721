"""Tenants as resources: their limits, their keys. A key's text is in the answer that makes it and nowhere else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from prefix_store.audit import AuditEntry, Author
from prefix_store.errors import NotFoundError
from prefix_store.tenants import OPERATOR_SCOPES, SCOPES, Key, Limits, Tenant, known_tenant, new_key, new_tenant
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
    _check_whole(caller, name)
    limits = None if body is None or body.limits is None else _limits(new.limits, body.limits)
    text, key = new_key(SCOPES, time.time(), expires_at_s=_own_end_s(caller))

    def change(found: Tenant | None) -> Tenant:
        if found is not None:
            return found if limits is None else replace(found, limits=limits)
        return replace(new, limits=limits or new.limits, keys=(key,))

    by = caller.author(request)

    def record(made: Tenant | None) -> Iterator[AuditEntry]:
        is_new = made is not None and key in made.keys
        yield by.entry(name, "create-tenant" if is_new else "set-limits", name)

    made = await _change(state, name, change, record, by)
    is_new = key in made.keys
    return JSONResponse(_shown(caller, made) | ({"key": text} if is_new else {}), 201 if is_new else 200, NOT_STORED)


@router.get("", summary="List tenants by name")
async def list_tenants(state: State, caller: Asking) -> dict[str, Any]:
    tenants = state.keys.tenants
    return {"tenants": [_shown(caller, tenants[name]) for name in sorted(tenants)]}


@router.get("/{name}", summary="Its limits and keys")
async def get_tenant(state: State, caller: Asking, name: str) -> dict[str, Any]:
    """An operator sees all, an `admin` key its own tenant; a key for some tasks the keys for some of these."""
    return _shown(caller, await _visible(state, caller, name))


@router.delete("/{name}", summary="Delete a tenant with its keys, tasks and files", status_code=204)
async def delete_tenant(request: Request, state: State, caller: Asking, name: str) -> Response:
    await _visible(state, caller, name)
    _check_whole(caller, name)
    leaves_a_key = state.keys.opens_without_keys
    gone = await state.remotely(state.store.delete_tenant, name, by=caller.author(request), leaves_a_key=leaves_a_key)
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
    """A key that `replaces` another has its scopes and tasks where none are given; the other ends after `overlap_s`.
    Nobody gives more than they have: what is given is a part of the caller's own scopes, tasks and time, and what is
    not given is the same as the caller's."""
    tenant = await _visible(state, caller, name)
    old = None if body.replaces is None else tenant.key(body.replaces)
    if old is not None:
        _check_hold(caller, name, old)
    own_tasks = caller.key.tasks if caller.key is not None and caller.tenant.name == name else ()
    scopes = body.scopes or (old.scopes if old else tuple(scope for scope in SCOPES if caller.may(scope)))
    tasks = body.tasks if body.tasks is not None else (old.tasks if old else own_tasks)
    now_s = time.time()
    expires_at_s = _own_end_s(caller) if body.expires_in_s is None else now_s + body.expires_in_s
    _check_grant(caller, name, scopes, tasks, expires_at_s)
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
    await _change(state, name, change, lambda _: entries, by)
    shown = {"key": text, **key.described()}
    return JSONResponse(shown, 201, NOT_STORED)


@router.delete("/{name}/keys/{key_id}", summary="End a key at once", status_code=204)
async def delete_key(request: Request, state: State, caller: Asking, name: str, key_id: str) -> Response:
    """A key may end itself, whatever its scopes."""
    tenant = await _visible(state, caller, name)
    _check_hold(caller, name, tenant.key(key_id))

    def change(found: Tenant | None) -> Tenant:
        return known_tenant(name, found).without_key(key_id)

    by = caller.author(request)
    entry = by.entry(name, "delete-key", key_id)
    leaves_a_key = state.keys.opens_without_keys and not caller.is_operator
    await _change(state, name, change, lambda _: [entry], by, leaves_a_key=leaves_a_key)
    return Response(status_code=204)


async def _change(
    state: AppState,
    name: str,
    change: Callable[[Tenant | None], Tenant],
    record: Callable[[Tenant | None], Iterable[AuditEntry]],
    by: Author,
    *,
    leaves_a_key: bool = False,
) -> Tenant:
    made = await state.remotely(state.registry.update_tenant, name, change, record, by=by, leaves_a_key=leaves_a_key)
    assert made is not None
    await asyncio.to_thread(state.keys.refresh)
    return made


async def _set_suspended(
    request: Request, state: AppState, caller: Caller, name: str, *, is_suspended: bool
) -> dict[str, Any]:
    _check_whole(caller, name)

    def change(found: Tenant | None) -> Tenant:
        return replace(known_tenant(name, found), is_suspended=is_suspended)

    by = caller.author(request)
    entry = by.entry(name, "suspend" if is_suspended else "resume", name)
    made = await _change(state, name, change, lambda _: [entry], by)
    return _shown(caller, made)


async def _visible(state: AppState, caller: Caller, name: str) -> Tenant:
    """As it is in the registry now. Another's and one that is not there read the same. Raises NotFoundError."""
    if caller.is_operator or caller.tenant.name == name:
        return known_tenant(name, await asyncio.to_thread(state.registry.get_tenant, name))
    raise NotFoundError(f"no tenant {name[:80]!r}")


def _limits(before: Limits, given: LimitsModel) -> Limits:
    """Those that are not given are a new tenant's."""
    return replace(before, **given.model_dump(exclude_unset=True))


def _shown(caller: Caller, tenant: Tenant) -> dict[str, Any]:
    """With the keys for tasks that the caller's key is for too."""
    keys = tuple(key for key in tenant.keys if caller.covers_tasks(tenant.name, key.tasks))
    return replace(tenant, keys=keys).described()


def _own_end_s(caller: Caller) -> float | None:
    return None if caller.key is None else caller.key.expires_at_s


def _check_whole(caller: Caller, name: str) -> None:
    """What concerns a whole tenant is not for a key that is for some tasks. Raises RequestError 403."""
    if not caller.covers_tasks(name, ()):
        raise RequestError(403, f"{_for(caller)}, not for all of tenant {name[:80]!r}")


def _check_hold(caller: Caller, name: str, key: Key) -> None:
    """A key ends keys that may no more than itself; operators' keys are ended by operators. Raises RequestError
    403."""
    if caller.key is not None and key.id == caller.key.id and name == caller.tenant.name:
        return
    if not caller.is_operator and (beyond := set(key.scopes) - caller.scopes | set(key.scopes) & set(OPERATOR_SCOPES)):
        raise RequestError(403, f"this key does not end keys with the scope {', '.join(sorted(beyond))}")
    if not caller.covers_tasks(name, key.tasks):
        raise RequestError(403, f"{_for(caller)}; it does not end keys for others")


def _check_grant(
    caller: Caller, name: str, scopes: Sequence[str], tasks: Sequence[str], expires_at_s: float | None
) -> None:
    """Nobody gives more than they have. Raises RequestError 403."""
    if not caller.is_operator:
        if beyond := set(scopes) & set(OPERATOR_SCOPES):
            raise RequestError(403, f"only an operator makes keys with the scope {', '.join(sorted(beyond))}")
        if beyond := set(scopes) - caller.scopes:
            own = ", ".join(sorted(caller.scopes))
            raise RequestError(403, f"this key may {own}; it makes no keys with the scope {', '.join(sorted(beyond))}")
    if not caller.covers_tasks(name, tasks):
        raise RequestError(403, f"{_for(caller)}; it makes keys for some of these only")
    own_end_s = _own_end_s(caller)
    if own_end_s is not None and (expires_at_s is None or expires_at_s > own_end_s):
        left_s = max(0, int(own_end_s - time.time()))
        raise RequestError(403, f"this key ends in {left_s} s; it makes no keys that end later")


def _for(caller: Caller) -> str:
    return f"this key is for {', '.join(caller.key.tasks) if caller.key is not None else 'all'}"
