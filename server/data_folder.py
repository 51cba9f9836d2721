"""A server's data folder: nobody else reads it, and commands can tell whether a server runs on it."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from prefix_store.private_files import close_to_others, close_tree_to_others, make_file, make_folder

REGISTRY, MIRROR, BLOBS, RESIDENTS, LOCK = "registry.sqlite", "mirror.sqlite", "blobs", "residents.json", "server.lock"
OURS = (REGISTRY, MIRROR, BLOBS, RESIDENTS, LOCK)
log = structlog.get_logger()


def close_folder(data_dir: Path, blob_url: str | None = None) -> None:
    """Make the folder where there is none. What an earlier version, a copy or a umask left open to others is closed;
    what cannot be closed is told. The folder itself stays as it is where it has other things in it. Raises OSError."""
    make_folder(data_dir)
    if not os.access(data_dir, os.W_OK):  # the registry says so when it is opened
        return
    found = sorted(data_dir.iterdir())
    ours = [path for path in found if path.name.startswith(OURS)]
    blobs = Path((blob_url or str(data_dir / BLOBS)).removeprefix("file://"))
    open_still = close_to_others([data_dir] if ours == found else [])
    open_still += close_to_others(path for path in ours if path.is_file())
    for path in open_still + close_tree_to_others(blobs):
        log.warning("open_to_others", path=str(path), mode=f"{stat.S_IMODE(path.stat().st_mode):04o}")


@contextmanager
def serving(data_dir: Path) -> Iterator[None]:
    """Tells `is_served`, until it ends; a server that is killed tells nothing any more."""
    make_file(data_dir / LOCK)
    with (data_dir / LOCK).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def is_served(data_dir: Path) -> bool:
    """Whether a server of this machine runs on the folder."""
    try:
        with (data_dir / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no server ever ran on it
        return False
    return False
