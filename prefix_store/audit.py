"""Who changed what: append-only entries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AuditEntry:
    """`tenant` is whose thing was changed; `actor` a key's id, `operator`, `local` (no keys configured), `cli` (on the
    registry itself) or `server` (a quarantine); `subject` a task, `T@V`, a key's id or a tenant. `number` counts up
    over all tenants; 0: not appended yet."""

    tenant: str
    actor: str
    action: str
    subject: str
    at_s: float
    request_id: str = ""
    number: int = 0
