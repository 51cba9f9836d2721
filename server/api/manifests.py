"""Tasks and versions as the wire shows them: to those who may change them, and to those whom they are shared with."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from prefix_store.admission import next_step
from prefix_store.ensemble import Ensemble, Member
from prefix_store.prefix import PARTS
from prefix_store.task import Task, Version
from server.api.auth import Caller
from server.api.state import AppState, name_for

OWNERS_ONLY = ("note", "members", "claimed_base", "next_step")  # of a version


def task_response(state: AppState, caller: Caller, task: Task) -> JSONResponse:
    return JSONResponse(described(state, caller, task), headers=_etag(caller, task, str(task.revision)))


def version_response(state: AppState, caller: Caller, task: Task, version: Version) -> JSONResponse:
    return JSONResponse(manifest(state, caller, task, version), headers=_etag(caller, task, version.digest))


def described(state: AppState, caller: Caller, task: Task, name: str | None = None) -> dict[str, Any]:
    """`name` is what to call it; None: as the caller does."""
    active = next((version for version in task.versions if version.version == task.active), None)
    shown = {
        "task": name or name_for(caller.tenant.name, task),
        "owner": task.tenant,
        "shared": not _may_change(caller, task),
        "active": task.active,
        "previous": task.rollback_version,
        "weights": _weights(task),
        "status": _status(state, active),
        "enabled": not task.is_disabled,
        "residency": state.residency(active) if active else "cold",
    }
    if _may_change(caller, task):
        shown |= {
            "revision": task.revision,
            "quarantined": list(task.quarantined),
            "shared_with": list(task.shared_with),
            "pinned": task.is_pinned,
            "resident_bytes": state.device_bytes(task.versions, resident=True),
        }
    return shown | {"versions": [_version(state, caller, task, version) for version in task.versions]}


def manifest(state: AppState, caller: Caller, task: Task, version: Version) -> dict[str, Any]:
    return {
        "task": name_for(caller.tenant.name, task),
        **_version(state, caller, task, version),
        "active": task.active,
        "previous": task.rollback_version,
        "weights": _weights(task),
        **({"revision": task.revision} if _may_change(caller, task) else {}),
    }


def _may_change(caller: Caller, task: Task) -> bool:
    return caller.is_operator or task.tenant == caller.tenant.name


def _etag(caller: Caller, task: Task, text: str) -> dict[str, str]:
    """For those who may send it back: nobody else is told how often a task changes."""
    return {"ETag": f'"{text}"'} if _may_change(caller, task) else {}


def _weights(task: Task) -> dict[str, int] | None:
    return {str(version): weight for version, weight in task.weights} or None


def _status(state: AppState, version: Version | None) -> str:
    return "ok" if version is None or state.store.is_compatible(version) else "incompatible"


def _version(state: AppState, caller: Caller, task: Task, version: Version) -> dict[str, Any]:
    content: dict[str, Any]
    if isinstance(version.content, Ensemble):
        members = [_member(caller, task, member) for member in version.content.members]
        content = {"members": members, "rule": version.content.rule}
    else:
        content = {"placement": version.content.placement}
        if version.content.separator is not None:
            content["separator"] = version.content.separator
        if state.engine.shape.is_encoder_decoder:
            content["parts"] = {part: getattr(version.content, f"num_{part}_tokens") for part in PARTS}
    shown = {
        "version": version.version,
        "digest": version.digest,
        "kind": version.kind,
        **content,
        "num_virtual_tokens": version.num_virtual_tokens,
        "num_bytes": version.num_bytes,
        "device_bytes": state.device_bytes([version], resident=False),
        "base": version.base,
        "base_accepted": version.is_base_accepted or version.base == "mismatch",
        "claimed_base": version.claimed_base,
        "base_model": version.base_model,
        "fingerprint": version.fingerprint,
        "status": _status(state, version),
        "residency": state.residency(version),
        "next_step": next_step(version),
        "note": version.note,
        "created_at_s": version.created_at_s,
    }
    if _may_change(caller, task):
        return shown
    return {name: value for name, value in shown.items() if name not in OWNERS_ONLY}


def _member(caller: Caller, task: Task, member: Member) -> str | None:
    """None: a task that the caller's key is not for."""
    return str(member) if caller.allows_task(f"{task.tenant}/{member.task}") else None
