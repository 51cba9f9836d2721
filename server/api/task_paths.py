"""Whose task a path names: the caller's own, or with an operator's key `OWNER/T`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends

from prefix_store.errors import NotFoundError
from prefix_store.tenants import is_tenant_name
from server.api.auth import Asking, Caller
from server.api.errors import RequestError


@dataclass(frozen=True)
class TaskPath:
    """`name` may be `T@V`, and is checked by the store."""

    tenant: str
    name: str

    @property
    def task(self) -> str:
        """What is of the task and never of one version: which is active, who may use it, whether it stays resident.
        Raises RequestError."""
        if "@" in self.name:
            raise RequestError(422, f"only preload takes a version, expected a task, got {self.name[:80]!r}")
        return self.name


def owned(caller: Caller, text: str) -> TaskPath:
    """Raises RequestError 403 for a task that the key is not for, NotFoundError for another tenant's."""
    caller.check_task(text.partition("@")[0])
    owner, slash, name = text.rpartition("/")
    if not slash or owner == caller.tenant.name:
        return TaskPath(caller.tenant.name, name)
    if not caller.is_operator or not is_tenant_name(owner):
        raise NotFoundError(f"no task {text[:140]!r}")
    return TaskPath(owner, name)


async def path_of(caller: Asking, task: str) -> TaskPath:
    return owned(caller, task)


OwnTask = Annotated[TaskPath, Depends(path_of)]
