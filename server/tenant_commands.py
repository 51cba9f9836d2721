"""`prefixserve tenant …`: works on the registry itself, so whoever may read the data folder needs no key. A server that
runs on it sees every change within a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.config import Settings
from server.options import AsJson, Create, DataDir, RedisUrl, option
from server.registries import opened
from server.terminal import console, plain_errors, print_json, print_table, show

if TYPE_CHECKING:
    from prefix_store.audit import AuditEntry, Author
    from prefix_store.tenants import Limits, Tenant

MISSING = "; give the --data-dir or --redis-url of the server"
OR_CREATE = ", or --create for a new one"
app = typer.Typer(no_args_is_help=True, help="Tenants, their keys and limits, in the registry itself.")
Given = Annotated[
    list[str] | None,
    option("limit", "NAME=NUMBER as weight=2 or tokens_per_minute=60000; NAME=none: without. Repeatable."),
]


@app.command()
def create(
    name: str,
    limit: Given = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    create: Create = False,
    as_json: AsJson = False,
) -> None:
    """Make a tenant; its key stands alone on the last line. One that is there stays as it is."""
    with plain_errors():
        from prefix_store.tenants import SCOPES, new_key, new_tenant

        text, key = new_key(SCOPES, time.time())
        made = new_tenant(name)
        limits = _limits(made.limits, limit or [])

        def change(found: Tenant | None) -> Tenant:
            return found or replace(made, limits=limits, keys=(key,))

        place = _place(data_dir, redis_url)
        tenant = _change(place, create, name, change, lambda made: "create-tenant" if key in made.keys else None)
        is_new = key in tenant.keys
        if as_json:
            print_json(tenant.described() | ({"key": text} if is_new else {}))
        elif is_new:
            console.print(f"tenant {name}; its key, which is shown this once:", markup=False, highlight=False)
            print(text)
        else:
            console.print(f"tenant {name} is there already; `tenant rotate` makes a key", markup=False, highlight=False)


@app.command("list")
def list_tenants(data_dir: DataDir = None, redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """All tenants."""
    with plain_errors():
        with opened(_place(data_dir, redis_url), creates=False, hint=MISSING) as registry:
            tenants = registry.list_tenants()
        if as_json:
            print_json([tenant.described() for tenant in tenants])
            return
        rows = [
            (t.name, "suspended" if t.is_suspended else "active", len(t.keys), t.limits.weight, _given(t.limits))
            for t in tenants
        ]
        print_table(("tenant", "state", "keys", "weight", "limits"), rows)


@app.command()
def limits(
    name: str,
    limit: Given = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    create: Create = False,
    as_json: AsJson = False,
) -> None:
    """Show a tenant's limits, or set those that are given."""
    with plain_errors():
        from prefix_store.tenants import known_tenant

        def change(found: Tenant | None) -> Tenant:
            tenant = known_tenant(name, found)
            return replace(tenant, limits=_limits(tenant.limits, limit or []))

        place = _place(data_dir, redis_url)
        tenant = _change(place, create, name, change, lambda _: "set-limits" if limit else None)
        show(asdict(tenant.limits), as_json)


@app.command()
def rotate(
    name: str,
    overlap_s: Annotated[float, option("overlap-s", "How long the keys before go on working.", min=0)] = 3600.0,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    create: Create = False,
    as_json: AsJson = False,
) -> None:
    """Make a key with a tenant's four scopes, alone on the last line; its keys before end after the overlap."""
    with plain_errors():
        from prefix_store.tenants import SCOPES, known_tenant, new_key

        now_s = time.time()
        text, key = new_key(SCOPES, now_s)

        def change(found: Tenant | None) -> Tenant:
            tenant = known_tenant(name, found)
            return tenant.with_expiry([each.id for each in tenant.keys], now_s + overlap_s).with_key(key, now_s)

        tenant = _change(_place(data_dir, redis_url), create, name, change, lambda _: "rotate-keys")
        if as_json:
            print_json(tenant.described() | {"key": text})
        else:
            console.print(f"tenant {name}; its key, which is shown this once:", markup=False, highlight=False)
            print(text)


@app.command()
def suspend(
    name: str,
    undo: Annotated[bool, option("undo", "Take its keys again.")] = False,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    create: Create = False,
    as_json: AsJson = False,
) -> None:
    """Refuse all keys of a tenant."""
    with plain_errors():
        from prefix_store.tenants import known_tenant

        tenant = _change(
            _place(data_dir, redis_url),
            create,
            name,
            lambda found: replace(known_tenant(name, found), is_suspended=not undo),
            lambda _: "resume" if undo else "suspend",
        )
        show(tenant.described(), as_json)


@app.command()
def rm(name: str, data_dir: DataDir = None, redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """Delete a tenant with its keys and tasks. Its files go to the trash when they are unused for a day, at a start of
    the server or by `registry sweep`."""
    with plain_errors():
        with opened(_place(data_dir, redis_url), creates=False, hint=MISSING) as registry:
            gone = registry.delete_tenant(name, by=_author())
        if as_json:
            print_json({"name": name, "num_versions": len(gone)})


def _place(data_dir: Path | None, redis_url: str | None) -> str | Path:
    """Where the registry is: as `serve` with these options, or with none, has it."""
    if redis_url is not None:
        return redis_url
    given: dict[str, Any] = {} if data_dir is None else {"data_dir": data_dir}
    return Settings(**given).data_dir


def _change(
    place: str | Path,
    creates: bool,
    name: str,
    change: Callable[[Tenant | None], Tenant],
    action: Callable[[Tenant], str | None],
) -> Tenant:
    """`action` is what the audit calls it, None: nothing was done."""
    by = _author()

    def record(made: Tenant | None) -> Iterator[AuditEntry]:
        assert made is not None
        done = action(made)
        if done is not None:
            yield by.entry(name, done, name)

    with opened(place, creates=creates, hint=MISSING + OR_CREATE) as registry:
        tenant = registry.update_tenant(name, change, record)
    assert tenant is not None
    return tenant


def _author() -> Author:
    from prefix_store.audit import Author

    return Author("cli")


def _limits(before: Limits, given: list[str]) -> Limits:
    """Checked as the server checks them. Raises pydantic's ValidationError, InvalidTenantError."""
    from prefix_store.errors import InvalidTenantError
    from prefix_store.tenants import Limits
    from server.api.tenant_schemas import LimitsModel

    values: dict[str, Any] = asdict(before)
    for each in given:
        name, equals, text = each.partition("=")
        if name not in values or not equals:
            raise InvalidTenantError(f"a limit is NAME=NUMBER with NAME of {', '.join(values)}, got {each[:80]!r}")
        try:
            values[name] = None if text == "none" else float(text) if name == "weight" else int(text)
        except ValueError as error:
            raise InvalidTenantError(f"{name} must be a number or none, got {text[:40]!r}") from error
    return Limits(**LimitsModel(**values).model_dump())


def _given(limits: Limits) -> str:
    """Those that differ from a new tenant's."""
    usual = asdict(type(limits)())
    return ", ".join(f"{name}={value}" for name, value in asdict(limits).items() if value != usual[name])
