"""Commands that speak HTTP with a server: push, list, show, activate, rollback, rm, generate, usage."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prefix_store.printable import escaped
from server.base_folders import base_fingerprint
from server.client import Client
from server.options import LOCAL, AcceptBase, ApiKey, AsJson, BaseFolder, Index, ModelOption, Url, option, settings_of
from server.preflight import check_model
from server.terminal import console, fail, plain_errors, print_json, print_table, print_text, say, show, upload_bar

app = typer.Typer()
HOW_TO_ASK = """
Ask {task} as it was trained: prefixserve generate {task} TEXT, POST /generate?task={task}, or /v1/completions with
"temperature": 0. /v1 samples at temperature 1 unless a request says otherwise, and /v1/chat/completions writes the
model's chat template around the text: right for a prefix that was trained on chats only."""


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
    base_folder: BaseFolder = None,
    dry_run: Annotated[bool, option("dry-run", "Check the files against the model here; send nothing.")] = False,
    model: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """Upload a PEFT folder, a native file or an ensemble (.json) as a new version of TASK; an operator's OWNER/TASK.

    Where the folder of the model that it was trained for is on this disk, its fingerprint is sent along and verifies
    the base model. A version whose base model is unverified is stored and does not go live."""
    with plain_errors():
        if every and index is not None:
            fail("expected --index or --all, got both")
        if path.suffix == ".json" and path.is_file():
            if every or index is not None or dry_run or base_folder is not None:
                one_file = "--all, --index, --dry-run or --base-folder"
                fail(f"expected no {one_file} with an ensemble: its members are on the server")
            with Client(url, api_key) as client:
                manifest = client.push_ensemble(task, path, note=note, activate=activate, accept_base=accept_base)
            if as_json:
                print_json(manifest)
            else:
                _show_pushed(manifest)
            return
        uploads = _uploads(task, path, index, every)
        options: dict[str, Any] = {"accept_base": accept_base, "base_fingerprint": base_fingerprint(path, base_folder)}
        if dry_run:
            settings = settings_of(model)
            check_model(settings.model)
            from server.inspection import inspect

            found = [
                {"task": name, "dry_run": True} | asdict(inspect(path, settings, i, task=name, **options))
                for name, i in uploads
            ]
            _show_all(found, every, as_json)
            raise typer.Exit(0 if all(one["fits"] for one in found) else 1)
        with Client(url, api_key) as client:
            found = [
                _push(client, name, path, as_json, index=one, note=note, activate=activate, **options)
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
    say(
        f"{manifest['task']}@{manifest['version']} {manifest['digest'][:12]} {manifest['kind']}, "
        f"{manifest['num_virtual_tokens']} virtual tokens, base {manifest['base']}, active {manifest['active']}"
        + (", unchanged" if manifest["unchanged"] else "")
    )
    task, version = manifest["task"], manifest["version"]
    if manifest["next_step"] is not None:
        say(f"not live: {manifest['next_step']}")
    elif manifest["active"] != version and str(version) not in (manifest["weights"] or {}):
        weights = " and ends the weights that are set" if manifest["weights"] else ""
        say(f"not live: `prefixserve activate {task} {version}` makes it live{weights}")


def _uploads(task: str, path: Path, index: int | None, every: bool) -> list[tuple[str, int | None]]:
    """Tasks and the indexes of their artefacts in the file."""
    if not path.exists():
        fail(f"expected a PEFT folder, a .safetensors file or an ensemble (.json), found nothing at {path}")
    num_tasks = 1
    if every:
        from prefix_store.local_files import count_tasks  # torch takes seconds

        num_tasks = count_tasks(path)
    return [(task, index)] if num_tasks == 1 else [(f"{task}-{i}", i) for i in range(num_tasks)]


def _show_all(records: list[dict[str, Any]], as_list: bool, as_json: bool) -> None:
    """One record by itself, or a list of them."""
    if as_json and as_list:
        print_json(records)
        return
    for record in records:
        show(record, as_json)


@app.command("list")
def list_(
    url: Url = LOCAL,
    api_key: ApiKey = None,
    tenant: Annotated[str | None, option("tenant", "An operator's: one tenant's tasks, or * all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Your tasks, and those that others share with you."""
    with plain_errors(), Client(url, api_key) as client:
        tasks = client.list_tasks(tenant)
    if as_json:
        print_json(tasks)
        return
    names = ("kind", "num_virtual_tokens", "base")
    rows: list[tuple[Any, ...]] = []
    for task in tasks:
        active: dict[str, Any] = next((v for v in task["versions"] if v["version"] == task["active"]), {})
        described = [active.get(name, "") for name in names]
        marks = ("yes" if task.get("pinned") else "", task["owner"] if task["shared"] else "")
        about = (task["task"], task["active"], len(task["versions"]), *described, task["status"])
        rows.append((*about, task["residency"], *marks))
    print_table(("task", "active", "versions", *names, "status", "residency", "pinned", "shared by"), rows)
    num_incompatible = sum(task["status"] == "incompatible" for task in tasks)
    if num_incompatible:
        text = "tasks were stored for another model than the served one: they answer 409"
        _note(f"{num_incompatible} of {len(tasks)} {text}")
    num_without = sum(task["active"] is None for task in tasks)
    if num_without:
        _note(f"{num_without} of {len(tasks)} have no live version: `prefixserve show TASK` says what theirs lack")


def _note(text: str) -> None:
    """Beside a table, where it does not disturb who reads the table."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command("show")
def show_(task: str, url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """One task, TASK@VERSION, or OWNER/TASK: versions, residency, notes, and how to ask it as it was trained."""
    with plain_errors(), Client(url, api_key) as client:
        found = client.task(task)
    if as_json or "versions" not in found:
        show(found, as_json)
        return
    versions = found["versions"]
    _show_task(found, as_json)
    for version in versions:
        if version.get("next_step") is not None:
            say(f"version {version['version']}: {version['next_step']}")
        elif version["base_accepted"] and version["base"] in ("mismatch", "unverified"):
            what = "trained for another model" if version["base"] == "mismatch" else "its base model was not verified"
            named = f", the file names {version['claimed_base']!r}" if version.get("claimed_base") else ""
            say(f"version {version['version']}: {what}{named}; taken as it is")
    live = found["active"] is not None or not versions
    print(HOW_TO_ASK.format(task=escaped(found["task"] if live else f"{found['task']}@{versions[-1]['version']}")))


def _show_task(task: dict[str, Any], as_json: bool) -> None:
    """A task, and its versions as a table."""
    if as_json:
        print_json(task)
        return
    show({name: field for name, field in task.items() if name != "versions"}, as_json)
    names = ("version", "digest", "kind", "num_virtual_tokens", "num_bytes", "base", "status", "residency", "note")
    versions = [version | {"digest": version["digest"][:12]} for version in task["versions"]]
    print_table(names, [tuple(version.get(name, "") for name in names) for version in versions])


@app.command()
def activate(
    task: str,
    version: str,
    accept_base: AcceptBase = False,
    url: Url = LOCAL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make VERSION of TASK live."""
    with plain_errors(), Client(url, api_key) as client:
        _show_task(client.activate(task, version, accept_base=accept_base), as_json)


@app.command()
def rollback(task: str, url: Url = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Back to the version that was live before."""
    with plain_errors(), Client(url, api_key) as client:
        _show_task(client.activate(task, "previous"), as_json)


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
                print_text(answer["generated_text"])
            return
        for event in client.generate_stream(task, text, max_new_tokens):
            if as_json:
                print_json(event, indent=None)
            else:
                print_text(event["token"]["text"], end="")
        if not as_json:
            print()


@app.command()
def usage(
    url: Url = LOCAL,
    api_key: ApiKey = None,
    tenant: Annotated[str | None, option("tenant", "One tenant; an operator may see all.")] = None,
    first_day: Annotated[str | None, option("first-day", "As 2026-11-25, UTC; none: today.")] = None,
    last_day: Annotated[str | None, option("last-day", "As --first-day; both are included.")] = None,
    as_json: AsJson = False,
) -> None:
    """What was used, by day, tenant, task and version."""
    with plain_errors(), Client(url, api_key) as client:
        rows = client.usage(tenant, first_day, last_day)
    if as_json:
        print_json(rows)
        return
    names = tuple(rows[0]) if rows else ("day", "tenant", "task", "version", "num_requests")
    print_table(names, [tuple(row.values()) for row in rows])
