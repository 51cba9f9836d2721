"""The command line. `serve` runs the server; `push`, `list`, … speak HTTP with one; the rest works on files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from prefix_store.errors import PrefixStoreError
from server.client import Client, ClientError
from server.config import Settings
from server.engine.errors import EngineError
from server.errors import StartError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
model_app = typer.Typer(no_args_is_help=True, help="The served model's files.")
app.add_typer(model_app, name="model")
console = Console(stderr=True)

Url = Annotated[str, typer.Option("--url", envvar="PREFIXSERVE_URL", help="The server.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="PREFIXSERVE_API_KEY")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", envvar="PREFIXSERVE_MODEL", help="Folder or hub name; none: the default.")
]
LOCAL = "http://127.0.0.1:8000"


@contextmanager
def plain_errors() -> Iterator[None]:
    """An expected failure is one line and exit code 1."""
    try:
        yield
    except (StartError, PrefixStoreError, EngineError, ClientError) as error:
        fail(str(error))
    except ValidationError as error:
        fail("; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()))


def fail(message: str) -> NoReturn:
    console.print(f"[red]error:[/red] {message}", highlight=False, markup=True, soft_wrap=True)
    raise typer.Exit(1)


def show(value: Any, as_json: bool) -> None:
    """A record as JSON, or as `name: value` lines."""
    if as_json:
        print(json.dumps(value, indent=2, ensure_ascii=False))
        return
    for name, field in value.items():
        print(f"{name}: {json.dumps(field) if isinstance(field, (dict, list)) else field}")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="A loopback address.")] = None,
    port: int | None = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name; none: the default model.")] = None,
    model_name: str | None = None,
    model_alias: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    model_revision: str | None = None,
    data_dir: Path | None = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16")] = None,
    device: str | None = None,
    kv_bytes: Annotated[str | None, typer.Option(help="As 2GiB.")] = None,
    prefix_bytes: str | None = None,
    max_rows: int | None = None,
    max_step_tokens: int | None = None,
    max_queued: int | None = None,
    max_queue_s: float | None = None,
    max_virtual_tokens: int | None = None,
    max_upload_bytes: str | None = None,
    log_json: bool | None = None,
    publish_examples: Annotated[Path | None, typer.Option(help="A folder of PEFT folders, published at start.")] = None,
) -> None:
    """Serve on loopback. Fetches the default model if it is missing. Every option is also `PREFIXSERVE_…`."""
    given = {k: v for k, v in locals().items() if v not in (None, []) and k != "publish_examples"}
    with plain_errors():
        settings = Settings(**given)
        from server import start  # torch and transformers take seconds; the other commands do without

        start.run(settings, console, publish_examples)


@app.command()
def push(
    task: str,
    path: Path,
    url: Url = LOCAL,
    api_key: ApiKey = None,
    index: Annotated[int | None, typer.Option(help="One task of a multitask file.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every task of a multitask file, as TASK-0, TASK-1, …")] = False,
    note: str = "",
    activate: Annotated[str, typer.Option(help="auto, true or false")] = "auto",
    accept_base: bool = False,
    dry_run: Annotated[bool, typer.Option(help="Read and check the files here; send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a PEFT folder or a native file as a new version of TASK."""
    from prefix_store.local_files import count_tasks, peft_files

    with plain_errors():
        if not path.exists():
            fail(f"expected a PEFT folder or a .safetensors file, found nothing at {path}")
        indexes: list[int | None] = [*range(count_tasks(path))] if every else [index]
        client = Client(url, api_key)
        done: list[dict[str, Any]] = []
        for one in indexes:
            name = f"{task}-{one}" if every and len(indexes) > 1 else task
            if dry_run:
                files = [str(path)] if path.is_file() else ["adapter_config.json", "adapter_model.safetensors"]
                num_bytes = path.stat().st_size if path.is_file() else sum(map(len, peft_files(path)))
                done.append({"task": name, "dry_run": True, "files": files, "num_bytes": num_bytes})
                continue
            manifest = client.push(name, path, index=one, note=note, activate=activate, accept_base=accept_base)
            done.append(manifest)
        for manifest in done:
            if as_json or dry_run:
                show(manifest, as_json)
            else:
                print(
                    f"{manifest['task']}@{manifest['version']} {manifest['digest'][:12]} {manifest['kind']}, "
                    f"{manifest['num_virtual_tokens']} virtual tokens, base {manifest['base']}, "
                    f"active {manifest['active']}"
                )


@app.command("list")
def list_(url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """The tasks of a server."""
    with plain_errors():
        tasks = Client(url, api_key).list_tasks()
    if as_json:
        print(json.dumps(tasks, indent=2))
        return
    table = Table("task", "active", "versions", "kind", "virtual tokens", "residency", "pinned")
    for task in tasks:
        active: dict[str, Any] = next((v for v in task["versions"] if v["version"] == task["active"]), {})
        table.add_row(
            task["task"],
            str(task["active"]),
            str(len(task["versions"])),
            active.get("kind", ""),
            str(active.get("num_virtual_tokens", "")),
            task["residency"],
            "yes" if task["pinned"] else "",
        )
    Console().print(table)


@app.command("show")
def show_(task: str, url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """One task: versions, residency, notes."""
    with plain_errors():
        show(Client(url, api_key).task(task), as_json)


@app.command()
def activate(task: str, version: str, url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Make VERSION of TASK live."""
    with plain_errors():
        show(Client(url, api_key).activate(task, version), as_json)


@app.command()
def rollback(task: str, url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Back to the version that was live before."""
    with plain_errors():
        show(Client(url, api_key).activate(task, "previous"), as_json)


@app.command()
def rm(target: str, url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Delete TASK, or TASK@VERSION alone."""
    with plain_errors():
        Client(url, api_key).delete(target)
    show({"deleted": target}, as_json)


@app.command()
def generate(
    task: str,
    text: str,
    url: Url = LOCAL,
    api_key: ApiKey = None,
    stream: bool = False,
    max_new_tokens: int = 128,
    as_json: AsJson = False,
) -> None:
    """Answer TEXT with TASK."""
    with plain_errors():
        client = Client(url, api_key)
        if not stream:
            answer = client.generate(task, text, max_new_tokens)
            print(json.dumps(answer, ensure_ascii=False) if as_json else answer["generated_text"])
            return
        for event in client.generate_stream(task, text, max_new_tokens):
            if as_json:
                print(json.dumps(event, ensure_ascii=False), flush=True)
            else:
                sys.stdout.write(event["token"]["text"])
                sys.stdout.flush()
        if not as_json:
            print()


@app.command()
def inspect(
    path: Path,
    model: ModelOption = None,
    index: int | None = None,
    max_virtual_tokens: int = 4096,
    as_json: AsJson = False,
) -> None:
    """What PATH is and whether it fits the model, without a server."""
    with plain_errors():
        from prefix_store.local_files import read_path
        from server.engine.kv_blocks import block_bytes, num_blocks_for

        shape = _shape(model, max_virtual_tokens)
        prefix = read_path(path, shape, index)
        show(
            {
                "kind": prefix.kind,
                "num_virtual_tokens": prefix.num_virtual_tokens,
                "base_model": prefix.base_model,
                "model": shape.model_name,
                "num_bytes": prefix.num_bytes,
                "device_bytes": num_blocks_for(prefix.num_virtual_tokens) * block_bytes(shape),
                "fits": True,
            },
            as_json,
        )


@app.command()
def fold(path: Path, output: Path, model: ModelOption = None, as_json: AsJson = False) -> None:
    """Fold an unfolded checkpoint (P_theta and its MLP) at PATH into the native file OUTPUT."""
    with plain_errors():
        from dataclasses import replace

        from prefix_store.fold import fold_file
        from prefix_store.native_format import digest_of, write_native

        if not path.is_file():
            fail(f"expected a checkpoint file, found nothing at {path}")
        shape = _shape(model, 2**20)
        prefix = fold_file(path, shape)
        body = write_native(replace(prefix, base_model=shape.model_name, fingerprint=shape.fingerprint))
        output.write_bytes(body)
        show({"file": str(output), "num_virtual_tokens": prefix.num_virtual_tokens, "digest": digest_of(body)}, as_json)


@model_app.command("fetch")
def model_fetch(name: Annotated[str | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """Fetch NAME (the default model) into the cache."""
    _print_path(name, fetches=True, as_json=as_json)


@model_app.command("path")
def model_path(name: Annotated[str | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """The folder of NAME (the default model), alone on the last line."""
    _print_path(name, fetches=False, as_json=as_json)


def _print_path(name: str | None, *, fetches: bool, as_json: bool) -> None:
    from server.model_files import fetch_model, find_model
    from server.progress import progress_bar

    with plain_errors():
        if fetches:
            with progress_bar(console) as report:
                files = fetch_model(name, report=report)
        else:
            files = find_model(name)
    print(json.dumps({"name": files.name, "path": str(files.path)}) if as_json else files.path)


def _shape(model: str | None, max_virtual_tokens: int) -> Any:
    """The model's measures, from its config alone: no weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from server.engine.model_runner import measure_shape, native_dtype
    from server.model_files import find_model, fingerprint

    files = find_model(model)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(files.path)
        empty = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=native_dtype("auto", torch.device("cpu"))
        )
    return measure_shape(empty, files.name, fingerprint(files.path), (), max_virtual_tokens)
