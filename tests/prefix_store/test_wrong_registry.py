"""A registry deletes only what it can be sure of: on a disk and on S3, in SQLite and in Redis."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from prefix_store.blobs import Blobs
from prefix_store.errors import ForeignFilesError
from prefix_store.file_owner import claim, take_over
from prefix_store.mirror import Mirror
from prefix_store.redis_registry import RedisRegistry
from prefix_store.registry import Registry
from prefix_store.registry_copy import copy
from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.store import PrefixStore
from prefix_store.sweep import SweepRules
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.s3_process import S3Process
from tests.prefix_store.small_prefixes import AT_ONCE, OURS, SHAPE, THEIRS, publish

IN_TRASH = SweepRules(min_age_s=0, max_share=1.0)


class Places:
    """Registries of one kind, by number, and one root."""

    def __init__(self, root: str, folder: Path, redis: RedisProcess | None) -> None:
        self.root = root
        self.folder = folder
        self._redis = redis
        self._opened: list[Registry] = []

    def registry(self, number: int = 0) -> Registry:
        if self._redis is None:
            found: Registry = SqliteRegistry(self.folder / str(number) / "registry.sqlite")
        else:
            found = RedisRegistry(self._redis.url.removesuffix("0") + str(number))
        self._opened.append(found)
        return found

    def store(self, number: int = 0) -> PrefixStore:
        return PrefixStore(self.registry(number), Blobs(self.root), SHAPE)

    def claim(self, number: int = 0) -> str | None:
        return claim(self.registry(number), Blobs(self.root))

    def swap(self, number: int) -> None:
        """The registries 0 and `number` trade places, as where a backup is put back or a wrong one is given."""
        self.close()
        if self._redis is None:
            one, other = self.folder / "0", self.folder / str(number)
            one.rename(self.folder / "kept")
            other.rename(one) if other.exists() else None
            (self.folder / "kept").rename(other)
        else:
            with self._redis.client() as client:
                client.swapdb(0, number)

    def close(self) -> None:
        for registry in self._opened:
            registry.close()
        self._opened = []

    def files(self) -> dict[str, bytes]:
        """All blobs, in the trash too, by path below the root."""
        fs, path = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        found = fs.find(path)
        return {each.removeprefix(f"{path}/"): fs.cat_file(each) for each in found if each.endswith(".safetensors")}


@pytest.fixture(scope="module")
def object_store() -> Iterator[S3Process]:
    process = S3Process()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in process.environment.items():
            patched.setenv(name, value)
        yield process
    process.kill()


@pytest.fixture(params=["files", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "files":
        return str(tmp_path / "blobs")
    s3: S3Process = request.getfixturevalue("object_store")
    return s3.make_bucket()


@pytest.fixture(params=["sqlite", "redis"])
def places(request: pytest.FixtureRequest, root: str, tmp_path: Path) -> Iterator[Places]:
    redis = request.getfixturevalue("redis_process") if request.param == "redis" else None
    found = Places(root, tmp_path / "registries", redis)
    yield found
    found.close()


def fill(store: PrefixStore) -> None:
    for seed, tenant in enumerate((OURS, OURS, THEIRS)):
        publish(store, f"t{seed}", seed, tenant=tenant)


def check_whole(store: PrefixStore) -> None:
    for seed, tenant in enumerate((OURS, OURS, THEIRS)):
        assert store.load(tenant, store.resolve(tenant, f"t{seed}").digest).embeddings is not None


@pytest.mark.parametrize("is_marked", [True, False], ids=["marked", "of an earlier version"])
@pytest.mark.parametrize("other", ["new", "with tasks of its own"])
def test_another_registry_is_refused_and_takes_no_file(places: Places, is_marked: bool, other: str) -> None:
    if is_marked:
        places.claim()
    fill(places.store())
    if other != "new":
        publish(PrefixStore(places.registry(1), Blobs(places.folder / "elsewhere"), SHAPE), "own", 9)
    files = places.files()
    assert len(files) == 3
    with pytest.raises(ForeignFilesError, match="registry take-over") as refused:
        places.claim(1)
    assert Blobs(places.root).url in str(refused.value)
    assert places.registry(1).identity().id in str(refused.value)
    if is_marked:
        assert places.registry().identity().id in str(refused.value)
        assert "belong to" in places.store(1).sweep(AT_ONCE).reason
        with pytest.raises(ForeignFilesError):
            publish(places.store(1), "more", 7)
    assert places.files() == files
    for _ in range(2):
        assert places.claim() is None
        assert places.store().sweep(AT_ONCE).num_files == 0
        check_whole(places.store())


def test_registry_that_is_moved_away_for_a_start_finds_all_files(places: Places) -> None:
    places.claim()
    fill(places.store())
    files = places.files()
    places.swap(1)
    with pytest.raises(ForeignFilesError):
        places.claim()
    places.store().sweep(AT_ONCE)
    assert places.files() == files
    places.swap(1)
    places.claim()
    check_whole(places.store())


def test_another_registrys_deletion_leaves_the_file(places: Places) -> None:
    """The same content is a version of both: one has another root, and was given this one while it ran."""
    places.claim()
    fill(places.store())
    publish(PrefixStore(places.registry(1), Blobs(places.folder / "elsewhere"), SHAPE), "t0", 0)
    files = places.files()
    other = places.store(1)
    other.delete_task(OURS, "t0")
    assert places.files() == files
    assert other.list_tasks(OURS) == []
    check_whole(places.store())


def test_taking_over_gives_the_files_to_another_registry(places: Places) -> None:
    places.claim()
    fill(places.store())
    first = places.registry().identity().id
    assert take_over(places.registry(1), Blobs(places.root)) == first
    assert places.claim(1) is None
    with pytest.raises(ForeignFilesError):
        places.claim()
    publish(places.store(1), "mine", 8)
    assert places.store(1).sweep(SweepRules(min_age_s=0)).num_kept == 3  # of 4: more than a share
    assert take_over(places.registry(), Blobs(places.root)) is not None
    check_whole(places.store())


def test_copy_takes_over_and_its_source_is_refused_then(places: Places, tmp_path: Path) -> None:
    places.claim()
    fill(places.store())
    source = places.registry()
    copied = SqliteRegistry(tmp_path / "copied.sqlite")
    copy(source, copied)
    assert copied.identity().id != source.identity().id
    assert claim(copied, Blobs(places.root)) == source.identity().id
    assert claim(copied, Blobs(places.root)) is None
    check_whole(PrefixStore(copied, Blobs(places.root), SHAPE))
    with pytest.raises(ForeignFilesError):
        places.claim()
    copied.close()


def test_orphan_goes_to_the_trash_and_after_its_time_for_good(places: Places) -> None:
    places.claim()
    fill(places.store())
    digest = Blobs(places.root).put("gone", b"of a killed upload")
    before = places.files()
    assert places.store().sweep().num_files == 0  # it is young
    assert places.files() == before
    swept = places.store().sweep(SweepRules(min_age_s=0))
    assert (swept.num_files, swept.num_bytes, swept.num_deleted) == (1, len(b"of a killed upload"), 0)
    assert not Blobs(places.root).exists("gone", digest)
    assert sorted(places.files().values()) == sorted(before.values())
    swept = places.store().sweep(SweepRules(min_age_s=0, grace_s=0))
    assert (swept.num_files, swept.num_deleted, swept.deleted_bytes) == (0, 1, len(b"of a killed upload"))
    assert len(places.files()) == 3
    check_whole(places.store())


def test_no_more_than_a_share_goes_without_being_told(places: Places) -> None:
    places.claim()
    store = places.store()
    publish(store, "known", 1)
    for number in range(2):
        Blobs(places.root).put("gone", bytes(number))
    swept = store.sweep(SweepRules(min_age_s=0))
    assert (swept.num_files, swept.num_kept) == (0, 2)
    assert "knows 1 of 3 files" in swept.reason
    assert store.sweep(IN_TRASH).num_files == 2


@pytest.mark.parametrize("comes_back", ["at a start", "when it is read", "with an upload"])
def test_registry_that_knows_a_file_again_gets_it_back(places: Places, comes_back: str) -> None:
    """A backup is put back that knows fewer tasks, and then one that knows them again."""
    places.claim()
    fill(places.store())
    files = places.files()
    identity = places.registry().identity()
    publish(PrefixStore(places.registry(1), Blobs(places.folder / "elsewhere"), SHAPE), "other", 9)
    take_over(places.registry(1), Blobs(places.root))
    assert places.store(1).sweep(IN_TRASH).num_files == 3
    assert not files.keys() & places.files().keys()
    take_over(places.registry(), Blobs(places.root))
    assert places.registry().identity() == identity
    store = places.store()
    if comes_back == "at a start":
        assert store.sweep().num_restored == 3
    elif comes_back == "with an upload":
        for seed, tenant in enumerate((OURS, OURS, THEIRS)):
            assert not publish(store, f"t{seed}", seed, tenant=tenant).is_new
    check_whole(store)
    assert files.items() <= places.files().items()


def test_replicas_that_start_at_once_agree(root: str, redis_process: RedisProcess, tmp_path: Path) -> None:
    mirrors = [Mirror(RedisRegistry(redis_process.url), tmp_path / f"copy-{i}.sqlite") for i in range(4)]
    for mirror in mirrors:
        mirror.start()
    Blobs(root).put("gone", b"of a killed upload")
    take_over(mirrors[0], Blobs(root))
    fill(PrefixStore(mirrors[0], Blobs(root), SHAPE))
    together = threading.Barrier(len(mirrors))

    def start(mirror: Mirror) -> int:
        together.wait()
        claim(mirror, Blobs(root))
        store = PrefixStore(mirror, Blobs(root), SHAPE)
        num_files = store.sweep(SweepRules(min_age_s=0)).num_files
        check_whole(store)
        return num_files

    with ThreadPoolExecutor(len(mirrors)) as pool:
        assert sum(pool.map(start, mirrors)) == 1
    for mirror in mirrors:
        mirror.close()


def test_two_registries_that_claim_a_root_at_once_are_not_both_its_owner(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def start(number: int) -> bool:
        registry = SqliteRegistry(tmp_path / f"{number}.sqlite")
        together.wait()
        try:
            claim(registry, Blobs(tmp_path / "blobs"))
        except ForeignFilesError:
            return False
        finally:
            registry.close()
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(start, range(4))) == 1


@pytest.mark.parametrize("content", ["", "no id", "\0" * 33, None])
def test_damaged_mark_is_refused_and_can_be_written_anew(tmp_path: Path, content: str | None) -> None:
    registry, blobs = SqliteRegistry(tmp_path / "registry.sqlite"), Blobs(tmp_path / "blobs")
    publish(PrefixStore(registry, blobs, SHAPE), "t", 1)
    mark = tmp_path / "blobs" / "REGISTRY"
    mark.mkdir() if content is None else mark.write_text(content)
    with pytest.raises(ForeignFilesError, match="take-over"):
        claim(registry, blobs)
    take_over(registry, blobs)
    assert claim(registry, blobs) is None
    registry.close()


def test_what_is_in_the_trash_under_other_names_stays(tmp_path: Path) -> None:
    registry, blobs = SqliteRegistry(tmp_path / "registry.sqlite"), Blobs(tmp_path / "blobs")
    publish(PrefixStore(registry, blobs, SHAPE), "t", 1)
    kept = tmp_path / "blobs" / "TRASH" / "mine" / "file"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"")
    os.utime(kept, (time.time() - 1e8,) * 2)
    PrefixStore(registry, blobs, SHAPE).sweep(AT_ONCE)
    assert kept.exists()
    registry.close()
