"""Who asks, and what they may: keys to callers, routes to scopes.

While no key is configured everyone on this machine is the tenant `default` and its operator.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
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
from server.api.errors import RequestError, own_path
from server.api.pages import PAGES

PUBLIC = ("/healthz", "/health", "/readyz", *PAGES)
CHALLENGE = {"WWW-Authenticate": "Bearer"}
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
        ("GET", r"/v1/prefixes/.*/versions/[^/]*/file", "upload"),
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
        holder = None if self.key is None else self.tenant.name
        request_id, is_local = request.state.request_id, self.actor == NOBODY
        return Author(self.actor, request_id, holder, is_operator=self.is_operator, needs_no_keys=is_local)

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

    def check_route(self, scope: str, method: str, path: str) -> None:
        """A key needs the scope, but to end itself. Raises RequestError 403."""
        is_own_end = self.key is not None and path == f"/v1/tenants/{self.tenant.name}/keys/{self.key.id}"
        if not (is_own_end and method == "DELETE"):
            self.check_scope(scope)

    @property
    def is_for_every_task(self) -> bool:
        return self.key is None or self.key.covers_tasks(())

    def covers_tasks(self, tenant: str, patterns: Iterable[str]) -> bool:
        """Whether the key is for all tasks that a key of `tenant` with these patterns is for."""
        if self.key is None:
            return True
        if tenant != self.tenant.name:
            patterns = [f"{tenant}/{pattern}" for pattern in patterns] or [f"{tenant}/*"]
        return self.key.covers_tasks(patterns)

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


NOBODY = "local"  # what the audit calls whoever asks while no keys are configured
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

    @property
    def opens_without_keys(self) -> bool:
        """Whether the server would be open if no tenant had a key."""
        return self._is_local and self._operator_digest is None

    @property
    def has_operator(self) -> bool:
        """Whether there is an operator's key in a file, which is not the registry's."""
        return self._operator_digest is not None

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
            return Caller(seen.tenants[DEFAULT_TENANT], NOBODY, LOCAL)
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
        caller.check_route(needed, request.method, own_path(request))
        request.state.caller = caller


Asking = Annotated[Caller, Depends(caller_of)]
