"""An upload of a content whose file was damaged puts the file right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from prefix_store.blobs import Blobs
from prefix_store.errors import DamagedBlobError, UnavailableError
from prefix_store.native_format import digest_of
from prefix_store.store import PrefixStore
from tests.prefix_store.s3_process import S3Process
from tests.prefix_store.small_prefixes import OURS, THEIRS, ensemble, publish

BODY = bytes(range(256)) * 40


def is_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_bytes(b"kept")


def is_symlink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def is_unreadable(path: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b"") and None,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0") and None,
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f") and None,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "a folder": is_folder,
    "a symlink to nothing": lambda path: is_symlink(path, "nowhere"),
    "a symlink to itself": lambda path: is_symlink(path, path.name),
    "a symlink to something else": lambda path: is_symlink(path, __file__),
    "unreadable": is_unreadable,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_replaced(damage: str, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    digest = blobs.put(OURS, BODY)
    path = next((tmp_path / "blobs").rglob("*.safetensors"))
    DAMAGES[damage](path)
    with pytest.raises((DamagedBlobError, UnavailableError)):
        blobs.get(OURS, digest)
    source = Path(__file__).read_bytes()
    for _ in range(2):
        assert blobs.put(OURS, BODY) == digest
        assert blobs.get(OURS, digest) == BODY
    assert path.is_file()
    assert not path.is_symlink()
    assert Path(__file__).read_bytes() == source
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("damaged", [None, b"", BODY[:-1], bytes(len(BODY))], ids=["missing", "empty", "cut", "zeros"])
@pytest.mark.parametrize("where", ["s3", "memory"])
def test_damaged_object_is_replaced(where: str, damaged: bytes | None, request: pytest.FixtureRequest) -> None:
    root = "memory://repair"
    if where == "s3":
        s3: S3Process = request.getfixturevalue("s3")
        root = s3.make_bucket()
    blobs = Blobs(root)
    digest = blobs.put(OURS, BODY)
    fs, path = fsspec.core.url_to_fs(root)
    path = f"{path}/{OURS}/{digest[:2]}/{digest}.safetensors"
    fs.rm_file(path) if damaged is None else fs.pipe_file(path, damaged)
    assert blobs.put(OURS, BODY) == digest
    assert Blobs(root).get(OURS, digest) == BODY


def test_whole_file_is_left_as_it_is(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blobs.put(OURS, BODY)
    path = next(tmp_path.rglob("*.safetensors"))
    before = path.stat()
    blobs.put(OURS, BODY)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_repair_ends_the_quarantine_of_all_versions_with_that_content(store: PrefixStore, tmp_path: Path) -> None:
    made = publish(store, "t", 1)
    for task in ("t", "u"):
        publish(store, task, 1)
        publish(store, task, 2)
    ensemble(store, "e", "t@1", "u@2")
    publish(store, "t", 1, tenant=THEIRS)
    for tenant, task, version in ((OURS, "t", 1), (OURS, "t", 2), (OURS, "u", 1), (OURS, "e", 1), (THEIRS, "t", 1)):
        store.quarantine(tenant, task, version)
    assert not publish(store, "t", 1).is_repair
    assert store.get_task(OURS, "t").quarantined == (1, 2)
    DAMAGES["truncated"](tmp_path / "blobs" / OURS / made.version.digest[:2] / f"{made.version.digest}.safetensors")
    again = publish(store, "u", 1)
    assert (again.is_new, again.is_repair) == (False, True)
    assert digest_of(store.file_bytes(again.version)) == again.version.digest
    assert [store.get_task(OURS, task).quarantined for task in ("t", "u", "e")] == [(2,), (), ()]
    assert store.get_task(THEIRS, "t").quarantined == (1,)
