"""`prefixserve registry copy`: from one registry to another, while no server writes either."""

from __future__ import annotations

from typing import Annotated

import typer

from server.options import AsJson
from server.registries import opened
from server.terminal import fail, plain_errors, show

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
        from prefix_store import registry_copy

        if source == target:
            fail(f"expected two places, got {source} twice")
        with opened(source, creates=False) as one, opened(target, creates=True) as other:
            found = registry_copy.copy(one, other)
        counts = {"tenants": len(found.tenants), "tasks": found.num_tasks, "audit_entries": len(found.audit)}
        show(counts | {"usage_rows": len(found.usage)}, as_json)
