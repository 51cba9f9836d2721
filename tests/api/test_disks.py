"""A full disk, and one that can only be read: changes are refused by their reason and leave nothing, known tasks answer
on, and all goes on without a restart when there is room again."""

from __future__ import annotations

import re
import resource
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from structlog.testing import capture_logs

from server.config import Settings
from server.start import publish_examples
from tests.api.limited_server import DISKS, Disk, LimitedServer, run, serving
from tests.byte_model import save_prompt
from tests.conftest import Served, native, settings_for
from tests.prefix_store.redis_process import RedisProcess
from tests.prefix_store.s3_process import S3Process
from tests.waiting import eventually

PROMPT = "A fine film."
FULL = "No space left|File too large"
READ_ONLY = "Read-only file system|Permission denied"


@pytest.fixture(params=DISKS, ids=lambda kind: kind.kind)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    found: Disk = request.param(tmp_path / "disk")
    yield found
    found.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path / "redis")
    process.start()
    yield process
    process.kill()


def answers(served: LimitedServer, seconds: float) -> int:
    """How many requests for the known task and the bare model are answered in that time: none may fail."""
    count, end_s = 0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        for task in ("t", None):
            assert served.generate(PROMPT, task, max_new_tokens=2).status_code == 200
            count += 1
    return count


def num_used(served: LimitedServer) -> int:
    return sum(row["num_requests"] for row in served.http.get("/v1/usage").json()["usage"])


def stored_files(blobs: str) -> list[str]:
    fs, path = fsspec.core.url_to_fs(blobs, use_listings_cache=False)
    return sorted(fs.find(path))


def check_refused(served: LimitedServer, blobs: str, status: int, reason: str) -> None:
    """Uploads to a known task and to a new one, and what is stored after them."""
    files = stored_files(blobs)
    for seed in range(10, 16):
        for task in ("t", "u"):
            refused = served.put(task, native(seed))
            assert refused.status_code == status, refused.text
            assert re.search(reason, refused.json()["detail"])
    assert [one["version"] for one in served.http.get("/v1/prefixes/t").json()["versions"]] == [1]
    assert served.http.get("/v1/prefixes/u").status_code == 404
    assert stored_files(blobs) == files


@pytest.mark.parametrize("blobs_are", ["beside", "elsewhere"])
def test_full_disk_of_the_embedded_registry(
    disk: Disk, blobs_are: str, model_path: Path, request: pytest.FixtureRequest
) -> None:
    blobs = str(disk.path / "data" / "blobs")
    if blobs_are == "elsewhere":
        s3: S3Process = request.getfixturevalue("s3")
        blobs = s3.make_bucket()
    settings = settings_for(disk.path / "data", blob_url=blobs)
    with serving(settings, model_path, disk) as served:
        assert served.put("t", native(1)).status_code == 201
        num_before = answers(served, 0.3)
        disk.fill(served)
        check_refused(served, blobs, 507, FULL if blobs_are == "beside" else "is full")
        num_full = answers(served, 1.0)
        assert served.http.get("/readyz").status_code == 200
        disk.free(served)
        eventually(lambda: num_used(served) == num_before + num_full)  # what was used meanwhile was kept
        assert served.put("t", native(2)).status_code == 201
        assert served.generate(PROMPT, "t", max_new_tokens=1).headers["X-Prefix-Version"] == "2"


def test_full_disk_of_a_replicas_copy(disk: Disk, redis: RedisProcess, model_path: Path, tmp_path: Path) -> None:
    blobs = str(tmp_path / "blobs")
    settings = settings_for(disk.path / "data", redis_url=redis.url, blob_url=blobs)
    with serving(settings, model_path, disk) as served:
        assert served.put("t", native(1)).status_code == 201
        disk.fill(served)
        eventually(lambda: served.http.get("/readyz").json()["registry"] == "degraded")
        check_refused(served, blobs, 507, "is full")
        answers(served, 1.0)
        assert served.http.get("/readyz").json() == {"status": "ready", "registry": "degraded"}
        disk.free(served)
        eventually(lambda: served.http.get("/readyz").json()["registry"] == "ok")
        assert served.put("t", native(2)).status_code == 201
        assert served.generate(PROMPT, "t", max_new_tokens=1).headers["X-Prefix-Version"] == "2"


def test_files_that_can_only_be_read(disk: Disk, model_path: Path, tmp_path: Path) -> None:
    with serving(settings_for(tmp_path / "data", blob_url=str(disk.path)), model_path, disk) as served:
        assert served.put("t", native(1)).status_code == 201
        disk.set_read_only(True)
        check_refused(served, str(disk.path), 503, READ_ONLY)
        answers(served, 0.3)
        disk.set_read_only(False)
        assert served.put("t", native(2)).status_code == 201


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_start_on_a_full_disk(kind: str, disk: Disk, redis: RedisProcess, model_path: Path) -> None:
    """After a stop SQLite needs some room beside its file; after a kill it has that, and the server starts."""
    settings = settings_for(disk.path, redis_url=redis.url if kind == "redis" else None)
    with serving(settings, model_path, disk) as served:
        assert served.put("t", native(1)).status_code == 201
    disk.fill()
    check_refused_start(disk, settings, model_path, "the registry has no room: database or disk is full")
    disk.free()
    with serving(settings, model_path, disk) as served:
        answers(served, 0.3)
        other = sqlite3.connect(disk.path / ("registry.sqlite" if kind == "sqlite" else "mirror.sqlite"))
        other.execute("SELECT * FROM tenants").fetchall()  # what is beside the file stays, as after a kill
    disk.fill()
    with serving(settings, model_path, disk) as served:
        check_refused(served, str(disk.path / "blobs"), 507, "")
        answers(served, 0.3)
        disk.free(served)
        eventually(lambda: served.put("t", native(2)).status_code == 201)
    other.close()


def published_examples(served: Served, folder: Path) -> list[tuple[str, str]]:
    """Those that could not be, and why."""
    with capture_logs() as logs:
        publish_examples(served.state.store, folder)
    return [(line["task"], line["reason"]) for line in logs if line["event"] == "example_not_published"]


def test_examples_that_find_no_room_do_not_end_the_start(disk: Disk, model_path: Path, tmp_path: Path) -> None:
    for task in ("t", "u", "v"):
        save_prompt(tmp_path / "examples" / task)
    with serving(settings_for(disk.path), model_path, disk) as served:
        assert served.put("t", native(1)).status_code == 201
        disk.fill(served)
        refused = served.call(published_examples, tmp_path / "examples")
        assert [task for task, _ in refused] == ["u", "v"]
        assert all(re.search(FULL, reason) for _, reason in refused)
        answers(served, 0.3)
        disk.free(served)
        assert served.call(published_examples, tmp_path / "examples") == []
        for task in ("u", "v"):
            assert served.generate(PROMPT, task, max_new_tokens=1).status_code == 200


def test_examples_that_are_damaged_do_not_end_the_start(disk: Disk, model_path: Path, tmp_path: Path) -> None:
    for task in ("t", "u", "v"):
        save_prompt(tmp_path / "examples" / task)
    (tmp_path / "examples" / "t" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "examples" / "u" / "adapter_config.json").write_text("{")
    with serving(settings_for(disk.path), model_path, disk) as served:
        refused = served.call(published_examples, tmp_path / "examples")
        assert [task for task, _ in refused] == ["t", "u"]
        assert served.generate(PROMPT, "v", max_new_tokens=1).status_code == 200


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_start_on_a_disk_that_can_only_be_read_is_refused_in_a_line(
    kind: str, disk: Disk, redis: RedisProcess, model_path: Path
) -> None:
    settings = settings_for(disk.path, redis_url=redis.url if kind == "redis" else None)
    with serving(settings, model_path, disk) as served:
        assert served.put("t", native(1)).status_code == 201
    disk.set_read_only(True)
    check_refused_start(disk, settings, model_path, "expected to read and write the registry, got: ")
    disk.set_read_only(False)


def check_refused_start(disk: Disk, settings: Settings, model_path: Path, reason: str) -> None:
    options = ["--redis-url", settings.redis_url] if settings.redis_url else []
    code, output = run(disk, "serve", "--data-dir", str(disk.path), "--model", str(model_path), *options)
    assert (code, output.count("\n")) == (1, 1), output
    assert reason in output


def test_small_limit_on_the_size_of_files_is_a_full_disk_too(disk: Disk, model_path: Path, tmp_path: Path) -> None:
    """A file that begins within the limit and ends beyond it."""
    with serving(settings_for(tmp_path / "data"), model_path, disk) as served:
        assert served.put("t", native(1)).status_code == 201
        limit = len(native(1)) // 2
        resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        check_refused(served, str(tmp_path / "data" / "blobs"), 507, "File too large")
        answers(served, 0.3)
