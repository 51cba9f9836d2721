"""Who asks, and what they may: keys to callers, routes to scopes.

While no key is configured everyone on this machine is the tenant `default` and its operator.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from prefix_store.audit import Author
from prefix_store.registry import Registry
from prefix_store.tenants import (
    DEFAULT,
    DEFAULT_TENANT,
    OPERATOR_SCOPES,
    SCOPES,
    Key,
    Limits,
    Tenant,
    is_key,
    key_digest,
)
from server.api.errors import RequestError
from server.errors import StartError

PUBLIC = ("/healthz", "/health", "/readyz")
MIN_OPERATOR_KEY = 32  # characters
CHALLENGE = {"WWW-Authenticate": "Bearer"}
LOCAL_ACTOR = "local"  # whoever asks while no keys are configured
ANY = "any"  # whatever scope of a tenant
GENERATING = r"/|/generate|/generate_stream|/v1/completions|/v1/chat/completions"
# The first that matches decides. Of a path that matches none the router says to any key that it is not there; a route
# that matches none is an operator's.
RULES = tuple(
    (frozenset(methods.split()), re.compile(path), scope)
    for methods, path, scope in (
        ("GET", r"/metrics", "metrics"),
        ("POST", GENERATING, "generate"),
        ("PUT", r"/v1/prefixes/.*", "upload"),
        ("GET", r"/v1/prefixes/.*/file", "upload"),
        ("POST DELETE", r"/v1/prefixes/.*", "publish"),
        ("GET", r"/v1/tenants/[^/]*|/v1/audit|/v1/usage", "admin"),
        ("POST DELETE", r"/v1/tenants/[^/]*/keys(/.*)?", "admin"),
        ("GET PUT POST DELETE", r"/v1/tenants.*", "operator"),
        ("GET", r"/info|/v1/models(/.*)?|/v1/prefixes(/.*)?", ANY),
    )
)


def needed_scope(method: str, path: str, *, otherwise: str = ANY) -> str | None:
    """None: public; `otherwise` where no rule matches."""
    if path in PUBLIC:
        return None
    method = "GET" if method == "HEAD" else method
    return next((scope for methods, rule, scope in RULES if method in methods and rule.fullmatch(path)), otherwise)


@dataclass(frozen=True)
class Caller:
    """`actor` is what the audit calls them: a key's id, `operator`, or `local` while no keys are configured."""

    tenant: Tenant
    actor: str
    scopes: frozenset[str]
    key: Key | None = None

    def author(self, request: Request) -> Author:
        """Of what this request changes."""
        return Author(self.actor, request.state.request_id)

    @property
    def is_operator(self) -> bool:
        return "operator" in self.scopes

    def may(self, scope: str) -> bool:
        if self.is_operator:
            return True
        return bool(self.scopes & set(SCOPES)) if scope == ANY else scope in self.scopes

    def check_scope(self, scope: str) -> None:
        """Raises RequestError 403."""
        if not self.may(scope):
            raise RequestError(403, f"this key may {', '.join(sorted(self.scopes))}; {scope} is needed")

    def allows_task(self, task: str | None) -> bool:
        """`OWNER/T` of its own is `T`."""
        name = task and task.removeprefix(f"{self.tenant.name}/")
        return self.key is None or self.key.allows_task(name)

    def check_task(self, task: str | None) -> None:
        """Raises RequestError 403, before it is looked up."""
        if not self.allows_task(task):
            assert self.key is not None
            what = "the bare model" if task is None else f"task {task[:80]!r}"
            raise RequestError(403, f"this key is for {', '.join(self.key.tasks)}, not for {what}")


LOCAL = frozenset((*SCOPES, *OPERATOR_SCOPES))


@dataclass(frozen=True)
class Seen:
    """Tenants by name, and by each key's digest the name of the one that has it."""

    revision: int
    tenants: dict[str, Tenant]
    owners: dict[str, str]


class KeyRing:
    """The tenants and keys of the registry, as they were when `refresh` was last called. A server that `is_local`
    needs none."""

    def __init__(self, registry: Registry, operator_key: str | None = None, *, is_local: bool = True) -> None:
        self._registry = registry
        self._is_local = is_local
        self._operator_digest = None if operator_key is None else key_digest(operator_key)
        self._refreshing = threading.Lock()
        self._seen = Seen(-1, {}, {})  # replaced in one go: the event loop reads while a thread refreshes
        self.refresh()

    def refresh(self) -> None:
        """Read the registry if it changed. It blocks."""
        with self._refreshing:  # or one that read earlier would put back what it read
            revision = self._registry.tenants_revision()
            if revision == self._seen.revision:
                return
            tenants = {DEFAULT_TENANT: DEFAULT} | {tenant.name: tenant for tenant in self._registry.list_tenants()}
            owners = {key.digest: tenant.name for tenant in tenants.values() for key in tenant.keys}
            self._seen = Seen(revision, tenants, owners)

    @property
    def revision(self) -> int:
        """Of what was read last."""
        return self._seen.revision

    @property
    def has_keys(self) -> bool:
        """One that has expired counts until it is deleted."""
        return self._operator_digest is not None or bool(self._seen.owners)

    def is_last(self, tenant: Tenant) -> bool:
        """Whether the server is open without this tenant's one key."""
        owners = set(self._seen.owners.values())
        return self._is_local and self._operator_digest is None and owners == {tenant.name} and len(tenant.keys) == 1

    @property
    def is_open(self) -> bool:
        """Everyone on this machine may ask. Never where others reach the server, whatever became of its keys."""
        return self._is_local and not self.has_keys

    @property
    def tenants(self) -> dict[str, Tenant]:
        return self._seen.tenants

    def limits(self, tenant: str) -> Limits:
        """Of one that is not there, a new one's."""
        return self._seen.tenants.get(tenant, Tenant(tenant)).limits

    def caller(self, authorization: str | None) -> Caller:
        """Raises RequestError 401 for a key that is missing, unknown or expired, 403 for a suspended tenant."""
        seen = self._seen
        if self.is_open:
            return Caller(seen.tenants[DEFAULT_TENANT], LOCAL_ACTOR, LOCAL)
        kind, _, text = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not text:
            raise RequestError(401, "expected a key, as Authorization: Bearer KEY", headers=CHALLENGE)
        text = text.strip()
        if self._operator_digest is not None and is_key(text, self._operator_digest):
            return Caller(seen.tenants[DEFAULT_TENANT], "operator", LOCAL)
        digest = key_digest(text)
        tenant = seen.tenants.get(seen.owners.get(digest, ""))
        key = next((key for key in tenant.keys if is_key(text, key.digest)), None) if tenant else None
        if tenant is None or key is None or not key.is_valid(time.time()):
            raise RequestError(401, "this key is unknown or has expired", headers=CHALLENGE)
        if tenant.is_suspended and "operator" not in key.scopes:
            raise RequestError(403, f"tenant {tenant.name!r} is suspended")
        return Caller(tenant, key.id, frozenset(key.scopes), key)


def read_operator_key(path: Path | None) -> str | None:
    """The key in a file, without the line's end. Raises StartError."""
    if path is None:
        return None
    try:
        key = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"operator_key_file must be a file with a key, {path}: {error}") from error
    if len(key) < MIN_OPERATOR_KEY or not key.isprintable() or " " in key:
        raise StartError(
            f"operator_key_file must hold one key of {MIN_OPERATOR_KEY} characters or more, {path} has {len(key)}"
        )
    return key


async def caller_of(request: Request) -> Caller:
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


async def check_again(request: Request) -> None:
    """When the body is there, which may take long: by the keys as they are now, and by the route's own path, whatever
    the router took for it. Raises RequestError as the gate does."""
    needed = needed_scope(request.method, request.scope["route"].path, otherwise="operator")
    if needed is not None:
        caller = request.app.state.prefixserve.keys.caller(request.headers.get("authorization"))
        caller.check_scope(needed)
        request.state.caller = caller


Asking = Annotated[Caller, Depends(caller_of)]
