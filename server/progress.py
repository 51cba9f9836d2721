"""One line on the terminal that says what long work is doing, and how far it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from prefix_store.printable import escaped
from server.logs import is_for_people
from server.model_files import Report


@contextmanager
def progress_bar(console: Console) -> Iterator[Report]:
    """Gives what takes reports. Gone from the terminal at the end; nothing is written where there is none."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not is_for_people()) as progress:
        line = progress.add_task("")

        def report(what: str, share: float | None = None) -> None:
            progress.update(
                line, description=escaped(what), total=None if share is None else 1.0, completed=share or 0.0
            )

        yield report
