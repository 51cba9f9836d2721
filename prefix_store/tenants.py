"""Who may ask: tenants, their keys and their limits. A key's text is never kept, only its sha256."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prefix_store import task_patterns
from prefix_store.errors import ConflictError, InvalidTenantError, NotFoundError
from prefix_store.names import TASK
from prefix_store.printable import first_unprintable

DEFAULT_TENANT = "default"
SCOPES = ("generate", "upload", "publish", "admin")  # of a tenant
OPERATOR_SCOPES = ("metrics", "operator")  # of nobody's tasks
KEY_BYTES = 32
MAX_KEYS = 64
MAX_PATTERNS = 32
MAX_PATTERN = 64


@dataclass(frozen=True)
class Limits:
    """None: without one. A minute's are refilled steadily; sizes are bytes. `max_queued` counts requests that have no
    token yet, `max_rows` rows that run at once, `max_prefixes` stored versions, `max_versions` those of one task: each
    change and look-up of a task reads all of them."""

    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    uploads_per_minute: int | None = None
    max_rows: int | None = None
    max_queued: int | None = None
    max_prefixes: int | None = None
    max_versions: int | None = 256
    max_stored_bytes: int | None = None
    max_resident_bytes: int | None = None
    max_pinned_bytes: int | None = 0
    max_virtual_tokens: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Key:
    """`digest` is the sha256 of the key's text, `id` what people call it by. `tasks` are patterns as `films-*`; none:
    every task and the bare model."""

    id: str
    digest: str
    scopes: tuple[str, ...]
    created_at_s: float
    tasks: tuple[str, ...] = ()
    expires_at_s: float | None = None

    def is_valid(self, now_s: float) -> bool:
        return self.expires_at_s is None or now_s < self.expires_at_s

    def described(self) -> dict[str, Any]:
        """All but its digest."""
        return {name: value for name, value in asdict(self).items() if name != "digest"}

    def allows_task(self, task: str | None) -> bool:
        """None: the bare model, which only `*` and a key without patterns allow. Of `owner/T` the whole is matched."""
        return not self.tasks or any(task_patterns.matches(pattern, task or "") for pattern in self.tasks)

    def covers_tasks(self, patterns: Iterable[str]) -> bool:
        """Whether the key is for all that these patterns match; none: every task."""
        wanted = tuple(patterns) or (task_patterns.ALL,)
        own = self.tasks or (task_patterns.ALL,)
        return all(any(task_patterns.covers(each, pattern) for each in own) for pattern in wanted)


@dataclass(frozen=True)
class Tenant:
    """`revision` counts the tenant's own changes."""

    name: str
    limits: Limits = field(default_factory=Limits)
    keys: tuple[Key, ...] = ()
    is_suspended: bool = False
    revision: int = 0

    def described(self) -> dict[str, Any]:
        """All but what could tell a key."""
        return {
            "name": self.name,
            "suspended": self.is_suspended,
            "limits": asdict(self.limits),
            "keys": [key.described() for key in self.keys],
            "revision": self.revision,
        }

    def key(self, key_id: str) -> Key:
        """Raises NotFoundError."""
        found = next((key for key in self.keys if key.id == key_id), None)
        if found is None:
            raise NotFoundError(f"tenant {self.name!r} has no key {key_id[:80]!r}")
        return found

    def with_key(self, key: Key, now_s: float) -> Tenant:
        """Expired ones go. Raises ConflictError beyond `MAX_KEYS`."""
        kept = tuple(each for each in self.keys if each.is_valid(now_s))
        if len(kept) >= MAX_KEYS:
            raise ConflictError(f"a tenant has <= {MAX_KEYS} keys, {self.name!r} has {len(kept)}; delete one first")
        return replace(self, keys=(*kept, key))

    def without_key(self, key_id: str) -> Tenant:
        """Raises NotFoundError."""
        gone = self.key(key_id)
        return replace(self, keys=tuple(key for key in self.keys if key is not gone))

    def with_expiry(self, key_ids: Iterable[str], expires_at_s: float) -> Tenant:
        """These keys end then, those that end before stay as they are."""
        ids = set(key_ids)

        def ending(key: Key) -> Key:
            if key.id not in ids or not key.is_valid(expires_at_s):
                return key
            return replace(key, expires_at_s=expires_at_s)

        return replace(self, keys=tuple(map(ending, self.keys)))


# Who asks while no keys are configured, and whom `serve --publish-examples` publishes for.
DEFAULT = Tenant(DEFAULT_TENANT, Limits(max_pinned_bytes=None))


def new_tenant(name: str) -> Tenant:
    """As it is before anything was set. Raises InvalidTenantError."""
    return DEFAULT if check_tenant_name(name) == DEFAULT_TENANT else Tenant(name)


def known_tenant(name: str, found: Tenant | None) -> Tenant:
    """What the registry has of it; `default` is a tenant also before it has any of it. Raises NotFoundError."""
    if found is not None:
        return found
    if name != DEFAULT_TENANT:
        raise NotFoundError(f"no tenant {name[:80]!r}")
    return DEFAULT


def changed_from(before: Tenant | None, after: Tenant | None) -> Tenant | None:
    """The tenant with the revision of this change."""
    return after and replace(after, revision=1 if before is None else before.revision + 1)


def is_tenant_name(text: str) -> bool:
    return TASK.fullmatch(text) is not None


def check_tenant_name(text: str) -> str:
    """Raises InvalidTenantError."""
    if not is_tenant_name(text):
        raise InvalidTenantError(f"a tenant is [a-z0-9][a-z0-9._-]{{0,63}}, got {text[:80]!r}")
    return text


def new_key(
    scopes: Iterable[str], now_s: float, *, tasks: Iterable[str] = (), expires_at_s: float | None = None
) -> tuple[str, Key]:
    """A key's text, which nobody can find out again, and what is kept of it. Raises InvalidTenantError."""
    wanted, patterns = tuple(dict.fromkeys(scopes)), tuple(dict.fromkeys(tasks))
    known = (*SCOPES, *OPERATOR_SCOPES)
    if not wanted or (unknown := set(wanted) - set(known)):
        got = ", ".join(sorted(unknown)) if wanted else "none"
        raise InvalidTenantError(f"scopes must be some of {', '.join(known)}, got {got[:200]}")
    if len(patterns) > MAX_PATTERNS or not all(0 < len(pattern) <= MAX_PATTERN for pattern in patterns):
        raise InvalidTenantError(f"tasks must be <= {MAX_PATTERNS} patterns of 1 to {MAX_PATTERN} characters each")
    for pattern in patterns:
        if found := first_unprintable(pattern):
            raise InvalidTenantError(f"tasks must be patterns of printable characters, got {found}")
    text = f"ps_{secrets.token_urlsafe(KEY_BYTES)}"
    return text, Key(secrets.token_hex(6), key_digest(text), wanted, now_s, patterns, expires_at_s)


def key_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_key(text: str, digest: str) -> bool:
    """In constant time."""
    return hmac.compare_digest(key_digest(text), digest)
