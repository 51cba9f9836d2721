"""What the registries keep, as JSON: one document a task, with its versions; one a tenant, with its keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefix_store.audit import AuditEntry
from prefix_store.ensemble import Ensemble, Member
from prefix_store.errors import DamagedRegistryError
from prefix_store.prefix import Layout
from prefix_store.task import Task, Version
from prefix_store.tenants import Key, Limits, Tenant

P = ParamSpec("P")
T = TypeVar("T")


def _whole(read: Callable[P, T]) -> Callable[P, T]:
    """Raises DamagedRegistryError for a document that is not what was written."""

    @wraps(read)
    def checked(*args: P.args, **given: P.kwargs) -> T:
        try:
            return read(*args, **given)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            detail = f"{read.__name__}: {type(error).__name__}: {error}; put a backup of the registry back"
            raise DamagedRegistryError("the registry is damaged", detail=detail) from error

    return checked


def write_task(task: Task) -> str:
    return _write(vars(task) | {"versions": [_version_fields(version) for version in task.versions]})


@_whole
def read_task(document: str) -> Task:
    fields = json.loads(document)
    named = {"tenant": fields["tenant"], "task": fields["name"]}
    fields["versions"] = tuple(
        Version(**named | version | {"content": read_content(version["content"])}) for version in fields["versions"]
    )
    fields["weights"] = tuple((version, weight) for version, weight in fields["weights"])
    for name in ("shared_with", "quarantined"):
        fields[name] = tuple(fields[name])
    return Task(**fields)


def _version_fields(version: Version) -> dict[str, Any]:
    """Field by field: `asdict` copies every value of every version, most of what a change of a large task costs."""
    fields = {name: value for name, value in vars(version).items() if name not in ("tenant", "task")}
    return fields | {"content": _content_fields(version.content)}


def _content_fields(content: Layout | Ensemble) -> dict[str, Any]:
    if isinstance(content, Layout):
        return vars(content)
    members = [vars(member) | {"content": vars(member.content)} for member in content.members]
    return vars(content) | {"members": members}


def read_content(fields: dict[str, Any]) -> Layout | Ensemble:
    if "members" not in fields:
        return Layout(**fields)
    members = [Member(**member | {"content": Layout(**member["content"])}) for member in fields["members"]]
    return Ensemble(tuple(members), fields["rule"])


def write_tenant(tenant: Tenant) -> str:
    return _write(asdict(tenant))


@_whole
def read_tenant(document: str) -> Tenant:
    fields = json.loads(document)
    keys = (key | {"scopes": tuple(key["scopes"]), "tasks": tuple(key["tasks"])} for key in fields["keys"])
    return Tenant(**fields | {"limits": Limits(**fields["limits"]), "keys": tuple(Key(**key) for key in keys)})


def write_audit(entry: AuditEntry) -> str:
    """Without its number, which the registry gives."""
    return _write({name: value for name, value in vars(entry).items() if name != "number"})


@_whole
def read_audit(number: int, document: str) -> AuditEntry:
    return AuditEntry(**json.loads(document), number=number)


def _write(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))
