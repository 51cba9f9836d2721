"""`prefixserve registry …`: from one registry to another, and which files belong to a registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.config import Settings
from server.data_folder import BLOBS
from server.options import AsJson, BlobUrl, DataDir, RedisUrl, option
from server.registries import opened
from server.terminal import fail, plain_errors, show

if TYPE_CHECKING:
    from prefix_store.blobs import Blobs
    from prefix_store.registry import Registry

app = typer.Typer(no_args_is_help=True, help="The registry itself: tasks, tenants, keys, audit, usage.")
Place = Annotated[str, typer.Argument(help="A data folder, or redis://HOST:6379/0.")]


@app.callback()
def registry() -> None:
    """The registry itself: tasks, tenants, keys, audit, usage."""


@app.command()
def copy(source: Place, target: Place, as_json: AsJson = False) -> None:
    """Copy all of SOURCE to TARGET, which is empty, while no server writes either. Files of prefixes are not copied:
    give the server on TARGET the --blob-url of SOURCE, whose files it takes over, or copy the folder `blobs`."""
    with plain_errors():
        from prefix_store import registry_copy

        if source == target:
            fail(f"expected two places, got {source} twice")
        with opened(source, creates=False) as one, opened(target, creates=True) as other:
            found = registry_copy.copy(one, other)
        counts = {"tenants": len(found.tenants), "tasks": found.num_tasks, "audit_entries": len(found.audit)}
        show(counts | {"usage_rows": len(found.usage)}, as_json)


@app.command("take-over")
def take_over(
    data_dir: DataDir = None, redis_url: RedisUrl = None, blob_url: BlobUrl = None, as_json: AsJson = False
) -> None:
    """Give the files to this registry, whichever had them before: for a registry that was put back or made anew. Its
    server may then delete files that it does not know; stop servers of the other registry before."""
    with plain_errors(), _places(data_dir, redis_url, blob_url) as (one, blobs):
        from prefix_store import file_owner

        before = file_owner.take_over(one, blobs)
        stored, known = blobs.digests(), one.digests()
        num_known = sum(len(digests & known.get(tenant, set())) for tenant, digests in stored.items())
        num_files, num_wanted = sum(map(len, stored.values())), sum(map(len, known.values()))
        counts = {"files": num_files, "known_files": num_known, "missing_files": num_wanted - num_known}
        show({"root": blobs.url, "registry": one.identity().id, "before": before} | counts, as_json)


@app.command()
def sweep(
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    blob_url: BlobUrl = None,
    every: Annotated[bool, typer.Option("--all", help="However large a share of the files they are.")] = False,
    min_age_s: Annotated[float, option("min-age-s", "Only files as old as this.", min=0)] = 86_400.0,
    grace_s: Annotated[float, option("grace-s", "How long files stay in the trash.", min=0)] = 604_800.0,
    as_json: AsJson = False,
) -> None:
    """Move files that no version refers to into the folder TRASH beside them, and delete what has been there for its
    time, as every start of a server does."""
    with plain_errors(), _places(data_dir, redis_url, blob_url) as (one, blobs):
        from prefix_store.sweep import SweepRules
        from prefix_store.sweep import sweep as sweep_files

        rules = SweepRules(min_age_s, grace_s, 1.0) if every else SweepRules(min_age_s, grace_s)
        show(vars(sweep_files(one, blobs, rules)), as_json)


@contextmanager
def _places(data_dir: Path | None, redis_url: str | None, blob_url: str | None) -> Iterator[tuple[Registry, Blobs]]:
    """The registry and the files of a server with these options."""
    from prefix_store.blobs import Blobs

    given: dict[str, Any] = {"data_dir": data_dir, "redis_url": redis_url, "blob_url": blob_url}
    settings = Settings.model_validate({name: value for name, value in given.items() if value is not None})
    with opened(settings.redis_url or settings.data_dir, creates=False) as one:
        yield one, Blobs(settings.blob_url or settings.data_dir / BLOBS)
