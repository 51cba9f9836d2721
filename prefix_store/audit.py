"""Who changed what: append-only entries."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

TASK_ACTIONS = frozenset(
    {
        *("publish", "publish-known", "accept-base", "match-base", "note", "activate", "delete"),
        *("pin", "unpin", "enable", "disable", "share", "quarantine"),
    }
)
TASK_NAME = re.compile("[@ ]")  # what ends it in a subject as `T@V` or `T with south`


@dataclass(frozen=True)
class AuditEntry:
    """`tenant` is whose thing was changed; `actor` a key's id, `operator`, `local` (no keys configured), `cli` (on the
    registry itself) or `server` (a quarantine, an example); `subject` a task, `T@V`, a key's id or a tenant. `number`
    counts up in the list that the entry was read from: its tenant's, or that of all tenants; 0: not appended yet.
    `by_operator`: `actor` is the key of an operator, whom the tenant need not know."""

    tenant: str
    actor: str
    action: str
    subject: str
    at_s: float
    request_id: str = ""
    number: int = 0
    by_operator: bool = False

    @property
    def task(self) -> str | None:
        """The tenant's task that was changed; None: its keys or the tenant itself were."""
        return TASK_NAME.split(self.subject, maxsplit=1)[0] if self.action in TASK_ACTIONS else None


@dataclass(frozen=True)
class Author:
    """Who makes a change, as its entry names it. `holder` is the tenant that has the key `actor`, which must be there
    when the change is written; None: the registry knows no such key. Who `needs_no_keys` may change something only
    while no tenant has any."""

    actor: str
    request_id: str = ""
    holder: str | None = None
    is_operator: bool = False
    needs_no_keys: bool = False

    def entry(self, tenant: str, action: str, subject: str) -> AuditEntry:
        by_operator = self.is_operator and self.holder is not None
        return AuditEntry(tenant, self.actor, action, subject, time.time(), self.request_id, by_operator=by_operator)

    @property
    def let_in(self) -> Author:
        """The same author for the rest of a change whose first part was allowed."""
        return replace(self, holder=None, needs_no_keys=False)


SERVER = Author("server")


def no_entries(_: object) -> tuple[AuditEntry, ...]:
    return ()
