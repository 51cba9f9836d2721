"""A file that appears whole under its name, or not at all."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, or the largest file that a process may write


def appear(part: Path, path: Path) -> None:
    """Give the whole file `part` the name `path`, unless another process was faster; `part` is gone then."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            part.replace(path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
    fsync_folder(path.parent)


def fsync_folder(folder: Path | str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
