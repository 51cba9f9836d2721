"""The command line. `serve` runs the server; `push`, `list`, … speak HTTP with one; the rest works on files."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, NoReturn

import structlog
import typer
from pydantic import TypeAdapter, ValidationError

from server import file_commands, http_commands, preflight, registry_commands, tenant_commands
from server.config import Settings
from server.logs import set_up_logs
from server.options import option
from server.terminal import console, fail, plain_errors

LOG_JSON = "PREFIXSERVE_LOG_JSON"
log = structlog.get_logger()
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
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Registry and files; none: prefixserve in $XDG_DATA_HOME or ~/.local/share."),
    ] = None,
    redis_url: Annotated[str | None, typer.Option(help="A registry that replicas share: redis://HOST:6379/0.")] = None,
    blob_url: Annotated[str | None, typer.Option(help="Where files are, for fsspec, as s3://BUCKET/FOLDER.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16")] = None,
    device: str | None = None,
    quantize: Annotated[str | None, typer.Option(help="int8: weights and products in 8 bits, on a CPU.")] = None,
    generation_config: Annotated[
        str | None, typer.Option(help="auto: requests have the model's own defaults; none: they have not.")
    ] = None,
    special_tokens_in_text: Annotated[
        str | None, typer.Option(help="allow: control tokens in texts are control tokens; split: they are plain text.")
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
    is_json = _logs_json(log_json)
    set_up_logs(is_json)
    with plain_errors(_fail_in_log if is_json else fail), _collecting_later(), ExitStack() as stack:
        settings = Settings(**given)
        sockets = preflight.check(settings, publish_examples)
        for each in sockets:
            stack.enter_context(each)
        from server import start  # torch and transformers take seconds: what is wrong was told before

        start.run(settings, console, sockets, publish_examples)


def _logs_json(given: bool | None) -> bool:
    """As the settings will say it, for what is wrong with them."""
    with suppress(ValidationError):
        return TypeAdapter(bool).validate_python(os.environ.get(LOG_JSON) or False) if given is None else given
    return False


def _fail_in_log(message: str) -> NoReturn:
    log.error("failed", reason=message)
    raise typer.Exit(1)
