"""Content-addressed files of each tenant behind fsspec: a local folder, or any object store by URL."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from prefix_store.errors import (
    DamagedBlobError,
    PrefixStoreError,
    StorageFullError,
    UnavailableError,
)
from prefix_store.native_format import digest_of
from prefix_store.new_file import FULL, appear, fsync_folder
from prefix_store.private_files import create, make_folder
from prefix_store.tenants import DEFAULT_TENANT, is_tenant_name
from prefix_store.trash import Deleted, Trash

OWNER = "REGISTRY"  # no tenant has such a name
MAX_OWNER = 40  # characters
CHUNK_BYTES = 2**22
NO_FILE = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
SUFFIX = ".safetensors"
PART = ".part-"
FOLDER = re.compile(r"[0-9a-f]{2}")
# One that hangs is given up in about a minute: s3fs makes five calls, each of two attempts, 5 s from packet to packet.
S3_TIMES: dict[str, Any] = {"connect_timeout": 3, "read_timeout": 5, "retries": {"total_max_attempts": 2}}


@dataclass(frozen=True)
class StoredFile:
    """A blob, and when it was stored, in seconds since the epoch."""

    tenant: str
    digest: str
    num_bytes: int
    modified_s: float


class Blobs:
    """`root` is a path or an fsspec URL. A blob is `<root>/<tenant>/<xx>/<digest>.safetensors`, and appears under its
    name only when it is whole and on the disk. Tenants share none: what one stores costs another the same time as if
    it were not there. `<root>/REGISTRY` names the registry that refers to the blobs (`file_owner`), `<root>/TRASH`
    has blobs that none refers to.

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
            self.url = self._root if self._is_local else f"{names[0]}://{self._root}"
            self._trash = Trash(self._fs, self._root, is_local=self._is_local)
            self._make_folder(self._root)
            self._move_untenanted()

    def put(self, tenant: str, body: bytes, *, was_whole: bool = False) -> str:
        """Store `body` unless this very content is there, and replace what is damaged; the digest. `was_whole`: the
        caller knows that the content was there a moment ago, so only the file's size is looked at. Raises
        StorageFullError."""
        digest = digest_of(body)
        path = self._path(tenant, digest)
        parent = path.rsplit("/", 1)[0]
        temporary = f"{parent}/{PART}{uuid.uuid4().hex}"
        with _named(f"store a file of {len(body)} bytes"):
            if self._holds(path, body, only_size=was_whole):
                return digest
            try:
                self._make_folder(parent)
                if self._is_local:
                    _write(temporary, body)
                    self._replace(temporary, path)
                    for folder in (parent, parent.rsplit("/", 1)[0], self._root):
                        fsync_folder(folder)
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

    def holds(self, tenant: str, body: bytes) -> bool:
        """Whether `body` is stored, byte for byte."""
        with _named(f"store a file of {len(body)} bytes"):
            return self._holds(self._path(tenant, digest_of(body)), body)

    def get(self, tenant: str, digest: str) -> bytes:
        """The blob, checked against its digest; one that is missing comes back from the trash if it is there. Raises
        DamagedBlobError."""
        path = self._path(tenant, digest)
        with _named(f"read the file of {digest[:12]}"):
            body = self._read(path)
            if body is None:
                self._trash.restore(path)
                body = self._read(path)
        if body is None:
            raise DamagedBlobError(f"the file of {digest[:12]} is missing")
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

    def discard(self, tenant: str, digest: str) -> bool:
        """Move a blob to the trash. False: it is gone, or could not be moved in time."""
        with _named(f"move the file of {digest[:12]} to the trash"):
            return self._trash.put(self._path(tenant, digest))

    def trashed(self, digests: dict[str, set[str]]) -> list[tuple[str, str]]:
        """Those of these digests, by tenant, whose blob is in the trash: tenant and digest."""
        with _named("list the trash"):
            paths = self._trash.paths()
        each = ((tenant, digest) for tenant, found in digests.items() for digest in sorted(found))
        return [(tenant, digest) for tenant, digest in each if self._path(tenant, digest) in paths] if paths else []

    def restore(self, tenant: str, digest: str) -> bool:
        """Move a blob back from the trash. False: it is not there."""
        with _named(f"move the file of {digest[:12]} back from the trash"):
            return self._trash.restore(self._path(tenant, digest))

    def empty_trash(self, grace_s: float) -> Deleted:
        """Delete for good what has been in the trash for `grace_s` seconds."""
        with _named("empty the trash"):
            return self._trash.empty(grace_s)

    def files(self) -> Iterator[StoredFile]:
        """All blobs, the trash apart."""
        for path, found in self._found():
            if path.endswith(SUFFIX):
                tenant, _, name = path.rsplit("/", 3)[1:]
                yield StoredFile(tenant, name.removesuffix(SUFFIX), int(found["size"] or 0), self._modified_s(found))

    def digests(self) -> dict[str, set[str]]:
        """All blobs, by tenant."""
        found: dict[str, set[str]] = {}
        for file in self.files():
            found.setdefault(file.tenant, set()).add(file.digest)
        return found

    def sweep(self, min_age_s: float = 0.0) -> None:
        """Remove what writers that were killed left under temporary names, if it is as old as that."""
        for path, found in self._found():
            if path.rsplit("/", 1)[1].startswith(PART):
                with _named("delete what a killed writer left"), suppress(FileNotFoundError):
                    if not min_age_s or time.time() - self._modified_s(found) >= min_age_s:
                        self._fs.rm_file(path)

    def owner(self, purpose: str = f"read {OWNER}") -> str | None:
        """The id of the registry that these blobs belong to, or whatever stands in its place; None: nothing does. An
        error says what it was asked for."""
        try:
            with _named(purpose):
                found = self._read(f"{self._root}/{OWNER}")
        except DamagedBlobError:
            return ""
        return None if found is None else found.decode(errors="replace").strip()[:MAX_OWNER]

    def set_owner(self, registry_id: str, *, replaces: bool = False) -> None:
        """Say whose blobs these are, unless something says so already and this does not replace it."""
        path, body = f"{self._root}/{OWNER}", f"{registry_id}\n".encode()
        with _named(f"write {OWNER}"):
            if not self._is_local:
                if replaces or not self._fs.exists(path):
                    self._fs.pipe_file(path, body)
                return
            temporary = f"{self._root}/{PART}{uuid.uuid4().hex}"
            _write(temporary, body)
            if replaces:
                self._replace(temporary, path)
                fsync_folder(self._root)
            else:
                appear(Path(temporary), Path(path))

    def _replace(self, temporary: str, path: str) -> None:
        """On a disk: a folder in the place goes to the trash."""
        if os.path.isdir(path) and not os.path.islink(path):
            self._trash.put(path)
        os.replace(temporary, path)

    def _read(self, path: str) -> bytes | None:
        """None: there is no such file. Raises DamagedBlobError for what is no file."""
        try:
            found: bytes = self._fs.cat_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in NO_FILE:
                raise DamagedBlobError(f"expected a file of the name {path.rsplit('/', 1)[1]}, found none") from error
            raise
        return found

    def _holds(self, path: str, body: bytes, *, only_size: bool = False) -> bool:
        """Whether the file at `path` is `body`, or, for `only_size`, as long as `body`."""
        try:
            found = self._fs.info(path)
            if found["type"] != "file" or found["size"] != len(body):
                return False
            if only_size:
                return True
            rest = memoryview(body)
            with self._fs.open(path, "rb", block_size=CHUNK_BYTES) as file:
                while rest:
                    chunk = file.read(CHUNK_BYTES)
                    if not chunk or chunk != rest[: len(chunk)]:
                        return False
                    rest = rest[len(chunk) :]
        except FileNotFoundError:
            return False
        except OSError:
            if self._is_local:  # what cannot be read is replaced
                return False
            raise
        return True

    def _found(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Path and properties of every file but those in the trash."""
        with _named("list the files"):
            found = self._fs.find(self._root, detail=True)
        return ((str(path), each) for path, each in found.items() if not self._trash.has(str(path)))

    def _modified_s(self, found: dict[str, Any]) -> float:
        """What the listing says, or, where it does not, what the file system says of the file."""
        modified = found.get("mtime") or found.get("LastModified") or self._fs.modified(found["name"])
        return float(modified) if isinstance(modified, int | float) else float(modified.timestamp())

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
            make_folder(folder)
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
        if error.errno in FULL:
            raise StorageFullError(reason, detail=error) from error
        raise UnavailableError(reason, detail=error) from error
    except Exception as error:  # an object store's library has errors of its own
        raise UnavailableError(f"expected to {what}, got: {type(error).__name__}", detail=error) from error


def _write(path: str, body: bytes) -> None:
    with create(path) as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
