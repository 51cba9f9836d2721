"""The tasks that a caller sees, page by page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from prefix_store.task import Task
from prefix_store.tenants import known_tenant
from server.api.auth import Caller
from server.api.errors import RequestError
from server.api.state import AppState, full_name, name_for

PAGE = 500
EVERY_TENANT = "*"


@dataclass(frozen=True)
class Page:
    """`next` is the cursor of the page behind this one; None: it is the last."""

    tasks: list[Task]
    next: str | None


async def tasks_of(state: AppState, caller: Caller, tenant: str | None, limit: int, after: str) -> Page:
    """Without `tenant` the caller's own by name, then those that others share with it by `OWNER/T`; of a tenant, or for
    `*` of every one, all by `OWNER/T`. `after` is the last name of the page before. Raises RequestError 403 for another
    tenant's, NotFoundError for a tenant that is not there."""
    name_of: Callable[[Task], str] = full_name
    if tenant is None:
        tasks, name_of = _used(state, caller.tenant.name, after), partial(name_for, caller.tenant.name)
    else:
        if not caller.is_operator and tenant != caller.tenant.name:
            raise RequestError(403, "only an operator sees other tenants' tasks")
        if tenant != EVERY_TENANT:
            known_tenant(tenant, await asyncio.to_thread(state.registry.get_tenant, tenant))
        tasks = _stored(state, tenant, after)
    found: list[Task] = []
    async with aclosing(tasks):
        async for task in tasks:
            if caller.allows_task(full_name(task)):
                found.append(task)
            if len(found) > limit:
                break
    page = found[:limit]
    return Page(page, name_of(page[-1]) if len(found) > limit else None)


async def _used(state: AppState, tenant: str, after: str) -> AsyncGenerator[Task, None]:
    own, shared = partial(state.store.list_tasks, tenant), partial(state.store.list_shared, tenant)
    if "/" not in after:
        async for task in _each(own, after, lambda task: task.name):
            yield task
        after = ""
    async for task in _each(shared, after, full_name):
        yield task


async def _stored(state: AppState, tenant: str, after: str) -> AsyncGenerator[Task, None]:
    owner, _, name = after.rpartition("/")
    owners = [tenant]
    if tenant == EVERY_TENANT:
        owners = [each for each in sorted(await asyncio.to_thread(state.registry.revisions)) if each >= owner]
    for each in owners:
        start = name if each in (owner, tenant) else ""
        async for task in _each(partial(state.store.list_tasks, each), start, lambda task: task.name):
            yield task


async def _each(
    fetch: Callable[[int, str], list[Task]], after: str, cursor: Callable[[Task], str]
) -> AsyncGenerator[Task, None]:
    while True:
        found = await asyncio.to_thread(fetch, PAGE, after)
        for task in found:
            yield task
        if len(found) < PAGE:
            return
        after = cursor(found[-1])
