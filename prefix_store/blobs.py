"""Content-addressed files behind fsspec: a local folder, or any object store by URL."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path
from typing import Any

import fsspec

from prefix_store.errors import DamagedBlobError, StorageFullError
from prefix_store.native_format import digest_of

SUFFIX = ".safetensors"
PART = ".part-"


class Blobs:
    """`root` is a path or an fsspec URL. A blob appears under its name only when it is whole and on the disk."""

    def __init__(self, root: str | Path) -> None:
        self._fs: Any
        self._fs, found = fsspec.core.url_to_fs(str(root))
        self._root = str(found).rstrip("/")
        self._is_local = "file" in ((self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol)
        self._fs.makedirs(self._root, exist_ok=True)

    def put(self, body: bytes) -> str:
        """Store `body`; the digest. Raises StorageFullError."""
        digest = digest_of(body)
        path = self._path(digest)
        if self._fs.exists(path):
            return digest
        parent = path.rsplit("/", 1)[0]
        temporary = f"{parent}/{PART}{uuid.uuid4().hex}"
        self._fs.makedirs(parent, exist_ok=True)
        try:
            if self._is_local:
                with open(temporary, "xb") as file:
                    file.write(body)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
                for folder in (parent, self._root):
                    _fsync_folder(folder)
            else:
                self._fs.pipe_file(temporary, body)
                self._fs.mv(temporary, path)
        except OSError as error:
            if self._fs.exists(temporary):
                self._fs.rm_file(temporary)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFullError(f"no room for {len(body)} bytes: {error.strerror}") from error
            raise
        return digest

    def get(self, digest: str) -> bytes:
        """The blob, checked against its digest. Raises DamagedBlobError."""
        try:
            body: bytes = self._fs.cat_file(self._path(digest))
        except FileNotFoundError as error:
            raise DamagedBlobError(f"the file of {digest[:12]} is missing") from error
        found = digest_of(body)
        if found != digest:
            raise DamagedBlobError(f"the file of {digest[:12]} was altered: its sha256 is {found[:12]}…")
        return body

    def exists(self, digest: str) -> bool:
        return bool(self._fs.exists(self._path(digest)))

    def delete(self, digest: str) -> None:
        path = self._path(digest)
        if self._fs.exists(path):
            self._fs.rm_file(path)

    def digests(self) -> set[str]:
        """All that is stored."""
        names = (str(path).rsplit("/", 1)[-1] for path in self._fs.find(self._root))
        return {name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)}

    def sweep(self) -> None:
        """Remove what writers that were killed left under temporary names."""
        for path in self._fs.find(self._root):
            if str(path).rsplit("/", 1)[-1].startswith(PART):
                self._fs.rm_file(path)

    def _path(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}{SUFFIX}"


def _fsync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
