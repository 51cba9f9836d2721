"""The command line. `serve` runs the server; `push`, `list`, … speak HTTP with one; the rest works on files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.client import Client
from server.config import Settings
from server.terminal import console, fail, plain_errors, print_json, print_table, show, upload_bar

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
model_app = typer.Typer(no_args_is_help=True, help="The served model's files.")
app.add_typer(model_app, name="model")

LOCAL = "http://127.0.0.1:8000"


def option(name: str, text: str | None = None) -> Any:
    """`--name`, also from `PREFIXSERVE_NAME`."""
    return typer.Option(f"--{name}", envvar=f"PREFIXSERVE_{name.upper().replace('-', '_')}", help=text)


Url = Annotated[str, option("url", "The server.")]
ApiKey = Annotated[str | None, option("api-key")]
AsJson = Annotated[bool, option("json", "Machine-readable output.")]
ModelOption = Annotated[str | None, option("model", "Folder or hub name; none: the default.")]
Index = Annotated[int | None, option("index", "One task of a multitask file.")]
AcceptBase = Annotated[bool, option("accept-base", "Although it names another base model.")]


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
    quantize: Annotated[str | None, typer.Option(help="int8: weights and products in 8 bits, on a CPU.")] = None,
    kv_bytes: Annotated[str | None, typer.Option(help="As 2GiB.")] = None,
    prefix_bytes: str | None = None,
    max_rows: int | None = None,
    max_step_tokens: int | None = None,
    max_queued: int | None = None,
    max_queue_s: float | None = None,
    max_virtual_tokens: int | None = None,
    max_upload_bytes: str | None = None,
    log_json: bool | None = None,
    publish_examples: Annotated[
        Path | None, option("publish-examples", "A folder of PEFT folders, published at start.")
    ] = None,
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
    index: Index = None,
    every: Annotated[bool, option("all", "Every task of a multitask file, as TASK-0, TASK-1, …")] = False,
    note: Annotated[str, option("note", "Up to 200 characters.")] = "",
    activate: Annotated[Literal["auto", "true", "false"], option("activate", "Goes live.")] = "auto",
    accept_base: AcceptBase = False,
    dry_run: Annotated[bool, option("dry-run", "Check the files against the model here; send nothing.")] = False,
    model: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """Upload a PEFT folder, a native file or an ensemble (.json) as a new version of TASK."""
    with plain_errors():
        if every and index is not None:
            fail("expected --index or --all, got both")
        if path.suffix == ".json" and path.is_file():
            if every or index is not None or dry_run:
                fail("expected no --all, --index or --dry-run with an ensemble: its members are on the server")
            with Client(url, api_key) as client:
                manifest = client.push_ensemble(task, path, note=note, activate=activate)
            if as_json:
                print_json(manifest)
            else:
                _show_pushed(manifest)
            return
        uploads = _uploads(task, path, index, every)
        if dry_run:
            from server.inspection import inspect

            settings = _settings(model)
            found = [
                {"task": name, "dry_run": True} | asdict(inspect(path, settings, i, accept_base=accept_base, task=name))
                for name, i in uploads
            ]
            _show_all(found, every, as_json)
            raise typer.Exit(0 if all(one["fits"] for one in found) else 1)
        with Client(url, api_key) as client:
            found = [
                _push(client, name, path, as_json, index=one, note=note, activate=activate, accept_base=accept_base)
                for name, one in uploads
            ]
        if as_json:
            _show_all(found, every, as_json)


def _push(client: Client, task: str, path: Path, as_json: bool, **more: Any) -> dict[str, Any]:
    with upload_bar() as open_file:
        manifest = client.push(task, path, open_file=open_file, **more)
    if not as_json:
        _show_pushed(manifest)
    return manifest


def _show_pushed(manifest: dict[str, Any]) -> None:
    print(
        f"{manifest['task']}@{manifest['version']} {manifest['digest'][:12]} {manifest['kind']}, "
        f"{manifest['num_virtual_tokens']} virtual tokens, base {manifest['base']}, active {manifest['active']}"
    )


def _uploads(task: str, path: Path, index: int | None, every: bool) -> list[tuple[str, int | None]]:
    """Tasks and the indexes of their artefacts in the file."""
    from prefix_store.local_files import count_tasks

    if not path.exists():
        fail(f"expected a PEFT folder, a .safetensors file or an ensemble (.json), found nothing at {path}")
    num_tasks = count_tasks(path) if every else 1
    return [(task, index)] if num_tasks == 1 else [(f"{task}-{i}", i) for i in range(num_tasks)]


def _show_all(records: list[dict[str, Any]], as_list: bool, as_json: bool) -> None:
    """One record by itself, or a list of them."""
    if as_json and as_list:
        print_json(records)
        return
    for record in records:
        show(record, as_json)


@app.command("list")
def list_(url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """The tasks of a server."""
    with plain_errors(), Client(url, api_key) as client:
        tasks = client.list_tasks()
    if as_json:
        print_json(tasks)
        return
    names = ("kind", "num_virtual_tokens", "base")
    rows: list[tuple[Any, ...]] = []
    for task in tasks:
        active: dict[str, Any] = next((v for v in task["versions"] if v["version"] == task["active"]), {})
        described = [active.get(name, "") for name in names]
        pinned = "yes" if task["pinned"] else ""
        rows.append((task["task"], task["active"], len(task["versions"]), *described, task["residency"], pinned))
    print_table(("task", "active", "versions", *names, "residency", "pinned"), rows)


@app.command("show")
def show_(task: str, url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """One task, or TASK@VERSION: versions, residency, notes."""
    with plain_errors(), Client(url, api_key) as client:
        found = client.task(task)
    if as_json or "versions" not in found:
        show(found, as_json)
        return
    versions = found.pop("versions")
    show(found, as_json)
    names = ("version", "digest", "kind", "num_virtual_tokens", "num_bytes", "base", "status", "residency", "note")
    for version in versions:
        version["digest"] = version["digest"][:12]
    print_table(names, [tuple(version[name] for name in names) for version in versions])


@app.command()
def activate(task: str, version: str, url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Make VERSION of TASK live."""
    with plain_errors(), Client(url, api_key) as client:
        show(client.activate(task, version), as_json)


@app.command()
def rollback(task: str, url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Back to the version that was live before."""
    with plain_errors(), Client(url, api_key) as client:
        show(client.activate(task, "previous"), as_json)


@app.command()
def rm(target: str, url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Delete TASK, or TASK@VERSION alone."""
    with plain_errors(), Client(url, api_key) as client:
        client.delete(target)
    show({"deleted": target}, as_json)


@app.command()
def generate(
    task: str,
    text: str,
    url: Url = LOCAL,
    api_key: ApiKey = None,
    stream: Annotated[bool, option("stream", "Token by token; with --json, one event a line.")] = False,
    max_new_tokens: Annotated[int, option("max-new-tokens")] = 128,
    as_json: AsJson = False,
) -> None:
    """Answer TEXT with TASK, TASK@VERSION or the model by its name."""
    with plain_errors(), Client(url, api_key) as client:
        if not stream:
            answer = client.generate(task, text, max_new_tokens, details=as_json)
            if as_json:
                print_json(answer)
            else:
                print(answer["generated_text"])
            return
        for event in client.generate_stream(task, text, max_new_tokens):
            if as_json:
                print(json.dumps(event, ensure_ascii=False), flush=True)
            else:
                print(event["token"]["text"], end="", flush=True)
        if not as_json:
            print()


@app.command()
def inspect(
    path: Path,
    model: ModelOption = None,
    index: Index = None,
    max_virtual_tokens: Annotated[int | None, option("max-virtual-tokens")] = None,
    accept_base: AcceptBase = False,
    as_json: AsJson = False,
) -> None:
    """What PATH is and whether it fits the model, without a server. Exit code 1 if it does not."""
    with plain_errors():
        from server.inspection import inspect

        if not path.exists():
            fail(f"expected a PEFT folder or a .safetensors file, found nothing at {path}")
        found = inspect(path, _settings(model, max_virtual_tokens), index, accept_base=accept_base)
        show(asdict(found), as_json)
        raise typer.Exit(0 if found.fits else 1)


@app.command()
def fold(path: Path, output: Path, model: ModelOption = None, as_json: AsJson = False) -> None:
    """Fold an unfolded checkpoint (P_theta and its MLP) at PATH into the native file OUTPUT."""
    with plain_errors():
        from prefix_store.converters.convert import fold_file
        from prefix_store.native_format import digest_of, write_native
        from server.inspection import model_shape

        if not path.is_file():
            fail(f"expected a checkpoint file, found nothing at {path}")
        shape = model_shape(_settings(model, 2**20))
        prefix = fold_file(path, shape)
        body = write_native(replace(prefix, base_model=shape.model_name, fingerprint=shape.fingerprint))
        output.write_bytes(body)
        show({"file": str(output), "num_virtual_tokens": prefix.num_virtual_tokens, "digest": digest_of(body)}, as_json)


@app.command()
def convert(
    path: Path,
    output: Path,
    model: ModelOption = None,
    base_model: Annotated[str | None, option("base-model", "What it was trained for; none: not said.")] = None,
    placement: Annotated[Literal["prefix", "infix"], option("placement", "Before the text, or after it.")] = "prefix",
    separator: Annotated[int | None, option("separator", "The token id after a KV infix.")] = None,
    as_json: AsJson = False,
) -> None:
    """Convert another tool's file at PATH (.npy, decoder.pt, encoder.pt, cartridge.pt, PrefixTuning's
    pytorch_model.bin) into the native file OUTPUT. Weights alone are read."""
    with plain_errors():
        from prefix_store.converters.convert import convert_file
        from prefix_store.native_format import write_native
        from prefix_store.validation import validate
        from server.inspection import model_shape, parts

        if not path.exists():
            fail(f"expected another tool's file or its folder, found nothing at {path}")
        shape = model_shape(_settings(model, 2**20))
        found = convert_file(path, shape)
        prefix = replace(found, placement=placement, separator=separator, base_model=base_model)
        validate(prefix, shape)
        output.write_bytes(write_native(prefix))
        if prefix.is_seq2seq and prefix.kind == "kv":
            note = "note: text starts at n here, as in PEFT; in PrefixTuning's BART it starts at 0: measure again"
            console.print(note, soft_wrap=True, markup=False, highlight=False)
        made = {
            "file": str(output),
            "kind": prefix.kind,
            "placement": prefix.placement,
            "separator": prefix.separator,
            "parts": parts(prefix.layout, shape),
            "num_virtual_tokens": prefix.num_virtual_tokens,
            "num_bytes": prefix.num_bytes,
            "base_model": prefix.base_model,
        }
        show(made, as_json)


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


def _settings(model: str | None, max_virtual_tokens: int | None = None) -> Settings:
    """As `serve` would have them, with the environment's."""
    given = {"model": model, "max_virtual_tokens": max_virtual_tokens}
    return Settings.model_validate({name: value for name, value in given.items() if value is not None})
