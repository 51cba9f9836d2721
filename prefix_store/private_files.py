"""Files and folders of one user alone: made as 0600 and 0700 whatever the umask, and told from those that others may
read or change."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

FILE_MODE, FOLDER_MODE = 0o600, 0o700
OTHERS = stat.S_IRWXG | stat.S_IRWXO
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
MAX_LINKS = 40  # of one path, as Linux allows
ROOT = 0


def make_folder(folder: str | Path) -> None:
    """Make `folder` and the folders above it that are missing, for this user alone. Raises OSError."""
    path = Path(folder)
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(FOLDER_MODE)
    except FileExistsError:  # by another process meanwhile, or a file is in the way
        if not path.is_dir():
            raise


def make_file(path: Path) -> None:
    """Make the empty file `path` for this user alone, unless there is one. Raises OSError."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))


def create(path: str | Path) -> BinaryIO:
    """Open the new file `path` for writing, for this user alone. Raises OSError, also where there is one."""
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, FILE_MODE), "wb")


def write(path: Path, content: bytes) -> None:
    """Write the file `path` for this user alone: whole, or not at all. Raises OSError."""
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # its mode is FILE_MODE
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def close_to_others(paths: Iterable[Path]) -> list[Path]:
    """Take all rights of others from those of `paths` that are there; a folder comes before its files. Returns those
    that stay open to others: another user's, and folders that everyone shares (the sticky bit)."""
    return [path for path in paths if not _is_closed(path)]


def _is_closed(path: Path) -> bool:
    try:
        found = path.stat()  # and no descriptor: to close one gives up the locks that SQLite has on this file
    except OSError:  # it is not there, or this user may not even look
        return True
    if not found.st_mode & OTHERS:
        return True
    if found.st_mode & stat.S_ISVTX or found.st_uid != os.geteuid():
        return False
    try:
        path.chmod(stat.S_IMODE(found.st_mode) & ~OTHERS)
    except OSError:  # a file system that can only be read
        return False
    return True


def close_tree_to_others(root: Path) -> list[Path]:
    """As `close_to_others`, with all that is below `root` where `root` itself is open to others."""
    if not root.is_dir() or not root.stat().st_mode & OTHERS:
        return []
    below = [Path(folder) / name for folder, *names in os.walk(root) for each in names for name in each]
    return close_to_others([path for path in below if not path.is_symlink()] + [root])


def why_others_may_change(path: Path) -> str | None:
    """Who else than this user and root may put something else in the place of `path`, and what to do; None: nobody. The
    path is followed from its root, through symbolic links, so what was looked at cannot be replaced meanwhile."""
    seen, rest = Path("/"), list(path.absolute().parts[1:])
    num_links = 0
    while True:
        found = seen.lstat()
        if reason := _why_changeable(seen, found, is_last=not rest):
            return reason
        if stat.S_ISLNK(found.st_mode):
            num_links += 1
            if num_links > MAX_LINKS:
                return f"{path} has more than {MAX_LINKS} symbolic links"
            target = seen.readlink()
            rest = [*(target.parts[1:] if target.is_absolute() else target.parts), *rest]
            seen = Path("/") if target.is_absolute() else seen.parent
        elif not rest:
            return None
        else:
            name = rest.pop(0)
            seen = seen.parent if name == ".." else seen / name


def _why_changeable(path: Path, found: os.stat_result, *, is_last: bool) -> str | None:
    mode, user = found.st_mode, os.geteuid()
    shown = f"{path} has mode {stat.S_IMODE(mode):04o} and is owned by uid {found.st_uid}"
    if found.st_uid not in (ROOT, user):
        return f"{shown}, expected uid {user} or root: chown {user} {path}, or give another folder"
    if stat.S_ISLNK(mode) or not mode & OTHERS_WRITE:
        return None
    if mode & stat.S_ISVTX and not is_last:  # in a shared folder each may change what is their own only
        return None
    return f"{shown}, others may write it: chmod go-w {path}"
