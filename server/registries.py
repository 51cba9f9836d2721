"""Registries by their places, as commands on disk are given them: which one it is, and whether it is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prefix_store.errors import NotFoundError, PrefixStoreError, in_full
from server.data_folder import REGISTRY, is_served
from server.terminal import console

if TYPE_CHECKING:
    from prefix_store.registry import Registry


@contextmanager
def opened(place: str | Path, *, creates: bool, hint: str = "") -> Iterator[Registry]:
    """The registry in the data folder or Redis at `place`. It is named on standard error; an error of it names it too.
    Raises NotFoundError, with the `hint`, where there is none yet, unless it `creates` one."""
    name = name_of(place)
    try:
        registry = _open(place, creates=creates, hint=hint)
        try:
            yield registry
        finally:
            registry.close()
    except PrefixStoreError as error:
        if name in in_full(error):
            raise
        raise type(error)(f"{error} (registry {name})", detail=error.detail) from error
    console.print(f"registry {name}{_served(place)}", highlight=False, markup=False, soft_wrap=True)


def _served(place: str | Path) -> str:
    if _is_redis(place):
        return ""
    return ", a server runs on it" if is_served(Path(place)) else ", no server runs on it now"


def name_of(place: str | Path) -> str:
    """The registry's file, or its URL without user, password and options."""
    if not _is_redis(place):
        return str(Path(place).absolute() / REGISTRY)
    try:
        url = urlsplit(str(place))
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path or '/0'}"
    except ValueError:  # its text may hold a part of the password
        return "redis"


def _is_redis(place: str | Path) -> bool:
    return isinstance(place, str) and "://" in place


def _open(place: str | Path, *, creates: bool, hint: str) -> Registry:
    from prefix_store.redis_registry import RedisRegistry
    from prefix_store.sqlite_registry import SqliteRegistry

    if _is_redis(place):
        shared = RedisRegistry(str(place))
        if not creates and not shared.is_there():
            raise NotFoundError(_none_in(place) + hint)
        return shared
    path = Path(place) / REGISTRY
    if not creates and not SqliteRegistry.is_there(path):
        raise NotFoundError(_none_in(place) + hint)
    return SqliteRegistry(path)


def _none_in(place: str | Path) -> str:
    what = "Redis with a registry" if _is_redis(place) else "a data folder"
    return f"expected {what}, found no registry at {name_of(place)}"
