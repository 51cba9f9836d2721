"""Content-addressed files of each tenant behind fsspec: a local folder, or any object store by URL."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from prefix_store.errors import DamagedBlobError, PrefixStoreError, StorageFullError, UnavailableError
from prefix_store.native_format import digest_of
from prefix_store.private_files import create, make_folder
from prefix_store.tenants import DEFAULT_TENANT, is_tenant_name

SUFFIX = ".safetensors"
PART = ".part-"
FOLDER = re.compile(r"[0-9a-f]{2}")
# One that hangs is given up in about a minute: s3fs makes five calls, each of two attempts, 5 s from packet to packet.
S3_TIMES: dict[str, Any] = {"connect_timeout": 3, "read_timeout": 5, "retries": {"total_max_attempts": 2}}


class Blobs:
    """`root` is a path or an fsspec URL. A blob is `<root>/<tenant>/<xx>/<digest>.safetensors`, and appears under its
    name only when it is whole and on the disk. Tenants share none: what one stores costs another the same time as if
    it were not there.

    Opening moves files without a tenant, `<root>/<xx>/<digest>.safetensors`, to the tenant `default`. All raises
    UnavailableError where the files cannot be reached.
    """

    def __init__(self, root: str | Path) -> None:
        self._fs: Any
        with _named("open where the files are"):  # without the URL: it may hold a key
            self._is_s3 = str(root).startswith("s3:")
            options = {"config_kwargs": S3_TIMES} if self._is_s3 else {}
            # Other replicas write as well: no listing is kept.
            self._fs, found = fsspec.core.url_to_fs(str(root), use_listings_cache=False, **options)
            self._root = str(found).rstrip("/")
            names = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol
            self._is_local = "file" in names
            self._make_folder(self._root)
            self._move_untenanted()

    def put(self, tenant: str, body: bytes) -> str:
        """Store `body`; the digest. Raises StorageFullError."""
        digest = digest_of(body)
        path = self._path(tenant, digest)
        parent = path.rsplit("/", 1)[0]
        temporary = f"{parent}/{PART}{uuid.uuid4().hex}"
        with _named(f"store a file of {len(body)} bytes"):
            if self._fs.exists(path):
                return digest
            try:
                self._make_folder(parent)
                if self._is_local:
                    with create(temporary) as file:
                        file.write(body)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(temporary, path)
                    for folder in (parent, parent.rsplit("/", 1)[0], self._root):
                        _fsync_folder(folder)
                elif self._is_s3:  # there a file appears when it is whole
                    self._fs.pipe_file(path, body)
                else:
                    self._fs.pipe_file(temporary, body)
                    self._fs.mv(temporary, path)
            except OSError:
                if self._fs.exists(temporary):
                    self._fs.rm_file(temporary)
                raise
        return digest

    def get(self, tenant: str, digest: str) -> bytes:
        """The blob, checked against its digest. Raises DamagedBlobError."""
        with _named(f"read the file of {digest[:12]}"):
            try:
                body: bytes = self._fs.cat_file(self._path(tenant, digest))
            except FileNotFoundError as error:
                raise DamagedBlobError(f"the file of {digest[:12]} is missing") from error
        found = digest_of(body)
        if found != digest:
            raise DamagedBlobError(f"the file of {digest[:12]} was altered: its sha256 is {found[:12]}…")
        return body

    def exists(self, tenant: str, digest: str) -> bool:
        with _named(f"look for the file of {digest[:12]}"):
            return bool(self._fs.exists(self._path(tenant, digest)))

    def delete(self, tenant: str, digest: str) -> None:
        path = self._path(tenant, digest)
        # Another may delete it as well.
        with _named(f"delete the file of {digest[:12]}"), suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def digests(self) -> dict[str, set[str]]:
        """All that is stored, by tenant."""
        found: dict[str, set[str]] = {}
        for path in self._files():
            if path.endswith(SUFFIX):
                tenant, _, name = path.rsplit("/", 3)[1:]
                found.setdefault(tenant, set()).add(name.removesuffix(SUFFIX))
        return found

    def sweep(self, min_age_s: float = 0.0) -> None:
        """Remove what writers that were killed left under temporary names, if it is as old as that."""
        for path in self._files():
            if path.rsplit("/", 1)[1].startswith(PART):
                with _named("delete what a killed writer left"), suppress(FileNotFoundError):
                    if not min_age_s or time.time() - self._fs.modified(path).timestamp() >= min_age_s:
                        self._fs.rm_file(path)

    def _files(self) -> Iterator[str]:
        with _named("list the files"):
            found = self._fs.find(self._root)
        return (str(path) for path in found)

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        """An object store has no empty folders: the last file takes its folder along, at any moment."""
        try:
            found: list[dict[str, Any]] = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            return []
        return found

    def _path(self, tenant: str, digest: str) -> str:
        assert is_tenant_name(tenant), "names are checked where they come in"
        return f"{self._root}/{tenant}/{digest[:2]}/{digest}{SUFFIX}"

    def _make_folder(self, folder: str) -> None:
        if self._is_local:
            make_folder(Path(folder))
        else:
            self._fs.makedirs(folder, exist_ok=True)

    def _move_untenanted(self) -> None:
        for folder in self._listed(self._root):
            if not FOLDER.fullmatch(str(folder["name"]).rstrip("/").rsplit("/", 1)[-1]):
                continue
            for entry in self._listed(folder["name"]):  # a tenant may have such a name, its folders are no files
                name = str(entry["name"]).rsplit("/", 1)[-1]
                if entry["type"] != "file" or not name.endswith(SUFFIX):
                    continue
                path = self._path(DEFAULT_TENANT, name.removesuffix(SUFFIX))
                self._make_folder(path.rsplit("/", 1)[0])
                with suppress(FileNotFoundError):  # another replica opens as well
                    if self._is_local:
                        os.replace(entry["name"], path)
                    else:
                        self._fs.mv(entry["name"], path)


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except PrefixStoreError:
        raise
    except OSError as error:
        reason = f"expected to {what}, got: {error.strerror or type(error).__name__}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(reason, detail=error) from error
        raise UnavailableError(reason, detail=error) from error
    except Exception as error:  # an object store's library has errors of its own
        raise UnavailableError(f"expected to {what}, got: {type(error).__name__}", detail=error) from error


def _fsync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
