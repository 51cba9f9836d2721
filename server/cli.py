"""The command line. `serve` runs the server; `push`, `list`, … speak HTTP with one; the rest works on files."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from server import file_commands, http_commands, registry_commands, tenant_commands
from server.config import Settings
from server.options import option
from server.terminal import console, plain_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for commands in (http_commands, file_commands):
    app.add_typer(commands.app)
app.add_typer(file_commands.model_app, name="model")
app.add_typer(tenant_commands.app, name="tenant")
app.add_typer(registry_commands.app, name="registry")


@contextmanager
def _collecting_later() -> Iterator[None]:
    """Nothing that a start makes is rubbish: looking for it again and again takes a sixth of the imports' time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Without any key: a loopback address.")] = None,
    port: int | None = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name; none: the default model.")] = None,
    model_name: str | None = None,
    model_alias: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    model_revision: str | None = None,
    data_dir: Path | None = None,
    redis_url: Annotated[str | None, typer.Option(help="A registry that replicas share: redis://HOST:6379/0.")] = None,
    blob_url: Annotated[str | None, typer.Option(help="Where files are, for fsspec, as s3://BUCKET/FOLDER.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16")] = None,
    device: str | None = None,
    quantize: Annotated[str | None, typer.Option(help="int8: weights and products in 8 bits, on a CPU.")] = None,
    generation_config: Annotated[
        str | None, typer.Option(help="auto: requests have the model's own defaults; none: they have not.")
    ] = None,
    kv_bytes: Annotated[str | None, typer.Option(help="As 2GiB.")] = None,
    prefix_bytes: str | None = None,
    max_rows: int | None = None,
    max_step_tokens: int | None = None,
    max_queued: int | None = None,
    max_queue_s: float | None = None,
    max_virtual_tokens: int | None = None,
    max_upload_bytes: str | None = None,
    root_path: Annotated[str | None, typer.Option(help="The prefix that a proxy serves this server behind.")] = None,
    cors_allow_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask, or *; may be given several times.")
    ] = None,
    max_connections: Annotated[int | None, typer.Option(help="At once; fewer where descriptors are short.")] = None,
    max_connections_per_peer: Annotated[
        int | None, typer.Option(help="Of one address; none: 512, but of this machine all.")
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None, typer.Option(help="An address or network that may have more; may be given several times.")
    ] = None,
    max_requests_per_key: Annotated[int | None, typer.Option(help="At once; none: max_rows and max_queued.")] = None,
    operator_key_file: Annotated[Path | None, typer.Option(help="A file with one operator's key.")] = None,
    log_json: bool | None = None,
    publish_examples: Annotated[
        Path | None, option("publish-examples", "A folder of PEFT folders, published at start.")
    ] = None,
) -> None:
    """Serve; without keys on loopback only. Fetches the default model if it is missing.

    Every option is also `PREFIXSERVE_…`.
    """
    given = {k: v for k, v in locals().items() if v not in (None, []) and k != "publish_examples"}
    with plain_errors(), _collecting_later():
        settings = Settings(**given)
        from server import start  # torch and transformers take seconds; the other commands do without

        start.run(settings, console, publish_examples)
