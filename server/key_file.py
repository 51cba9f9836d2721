"""Files with a key in them, which nobody else may read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from server.errors import StartError

MIN_OPERATOR_KEY = 32  # characters
MAX_BYTES = 4096
ROOT = 0
OWN, ROOTS = stat.S_IRUSR | stat.S_IWUSR | stat.S_IXUSR, stat.S_IRWXU | stat.S_IRGRP
# Where Docker and Podman put the secrets of a container: root's, read-only, for every user in it (0444).
SECRETS = (Path("/run/secrets"), Path("/var/run/secrets"))
SECRETS_MODE = ROOTS | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH


def read_operator_key(path: Path | None) -> str | None:
    """The operator's key in a file, without the line's end. Raises StartError."""
    return None if path is None else read_key(path, "operator_key_file")


def read_key(path: Path, option: str) -> str:
    """The one key in the file that `option` names. The file is this user's, with mode 0600 or less; or root's, with
    0640 or less, as for a group that shares it; or a container's secret. Raises StartError."""
    try:
        with path.open("rb") as file:
            _check(path, os.fstat(file.fileno()), option)  # of what is read, whatever is put in its place meanwhile
            key = file.read(MAX_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its bytes are not ASCII"
        raise StartError(f"{option} must be a file with a key, {path}: {reason}") from error
    if len(key) < MIN_OPERATOR_KEY or not key.isprintable() or " " in key:
        raise StartError(f"{option} must hold one key of {MIN_OPERATOR_KEY} characters or more, {path} has {len(key)}")
    return key


def _check(path: Path, found: os.stat_result, option: str) -> None:
    mode, user = stat.S_IMODE(found.st_mode), os.geteuid()
    if found.st_uid == ROOT and any(folder in path.absolute().parents for folder in SECRETS):
        allowed = SECRETS_MODE
    elif found.st_uid == user:
        allowed = OWN
    elif found.st_uid == ROOT:
        allowed = ROOTS
    else:
        raise StartError(f"{option} must be owned by uid {user} or root, {path} is owned by uid {found.st_uid}")
    if mode & ~allowed:
        raise StartError(
            f"{option} must be for its owner's eyes alone, {path} has mode {mode:04o}: others may read or change it; "
            f"run `chmod 600 {path}`"
        )
