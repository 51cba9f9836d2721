"""From one registry to another: tasks and tenants as they are, audit and usage. Files stay where they are."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from prefix_store.audit import AuditEntry
from prefix_store.errors import ConflictError
from prefix_store.registry import Registry
from prefix_store.task import Task
from prefix_store.tenants import Tenant
from prefix_store.usage import FIRST_DAY, LAST_DAY, Usage

PAGE = 500


@dataclass(frozen=True)
class Contents:
    """All that a registry has: revisions by tenant, tasks by tenant and name, audit entries oldest first."""

    revisions: dict[str, int]
    tasks: dict[str, dict[str, Task]]
    tenants: dict[str, Tenant]
    audit: list[AuditEntry]
    usage: list[Usage]

    @property
    def num_tasks(self) -> int:
        return sum(map(len, self.tasks.values()))


def contents(registry: Registry) -> Contents:
    revisions = registry.revisions()
    return Contents(
        revisions,
        {tenant: {task.name: task for task in _tasks(registry, tenant)} for tenant in revisions},
        {tenant.name: tenant for tenant in registry.list_tenants()},
        list(_audit(registry))[::-1],
        registry.usage(None, FIRST_DAY, LAST_DAY),
    )


def copy(source: Registry, target: Registry) -> Contents:
    """Nobody writes either meanwhile. The target is empty, or has what a copy that was cut off put there: then this
    goes on. The target keeps an id of its own, and may take over the files of the source (`file_owner`). Raises
    ConflictError where it has anything else, and changes nothing then."""
    found, there = contents(source), contents(target)
    _check(found, there)
    for tenant, tasks in found.tasks.items():
        target.adopt(tenant, max(found.revisions[tenant], there.revisions.get(tenant, 0)), tasks)
    for name, account in found.tenants.items():
        target.update_tenant(name, partial(_put, account))
    for entry in found.audit[len(there.audit) :]:
        target.append_audit(entry)
    if not there.usage:
        target.add_usage(found.usage, uuid.uuid4().hex)
    identity = source.identity()
    target.add_predecessors([identity.id, *identity.predecessors])
    return found


def _check(found: Contents, there: Contents) -> None:
    """Revisions of tenants are counted anew in the target, and so are the numbers of audit entries."""
    for tenant, tasks in there.tasks.items():
        for name, task in tasks.items():
            if found.tasks.get(tenant, {}).get(name) != task:
                raise ConflictError(f"expected an empty registry, found task {name!r} of {tenant!r}")
    for name, account in there.tenants.items():
        if name not in found.tenants or _put(found.tenants[name], account) is not account:
            raise ConflictError(f"expected an empty registry, found tenant {name!r}")
    entries = [replace(entry, number=0) for entry in found.audit]
    if [replace(entry, number=0) for entry in there.audit] != entries[: len(there.audit)]:
        raise ConflictError(f"expected an empty registry, found {len(there.audit)} audit entries")
    if there.usage and there.usage != found.usage:
        raise ConflictError(f"expected an empty registry, found {len(there.usage)} rows of usage")


def _put(tenant: Tenant, there: Tenant | None) -> Tenant:
    """What is there already, if it is the same."""
    if there is not None and replace(tenant, revision=there.revision) == there:
        return there
    return tenant


def _tasks(registry: Registry, tenant: str) -> Iterator[Task]:
    after = ""
    while page := registry.list_tasks(tenant, PAGE, after):
        yield from page
        after = page[-1].name


def _audit(registry: Registry) -> Iterator[AuditEntry]:
    before = None
    while page := registry.list_audit(None, PAGE, before):
        yield from page
        before = page[-1].number
