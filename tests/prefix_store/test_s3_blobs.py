"""Files on an object store: a real S3 server process, moto's, over HTTP."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from prefix_store.blobs import S3_TIMES, Blobs
from prefix_store.errors import DamagedBlobError, UnavailableError, in_full
from prefix_store.redis_registry import RedisRegistry
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.s3_process import S3Process
from tests.prefix_store.small_prefixes import AT_ONCE, OURS, SHAPE, THEIRS, publish, soft
from tests.waiting import eventually

BODY = b"what a tenant stores"


@pytest.fixture
def root(s3: S3Process) -> str:
    return s3.make_bucket()


def test_files_come_back_whole_and_go(root: str) -> None:
    blobs = Blobs(root)
    digest = blobs.put(OURS, BODY)
    assert blobs.put(THEIRS, BODY) == blobs.put(OURS, BODY) == digest
    assert blobs.get(OURS, digest) == BODY
    blobs.delete(OURS, digest)
    assert blobs.digests() == {THEIRS: {digest}}
    assert not blobs.exists(OURS, digest)


def test_one_replica_sees_at_once_what_another_stored_and_deleted(root: str) -> None:
    one, other = Blobs(root), Blobs(root)
    digest = one.put(OURS, b"first")
    assert other.digests() == {OURS: {digest}}
    fs, path = fsspec.core.url_to_fs(root, use_listings_cache=False, skip_instance_cache=True)
    fs.rm_file(f"{path}/{OURS}/{digest[:2]}/{digest}.safetensors")  # as a replica on another machine does
    assert not other.exists(OURS, digest)
    assert other.digests() == {}
    assert one.put(OURS, b"first") == digest
    assert other.get(OURS, digest) == b"first"


def test_altered_and_missing_files_are_refused(root: str) -> None:
    blobs = Blobs(root)
    digest = blobs.put(OURS, BODY)
    fs, path = fsspec.core.url_to_fs(root)
    fs.pipe_file(f"{path}/{OURS}/{digest[:2]}/{digest}.safetensors", BODY[:-1])
    with pytest.raises(DamagedBlobError, match="was altered"):
        blobs.get(OURS, digest)
    with pytest.raises(DamagedBlobError, match="is missing"):
        blobs.get(THEIRS, digest)


def test_a_store_publishes_loads_and_deletes(root: str, tmp_path: Path) -> None:
    store = PrefixStore(SqliteRegistry(tmp_path / "registry.sqlite"), Blobs(root), SHAPE)
    digest = publish(store, "films", 1).version.digest
    again = PrefixStore(SqliteRegistry(tmp_path / "registry.sqlite"), Blobs(root), SHAPE)
    loaded = again.load(OURS, digest)
    assert loaded.embeddings is not None
    assert loaded.embeddings.equal(soft(1).embeddings)
    again.delete_task(OURS, "films")
    assert Blobs(root).digests() == {}


def test_a_replica_opens_while_the_only_file_comes_and_goes(root: str) -> None:
    """The folder is there only with the file."""
    other, is_done = Blobs(root), threading.Event()

    def come_and_go() -> None:
        while not is_done.is_set():
            other.delete(OURS, other.put(OURS, BODY))

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(come_and_go)
        try:
            for _ in range(100):
                Blobs(root)
        finally:
            is_done.set()
        changing.result()


def test_rubbish_is_collected_while_uploads_go_on(root: str, redis_process: RedisProcess) -> None:
    """What another replica's collector finds unused goes; what is being published does not."""
    store, other = [PrefixStore(RedisRegistry(redis_process.url), Blobs(root), SHAPE) for _ in range(2)]
    unused = Blobs(root).put(THEIRS, BODY)
    is_done = threading.Event()

    def collect() -> None:
        while not is_done.is_set():
            other.sweep(AT_ONCE)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for number in range(30):
            digest = publish(store, "films", number % 3).version.digest
            assert Blobs(root).exists(OURS, digest)
            if number % 3 == 2:
                store.delete_task(OURS, "films")
                # Where the collector is at it, it takes a moment more to copy the file to the trash.
                eventually(lambda: Blobs(root).digests().get(OURS, set()) == set())
    finally:
        is_done.set()
        collector.join()
    assert not Blobs(root).exists(THEIRS, unused)
    store.close()
    other.close()


def test_a_store_that_is_away_is_told_of(s3: S3Process, root: str) -> None:
    blobs = Blobs(root)
    digest = blobs.put(OURS, BODY)
    s3.kill()
    with pytest.raises(UnavailableError, match="expected to store a file of 5 bytes, got"):
        blobs.put(OURS, b"other")
    with pytest.raises(UnavailableError, match="expected to read the file of"):
        blobs.get(OURS, digest)
    with pytest.raises(UnavailableError, match="expected to delete the file of"):
        blobs.delete(OURS, digest)


def test_a_deletion_is_done_though_its_file_cannot_be_reached(s3: S3Process, root: str, tmp_path: Path) -> None:
    registry = SqliteRegistry(tmp_path / "registry.sqlite")
    store = PrefixStore(registry, Blobs(root), SHAPE)
    for seed in (1, 2):
        publish(store, "t", seed)
    s3.kill()
    assert store.delete_version(OURS, "t", "1").version == 1
    assert [version.version for version in store.delete_task(OURS, "t").versions] == [2]
    assert store.list_tasks(OURS) == []
    store.close()


def test_a_store_that_hangs_is_told_of_as_well(s3: S3Process, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ten attempts; with what the library has of itself it were 25, of a quarter of a minute each."""
    monkeypatch.setitem(S3_TIMES, "read_timeout", 0.5)
    blobs = Blobs(root)
    digest = blobs.put(OURS, BODY)
    s3.stop()
    asked_s = time.monotonic()
    with pytest.raises(UnavailableError, match="expected to read the file of"):
        blobs.get(OURS, digest)
    assert time.monotonic() - asked_s < 15
    s3.go_on()
    assert blobs.get(OURS, digest) == BODY


def test_what_is_not_there_at_the_start_is_told_of(s3: S3Process) -> None:
    root = s3.make_bucket()
    s3.kill()
    fsspec.filesystem("s3").clear_instance_cache()
    for url, reason in ((root, "Could not connect"), ("nonsense://x", "Protocol not known")):
        with pytest.raises(UnavailableError, match="expected to open where the files are, got: ") as refused:
            Blobs(url)
        assert reason in in_full(refused.value)
