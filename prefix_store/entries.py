"""The registries' index: a task is listed under each of its entries, so that nothing has to be looked for in all
documents. Names have no spaces, so an entry may."""

from __future__ import annotations

from prefix_store.ensemble import Ensemble
from prefix_store.task import Task

PINNED = "pinned"
FILES = "file"
MODELS = "model"


def file_entry(tenant: str, digest: str) -> str:
    """Of the tasks with a version of this content."""
    return f"{FILES} {tenant} {digest}"


def member_entry(tenant: str, task: str, version: int) -> str:
    """Of the tasks with an ensemble that has this version."""
    return f"member {tenant} {task}@{version}"


def shared_entry(tenant: str) -> str:
    """Of the tasks of others that this tenant, or everyone (`*`), may use."""
    return f"shared {tenant}"


def model_entry(fingerprint: str) -> str:
    """Of the tasks whose active version was stored for this model."""
    return f"{MODELS} {fingerprint}"


def entries_of(task: Task) -> frozenset[str]:
    found = {shared_entry(tenant) for tenant in task.shared_with}
    if task.is_pinned:
        found.add(PINNED)
    for version in task.versions:
        if version.version == task.active:
            found.add(model_entry(version.fingerprint))
        if isinstance(version.content, Ensemble):
            found |= {member_entry(task.tenant, m.task, m.version) for m in version.content.members}
        else:
            found.add(file_entry(task.tenant, version.digest))
    return frozenset(found)
