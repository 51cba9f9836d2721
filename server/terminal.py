"""What the command line writes: records as text or JSON, tables, one-line errors, an upload's progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Column, Table
from rich.text import Text

from prefix_store.errors import PrefixStoreError, in_full
from prefix_store.printable import escaped, is_printable
from server.client import ClientError
from server.engine.errors import EngineError
from server.errors import StartError
from server.logs import is_for_people

console = Console(stderr=True)  # for people; answers go to stdout


def fail(message: str) -> NoReturn:
    text = Text("error: ", style="red").append(escaped(message), style="default")
    console.print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


@contextmanager
def plain_errors(fails: Callable[[str], NoReturn] = fail) -> Iterator[None]:
    """An expected failure is one line and exit code 1."""
    try:
        yield
    except (StartError, PrefixStoreError, EngineError, ClientError) as error:
        fails(in_full(error))
    except OSError as error:
        fails(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ValidationError as error:
        fails("; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {_said(e['msg'])}" for e in error.errors()))


def _said(message: str) -> str:
    return message.removeprefix("Value error, ")  # of a validator of ours


def show(value: dict[str, Any], as_json: bool) -> None:
    """A record as JSON, or as `name: value` lines."""
    if as_json:
        print_json(value)
        return
    for name, field in value.items():
        say(f"{name}: {json.dumps(field) if isinstance(field, (dict, list)) else field}")


def say(text: str) -> None:
    """One line, with nothing in it that a terminal would obey."""
    print(escaped(text))


def print_text(text: str, *, end: str = "\n") -> None:
    """A model's text as it is; on a terminal with nothing that this would obey, lines apart."""
    print(escaped(text, keep="\n\t") if sys.stdout.isatty() else text, end=end, flush=True)


def print_json(value: Any, indent: int | None = 2) -> None:
    """What is not printable is escaped, as JSON may have it."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    print("".join(c if c == "\n" or is_printable(c) else json.dumps(c)[1:-1] for c in text), flush=True)


def print_table(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Where no terminal bounds it, wide enough for every cell."""
    table = Table(*(Column(Text(escaped(name))) for name in names))
    for row in rows:
        table.add_row(*(Text(escaped(str(cell))) for cell in row))
    output = Console()
    if not output.is_terminal:
        output.width = 10_000
    output.print(table)


@contextmanager
def upload_bar() -> Iterator[Callable[[Path], BinaryIO]]:
    """Gives what opens a file; how much of it was read is shown while it is, on a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not is_for_people()) as progress:

        def open_file(path: Path) -> BinaryIO:
            return progress.open(path, "rb", description=escaped(path.name))

        yield open_file
