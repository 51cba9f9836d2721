"""What one tenant may take of the engine, and its weight among the others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TenantPolicy:
    """`weight` is the tenant's part, against those of others, of what they contend for. A limit of None is the engine's
    own: `max_rows` at once, `max_queued` requests without a first token, `max_resident_bytes` of its prefixes on the
    device, whoever uses them."""

    weight: float = 1.0
    max_rows: int | None = None
    max_queued: int | None = None
    max_resident_bytes: int | None = None

    def __post_init__(self) -> None:
        assert self.weight > 0
        assert self.max_rows is None or self.max_rows >= 1
        assert self.max_queued is None or self.max_queued >= 0
        assert self.max_resident_bytes is None or self.max_resident_bytes >= 0


DEFAULT_POLICY = TenantPolicy()


class TenantPolicies:
    """By tenant; one that has none has the default. May be set from any thread: whoever reads sees the old or the new
    policy as a whole."""

    def __init__(self) -> None:
        self._policies: dict[str, TenantPolicy] = {}

    def set(self, tenant_id: str, policy: TenantPolicy | None) -> None:
        """None: forget the tenant."""
        if policy is None:
            self._policies.pop(tenant_id, None)
        else:
            self._policies[tenant_id] = policy

    def of(self, tenant_id: str) -> TenantPolicy:
        return self._policies.get(tenant_id, DEFAULT_POLICY)
