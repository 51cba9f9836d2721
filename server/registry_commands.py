"""`prefixserve registry copy`: from one registry to another, while no server writes either."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.options import AsJson
from server.terminal import fail, plain_errors, show

if TYPE_CHECKING:
    from prefix_store.registry import Registry

app = typer.Typer(no_args_is_help=True, help="The registry itself: tasks, tenants, keys, audit, usage.")
Place = Annotated[str, typer.Argument(help="A data folder, or redis://HOST:6379/0.")]


@app.callback()
def registry() -> None:
    """The registry itself: tasks, tenants, keys, audit, usage."""


@app.command()
def copy(source: Place, target: Place, as_json: AsJson = False) -> None:
    """Copy all of SOURCE to TARGET, which is empty. Files of prefixes are not copied: give both servers the same
    --blob-url, or copy the folder `blobs`."""
    with plain_errors():
        from prefix_store import registry_copy  # torch takes seconds

        if source == target:
            fail(f"expected two places, got {source} twice")
        one = _open(source, must_be_there=True)
        other = _open(target)
        try:
            found = registry_copy.copy(one, other)
        finally:
            one.close()
            other.close()
        counts = {"tenants": len(found.tenants), "tasks": found.num_tasks, "audit_entries": len(found.audit)}
        show(counts | {"usage_rows": len(found.usage)}, as_json)


def _open(place: str, *, must_be_there: bool = False) -> Registry:
    from prefix_store.redis_registry import RedisRegistry
    from prefix_store.sqlite_registry import SqliteRegistry

    if "://" in place:
        return RedisRegistry(place)
    path = Path(place) / "registry.sqlite"
    if must_be_there and not path.is_file():
        fail(f"expected a data folder with {path.name}, found none in {place}")
    return SqliteRegistry(path)
