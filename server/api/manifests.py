"""Tasks and versions as the wire shows them."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from prefix_store.admission import next_step
from prefix_store.ensemble import Ensemble
from prefix_store.prefix import PARTS
from prefix_store.task import Task, Version
from server.api.state import AppState


def task_response(state: AppState, task: Task) -> JSONResponse:
    return JSONResponse(described(state, task), headers={"ETag": f'"{task.revision}"'})


def described(state: AppState, task: Task) -> dict[str, Any]:
    active = next((version for version in task.versions if version.version == task.active), None)
    return {
        "task": task.name,
        "revision": task.revision,
        "active": task.active,
        "previous": task.rollback_version,
        "weights": _weights(task),
        "status": _status(state, active),
        "enabled": not task.is_disabled,
        "quarantined": list(task.quarantined),
        "shared_with": list(task.shared_with),
        "pinned": task.is_pinned,
        "residency": state.residency(active) if active else "cold",
        "resident_bytes": state.device_bytes(task.versions, resident=True),
        "versions": [_version(state, version) for version in task.versions],
    }


def manifest(state: AppState, task: Task, version: Version) -> dict[str, Any]:
    return {
        "task": task.name,
        **_version(state, version),
        "active": task.active,
        "previous": task.rollback_version,
        "weights": _weights(task),
        "revision": task.revision,
    }


def _weights(task: Task) -> dict[str, int] | None:
    return {str(version): weight for version, weight in task.weights} or None


def _status(state: AppState, version: Version | None) -> str:
    return "ok" if version is None or state.store.is_compatible(version) else "incompatible"


def _version(state: AppState, version: Version) -> dict[str, Any]:
    content: dict[str, Any]
    if isinstance(version.content, Ensemble):
        content = {"members": [str(member) for member in version.content.members], "rule": version.content.rule}
    else:
        content = {"placement": version.content.placement}
        if version.content.separator is not None:
            content["separator"] = version.content.separator
        if state.engine.shape.is_encoder_decoder:
            content["parts"] = {part: getattr(version.content, f"num_{part}_tokens") for part in PARTS}
    return {
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
