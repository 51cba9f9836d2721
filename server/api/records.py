"""What was changed and what was used: the audit and the usage, for operators and, of their own tenant, `admin` keys."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse, Response

from prefix_store.audit import AuditEntry
from prefix_store.usage import FIRST_DAY, LAST_DAY, Usage
from server.api.auth import Asking, Caller
from server.api.errors import PROBLEMS, RequestError, also
from server.api.metering import today
from server.api.state import State

router = APIRouter(prefix="/v1", tags=["records"], responses=PROBLEMS)
Day = Annotated[str | None, Query(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", description="UTC, as 2026-11-25.")]
Name = Annotated[str | None, Query(max_length=64, description="An operator may ask for one tenant; none: all.")]


@router.get("/audit", summary="Who changed what, the last first")
async def audit(
    state: State,
    caller: Asking,
    tenant: Name = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, lt=2**63, description="The last number of the page before.")] = None,
) -> dict[str, Any]:
    whose = _whose(caller, tenant)
    entries: list[AuditEntry] = []
    while len(entries) <= limit:
        found = await state.remotely(state.registry.list_audit, whose, limit + 1, before)
        entries += [entry for entry in found if _sees(caller, entry)]
        if len(found) <= limit:
            break
        before = found[-1].number
    page = entries[:limit]
    return {
        "entries": [_shown(caller, entry) for entry in page],
        "next": page[-1].number if len(entries) > limit else None,
    }


@router.get("/usage", summary="What was used, by day, tenant, task and version", responses=also("text/csv"))
async def usage(
    state: State,
    caller: Asking,
    tenant: Name = None,
    first_day: Day = None,
    last_day: Day = None,
    format: Annotated[Literal["json", "csv"] | None, Query(description="None: as Accept has it.")] = None,
    accept: Annotated[str, Header(max_length=1000)] = "",
) -> Response:
    """From `first_day` to `last_day`, both included; neither: today. Up to some seconds ago."""
    if first_day is None and last_day is None:
        first_day = last_day = today()
    await state.meter.flush()
    every = await state.remotely(
        state.registry.usage, _whose(caller, tenant), first_day or FIRST_DAY, last_day or LAST_DAY
    )
    rows = [row for row in every if caller.allows_task(_task_of(caller, row))]
    if format == "json" or (format is None and "text/csv" not in accept):
        return JSONResponse({"usage": [asdict(row) for row in rows]})
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Usage)])
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return Response(text.getvalue(), media_type="text/csv")


def _sees(caller: Caller, entry: AuditEntry) -> bool:
    """A key that is for some tasks sees what was done to them, not to the tenant or its keys."""
    if caller.is_for_every_task:
        return True
    return entry.task is not None and caller.allows_task(f"{entry.tenant}/{entry.task}")


def _shown(caller: Caller, entry: AuditEntry) -> dict[str, Any]:
    """The key of an operator is another tenant's: only operators see which one it was."""
    is_hidden = entry.by_operator and not caller.is_operator
    return asdict(replace(entry, actor="operator") if is_hidden else entry)


def _task_of(caller: Caller, row: Usage) -> str | None:
    """What the caller calls it; None: the bare model."""
    is_own = row.tenant == caller.tenant.name or "/" in row.task
    return (row.task if is_own else f"{row.tenant}/{row.task}") if row.task else None


def _whose(caller: Caller, tenant: str | None) -> str | None:
    """None: everybody's. Raises RequestError 403 for another's."""
    if caller.is_operator:
        return tenant
    if tenant not in (None, caller.tenant.name):
        raise RequestError(403, "only an operator sees other tenants' records")
    return caller.tenant.name
