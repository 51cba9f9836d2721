"""Each tenant's files are its own, and files from before tenants are the default tenant's."""

from __future__ import annotations

import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from prefix_store.blobs import Blobs
from prefix_store.errors import DamagedBlobError
from prefix_store.native_format import digest_of

BODY = b"a body"
DIGEST = digest_of(BODY)


def old_path(root: Path) -> Path:
    return root / DIGEST[:2] / f"{DIGEST}.safetensors"


def test_tenants_share_no_file(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    assert blobs.put("ours", BODY) == blobs.put("theirs", BODY) == DIGEST
    blobs.delete("ours", DIGEST)
    assert (blobs.exists("ours", DIGEST), blobs.exists("theirs", DIGEST)) == (False, True)
    with pytest.raises(DamagedBlobError, match="is missing"):
        blobs.get("ours", DIGEST)
    assert blobs.get("theirs", DIGEST) == BODY
    assert blobs.digests() == {"theirs": {DIGEST}}
    blobs.delete("ours", DIGEST)


def test_untenanted_files_become_the_default_tenants(tmp_path: Path) -> None:
    old_path(tmp_path).parent.mkdir()
    old_path(tmp_path).write_bytes(BODY)
    Blobs(tmp_path).put("theirs", BODY)
    for _ in range(2):
        blobs = Blobs(tmp_path)
        assert blobs.get("default", DIGEST) == BODY
        assert blobs.digests() == {"default": {DIGEST}, "theirs": {DIGEST}}
    assert not old_path(tmp_path).exists()


def test_tenant_named_like_a_folder_of_old_keeps_its_files(tmp_path: Path) -> None:
    tenant = DIGEST[:2]
    Blobs(tmp_path).put(tenant, BODY)
    old_path(tmp_path).write_bytes(BODY)
    blobs = Blobs(tmp_path)
    assert blobs.digests() == {tenant: {DIGEST}, "default": {DIGEST}}


def test_sweep_leaves_parts_that_may_still_be_written(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blobs.put("ours", BODY)
    folder = tmp_path / "ours" / DIGEST[:2]
    for name, age_s in ((".part-new", 0), (".part-old", 100)):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (time.time() - age_s,) * 2)
    blobs.sweep(50)
    assert {path.name for path in folder.iterdir()} == {".part-new", f"{DIGEST}.safetensors"}
    blobs.sweep()
    assert {path.name for path in folder.iterdir()} == {f"{DIGEST}.safetensors"}


def test_two_that_delete_the_same_file_are_both_content(tmp_path: Path) -> None:
    blobs, together = [Blobs(tmp_path) for _ in range(2)], threading.Barrier(2)

    def delete(own: Blobs, digest: str) -> None:
        together.wait()
        own.delete("ours", digest)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(200):
            digest = blobs[0].put("ours", BODY)
            deleting = [pool.submit(delete, own, digest) for own in blobs]
            for each in deleting:
                each.result()
            assert not blobs[0].exists("ours", digest)


@pytest.mark.parametrize("tenant", ["..", "", "a/b", "A"])
def test_no_path_is_made_of_what_is_no_tenant(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(AssertionError):
        Blobs(tmp_path).put(tenant, BODY)


def test_blobs_of_a_url_do_the_same() -> None:
    root = f"memory://{uuid.uuid4().hex}/blobs"
    blobs = Blobs(root)
    assert blobs.put("ours", BODY) == blobs.put("ours", BODY) == blobs.put("theirs", BODY) == DIGEST
    blobs.delete("ours", DIGEST)
    blobs.delete("ours", DIGEST)
    assert blobs.digests() == {"theirs": {DIGEST}}
    fs, path = fsspec.core.url_to_fs(root)
    fs.pipe_file(f"{path}/theirs/{DIGEST[:2]}/.part-old", b"")
    fs.pipe_file(f"{path}/{DIGEST[:2]}/{DIGEST}.safetensors", BODY)
    again = Blobs(root)
    again.sweep(50)
    assert len(fs.find(path)) == 3
    again.sweep()
    assert sorted(fs.find(path)) == [f"{path}/{t}/{DIGEST[:2]}/{DIGEST}.safetensors" for t in ("default", "theirs")]
    assert again.get("default", DIGEST) == BODY
    fs.pipe_file(f"{path}/theirs/{DIGEST[:2]}/{DIGEST}.safetensors", b"other")
    with pytest.raises(DamagedBlobError, match="was altered"):
        again.get("theirs", DIGEST)
