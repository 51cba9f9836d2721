"""Who changed what: append-only entries."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class AuditEntry:
    """`tenant` is whose thing was changed; `actor` a key's id, `operator`, `local` (no keys configured), `cli` (on the
    registry itself) or `server` (a quarantine, an example); `subject` a task, `T@V`, a key's id or a tenant. `number`
    counts up over all tenants; 0: not appended yet."""

    tenant: str
    actor: str
    action: str
    subject: str
    at_s: float
    request_id: str = ""
    number: int = 0


@dataclass(frozen=True)
class Author:
    """Who makes a change, as its entry names it."""

    actor: str
    request_id: str = ""

    def entry(self, tenant: str, action: str, subject: str) -> AuditEntry:
        return AuditEntry(tenant, self.actor, action, subject, time.time(), self.request_id)


SERVER = Author("server")


def no_entries(_: object) -> tuple[AuditEntry, ...]:
    return ()
