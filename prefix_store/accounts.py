"""The tenants as they are when a change is written: whether its author may still make it, whether a key is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prefix_store.audit import Author
from prefix_store.errors import ConflictError, KeyEndedError, SuspendedError
from prefix_store.tenants import DEFAULT_TENANT, Tenant


@dataclass(frozen=True)
class Accounts:
    """`get` gives the registry's tenant of a name, `every` all tenants."""

    get: Callable[[str], Tenant | None]
    every: Callable[[], Iterable[Tenant]]

    def check_author(self, by: Author) -> None:
        """Whoever was let in with a key may change nothing once the key has ended or its tenant is suspended. Raises
        KeyEndedError, SuspendedError."""
        if by.needs_no_keys and any(tenant.keys for tenant in self.every()):
            raise KeyEndedError("expected a key: the first one was made meanwhile")
        if by.holder is None:
            return
        tenant = self.get(by.holder)
        key = next((key for key in tenant.keys if key.id == by.actor), None) if tenant is not None else None
        if tenant is None or key is None or not key.is_valid(time.time()):
            raise KeyEndedError("this key is unknown or has expired")
        if tenant.is_suspended and not by.is_operator:
            raise SuspendedError(f"tenant {tenant.name!r} is suspended")

    def check_key_left(self, name: str, after: Tenant | None) -> None:
        """Raises ConflictError where no tenant would have a key if the tenant of this name were `after`."""
        others = (tenant for tenant in self.every() if tenant.name != name)
        if not (after is not None and after.keys) and not any(tenant.keys for tenant in others):
            raise ConflictError("expected another key to be left: without any, all on this machine are operators")

    def can_share_with(self, name: str) -> bool:
        """Whether the tenant is there. One that is suspended may be on its way out."""
        found = self.get(name)
        return name == DEFAULT_TENANT if found is None else not found.is_suspended
