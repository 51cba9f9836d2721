"""Options that several commands take; each also from `PREFIXSERVE_…`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from server.config import Settings

LOCAL = "http://127.0.0.1:8000"


def option(name: str, text: str | None = None, *, min: float | None = None) -> Any:
    """`--name`, also from `PREFIXSERVE_NAME`."""
    return typer.Option(f"--{name}", envvar=f"PREFIXSERVE_{name.upper().replace('-', '_')}", help=text, min=min)


Url = Annotated[str, option("url", "The server.")]
ApiKey = Annotated[str | None, option("api-key")]
AsJson = Annotated[bool, option("json", "Machine-readable output.")]
ModelOption = Annotated[str | None, option("model", "Folder or hub name; none: the default.")]
Index = Annotated[int | None, option("index", "One task of a multitask file.")]
AcceptBase = Annotated[bool, option("accept-base", "Although it names another base model, a path or none.")]
BaseFolder = Annotated[
    str | None,
    option("base-folder", "The model that it was trained for, in a folder; none: the folder that the file names."),
]
DataDir = Annotated[Path | None, option("data-dir", "The server's.")]
RedisUrl = Annotated[str | None, option("redis-url", "The registry that replicas share; none: in --data-dir.")]
BlobUrl = Annotated[str | None, option("blob-url", "Where files are, for fsspec; none: in --data-dir.")]
Create = Annotated[bool, option("create", "Make the registry where there is none yet.")]


def settings_of(model: str | None, max_virtual_tokens: int | None = None) -> Settings:
    """As `serve` would have them, with the environment's."""
    given = {"model": model, "max_virtual_tokens": max_virtual_tokens}
    return Settings.model_validate({name: value for name, value in given.items() if value is not None})
