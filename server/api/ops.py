"""For operators: health, readiness, what is served, metrics."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from prefix_store.errors import UnavailableError
from server.api.auth import Asking
from server.api.errors import PROBLEMS, RequestError
from server.api.state import State
from server.api.wire import MAX_STOPS

router = APIRouter(tags=["ops"], responses=PROBLEMS)


@router.get("/healthz", summary="The engine's loop beats")
@router.get("/health", summary="As /healthz", operation_id="health_tgi")
async def healthz(state: State) -> dict[str, str]:
    if not state.engine.is_healthy:
        raise RequestError(503, "the engine's loop has stopped")
    return {"status": "ok"}


@router.get("/readyz", summary="Ready for requests")
async def readyz(state: State) -> dict[str, str]:
    """503 before the model is loaded and the registry seen, and from a stop signal on. Without a shared registry it is
    ready, and says that it goes on with what it saw last; so too where connections had to be refused or given up in
    the last seconds, for want of room or of descriptors."""
    if not state.is_ready:
        raise RequestError(503, "the server is stopping" if state.is_draining else "the server is not ready yet")
    said = {"status": "ready", "registry": "degraded" if state.registry.is_degraded else "ok"}
    return said | ({"connections": "short"} if state.connections.is_short else {})


@router.get("/info", summary="What is served")
async def info(state: State, caller: Asking) -> dict[str, Any]:
    """The model, its fingerprint, what its generation config gives requests, how texts are read, and the limits.
    `tasks` counts the tenant's own tasks, an operator's key all; `tasks_incompatible` those of them that were stored
    for another model."""
    counts = await asyncio.to_thread(state.store.count_tasks, None if caller.is_operator else caller.tenant.name)
    shape, settings, stats = state.engine.shape, state.settings, state.engine.stats()
    return {
        "model_id": shape.model_name,
        "model_aliases": list(shape.model_aliases),
        "model_dtype": str(shape.dtype).removeprefix("torch."),
        "quantize": settings.quantize,
        "special_tokens_in_text": settings.special_tokens_in_text,
        "generation_config": dict(state.defaults.in_force),
        "model_device_type": settings.device.partition(":")[0],
        "fingerprint": shape.fingerprint,
        "tasks": counts.num_tasks,
        "tasks_incompatible": counts.num_incompatible,
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "max_total_tokens": state.engine.max_context,
        "max_input_tokens": state.engine.max_context - 1,
        "max_stop_sequences": MAX_STOPS,
        "max_virtual_tokens": shape.max_virtual_tokens,
        "max_concurrent_requests": settings.max_queued,
        "max_rows": settings.max_rows,
        "max_step_tokens": settings.max_step_tokens,
        "max_upload_bytes": int(settings.max_upload_bytes),
        "block_size": stats.block_size,
        "kv_blocks": stats.kv_blocks_total,
        "prefix_bytes": stats.prefix_bytes_total,
        "version": _own_version(),
    }


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(state: State) -> Response:
    with suppress(UnavailableError):  # the counts stay as they were last seen
        state.metrics.tasks(await asyncio.to_thread(state.store.count_tasks))
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _own_version() -> str:
    try:
        return version("prefixserve")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
