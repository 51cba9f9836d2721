"""Files that nothing refers to, kept for some days before they are deleted."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fsspec import AbstractFileSystem

from prefix_store.private_files import make_folder

FOLDER = "TRASH"  # no tenant has such a name
STAMP = "%Y%m%dT%H%M%SZ"
STAMPED = re.compile(r"\d{8}T\d{6}Z")
MAX_COPY_S = 20.0  # of the minute that nobody may store the file anew (`RedisFiles`)


@dataclass(frozen=True)
class Deleted:
    """What a call of `Trash.empty` deleted for good."""

    num_files: int = 0
    num_bytes: int = 0


class Trash:
    """`<root>/TRASH/<time in UTC>/<where the file was below the root>`, on the file system `fs`. The time is that of
    the move. Several replicas may use the same trash at once."""

    def __init__(self, fs: Any, root: str, *, is_local: bool) -> None:
        self._fs = fs
        self._root = root
        self._path = f"{root}/{FOLDER}"
        renames = type(fs).mv is not AbstractFileSystem.mv  # else it copies, and deletes then
        self._rename = os.replace if is_local else fs.mv if renames else None
        self._make_folder = make_folder if is_local else partial(fs.makedirs, exist_ok=True)

    def has(self, path: str) -> bool:
        """Whether this path is in the trash."""
        return path.startswith(f"{self._path}/")

    def paths(self) -> set[str]:
        """Where the files in the trash were."""
        try:
            found = self._fs.find(self._path)
        except FileNotFoundError:
            return set()
        rests = (str(path).removeprefix(f"{self._path}/").partition("/")[2] for path in found)
        return {f"{self._root}/{rest}" for rest in rests}

    def put(self, path: str) -> bool:
        """Move a file or, on a disk, a folder into the trash. False: it was gone, or it stays because copying it took
        too long."""
        stamp = time.strftime(STAMP, time.gmtime())
        return self._move(path, f"{self._path}/{stamp}/{path.removeprefix(self._root + '/')}")

    def restore(self, path: str) -> bool:
        """Move the file that was at `path` back, the last one if there are several. False: there is none."""
        rest = path.removeprefix(self._root + "/")
        for stamp in sorted(self._stamps(), reverse=True):
            found = f"{self._path}/{stamp}/{rest}"
            if self._fs.isfile(found):
                return self._move(found, path)
        return False

    def empty(self, grace_s: float) -> Deleted:
        """Delete for good what has been in the trash for `grace_s` seconds."""
        num_files = num_bytes = 0
        for stamp in self._stamps():
            moved_s = datetime.strptime(stamp, STAMP).replace(tzinfo=UTC).timestamp()
            if time.time() - moved_s < grace_s:
                continue
            folder = f"{self._path}/{stamp}"
            with suppress(FileNotFoundError):  # another replica empties the trash as well
                sizes = [int(found["size"] or 0) for found in self._fs.find(folder, detail=True).values()]
                self._fs.rm(folder, recursive=True)
                num_files, num_bytes = num_files + len(sizes), num_bytes + sum(sizes)
        return Deleted(num_files, num_bytes)

    def _stamps(self) -> Iterator[str]:
        try:
            found = self._fs.ls(self._path, detail=False)
        except FileNotFoundError:
            return
        for path in found:
            name = str(path).rstrip("/").rsplit("/", 1)[-1]
            if STAMPED.fullmatch(name):
                yield name

    def _move(self, source: str, target: str) -> bool:
        with suppress(FileNotFoundError):  # another replica moves it as well
            self._make_folder(target.rsplit("/", 1)[0])
            if self._rename is not None:
                self._rename(source, target)
                return True
            began_s = time.monotonic()
            self._fs.copy(source, target)
            if time.monotonic() - began_s < MAX_COPY_S:
                self._fs.rm_file(source)
                return True
        return False
