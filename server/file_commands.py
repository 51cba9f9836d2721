"""Commands that work on disk, without a server: inspect, fold, convert, and the model's files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.base_folders import base_fingerprint
from server.options import AcceptBase, AsJson, BaseFolder, Index, ModelOption, option, settings_of
from server.preflight import check_model
from server.terminal import console, fail, plain_errors, show

app = typer.Typer()
model_app = typer.Typer(no_args_is_help=True, help="The served model's files.")


@app.command()
def inspect(
    path: Path,
    model: ModelOption = None,
    index: Index = None,
    max_virtual_tokens: Annotated[int | None, option("max-virtual-tokens")] = None,
    accept_base: AcceptBase = False,
    base_folder: BaseFolder = None,
    as_json: AsJson = False,
) -> None:
    """What PATH is and whether it fits the model, without a server. Exit code 1 if it does not."""
    with plain_errors():
        if not path.exists():
            fail(f"expected a PEFT folder or a .safetensors file, found nothing at {path}")
        settings = settings_of(model, max_virtual_tokens)
        check_model(settings.model)
        from server.inspection import inspect

        options: dict[str, Any] = {"accept_base": accept_base, "base_fingerprint": base_fingerprint(path, base_folder)}
        found = inspect(path, settings, index, **options)
        show(asdict(found), as_json)
        raise typer.Exit(0 if found.fits else 1)


@app.command()
def fold(path: Path, output: Path, model: ModelOption = None, as_json: AsJson = False) -> None:
    """Fold an unfolded checkpoint (P_theta and its MLP) at PATH into the native file OUTPUT."""
    with plain_errors():
        if not path.is_file():
            fail(f"expected a checkpoint file, found nothing at {path}")
        settings = settings_of(model, 2**20)
        check_model(settings.model)
        from prefix_store.converters.convert import fold_file
        from prefix_store.native_format import digest_of, write_native
        from server.inspection import model_shape

        shape = model_shape(settings)
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
        if not path.exists():
            fail(f"expected another tool's file or its folder, found nothing at {path}")
        settings = settings_of(model, 2**20)
        check_model(settings.model)
        from prefix_store.converters.convert import convert_file
        from prefix_store.native_format import write_native
        from prefix_store.validation import validate
        from server.inspection import model_shape, parts

        shape = model_shape(settings)
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
