"""A process that holds only a store, changes it without end, says so after every change, and is killed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

from prefix_store.blobs import Blobs
from prefix_store.errors import ConflictError, NotFoundError
from prefix_store.redis_registry import RedisRegistry
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from prefix_store.task import Task
from tests.prefix_store.small_prefixes import AT_ONCE, OURS, SHAPE, ensemble, publish

MAX_KEPT = 4


@dataclass(frozen=True)
class Acknowledged:
    """After the change `number` its task was this (None: gone)."""

    number: int
    task: Task | None


def open_store(folder: Path, url: str) -> PrefixStore:
    registry = RedisRegistry(url) if url else SqliteRegistry(folder / "registry.sqlite")
    store = PrefixStore(registry, Blobs(folder / "blobs"), SHAPE)
    store.sweep(AT_ONCE)
    return store


def task_of(number: int) -> str:
    return "ensembles" if number % 10 == 9 else f"task-{number % 7}"


def change(store: PrefixStore, number: int) -> None:
    """May be done again if nobody knows whether it was done."""
    task, kind = task_of(number), number % 10
    if kind == 9 and number % 50 == 49:
        with suppress(NotFoundError):
            store.delete_task(OURS, task)
    elif kind == 9:
        members = [found.name for found in store.list_tasks(OURS) if found.name != task]
        ensemble(store, task, members[0], members[-1])
    elif kind == 8:
        for version in store.get_task(OURS, task).versions[:-MAX_KEPT] if store.has_task(OURS, task) else ():
            with suppress(ConflictError):
                store.delete_version(OURS, task, str(version.version))
    elif kind == 5:
        with suppress(NotFoundError):
            store.activate(OURS, task, "previous")
    elif number % 70 == 66:
        with suppress(NotFoundError, ConflictError):
            store.delete_task(OURS, task)
    else:
        publish(store, task, number, n=40)


def write(folder: Path, url: str, first: int, acknowledge: Connection) -> None:
    store = open_store(folder, url)
    acknowledge.send(None)
    for number in count(first):
        change(store, number)
        name = task_of(number)
        task = store.get_task(OURS, name) if store.has_task(OURS, name) else None
        acknowledge.send(Acknowledged(number, task))
