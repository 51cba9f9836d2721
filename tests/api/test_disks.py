"""A full disk, and one that can only be read: changes are refused by their reason and leave nothing, known tasks answer
on, and all goes on without a restart when there is room again."""

from __future__ import annotations

import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from prefix_store.errors import StorageFullError
from server.api import upkeep
from server.cli import app
from server.config import Settings
from server.model_files import ModelFiles
from server.start import make_state, open_registry, publish_examples
from tests.byte_model import save_prompt
from tests.conftest import NAME, Served, native, serve_in_thread, settings_for
from tests.prefix_store.redis_process import RedisProcess
from tests.waiting import eventually

SIZE = 1024 * 1024
PROMPT = "A fine film."


class SmallDisk:
    """A file system of its own of `SIZE` bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs")

    def fill(self) -> None:
        with (self.path / "filler").open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.path / "filler").unlink()

    def set_read_only(self, is_read_only: bool) -> None:
        """Only while nothing on it is open to be written."""
        self._mount("-o", f"remount,{'ro' if is_read_only else 'rw'}")

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.path], check=True)

    def _mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, self.path], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    found = SmallDisk(tmp_path / "disk")
    yield found
    found.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path / "redis")
    process.start()
    yield process
    process.kill()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Usage and what is resident are written all the time."""
    monkeypatch.setattr(upkeep, "FLUSH_S", 0.1)
    monkeypatch.setattr(upkeep, "SAVE_S", 0.1)


@contextmanager
def serving(settings: Settings, model_path: Path) -> Iterator[Served]:
    server = serve_in_thread(make_state(settings, ModelFiles(model_path, NAME)))
    try:
        yield next(server)
    finally:
        with pytest.raises(StopIteration):
            next(server)


def answers(served: Served, seconds: float) -> int:
    """How many requests for the known task and the bare model are answered in that time: none may fail."""
    count, end_s = 0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        for task in ("t", None):
            assert served.generate(PROMPT, task, max_new_tokens=2).status_code == 200
            count += 1
    return count


def num_used(served: Served) -> int:
    return sum(row["num_requests"] for row in served.http.get("/v1/usage").json()["usage"])


def stored_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def check_refused(served: Served, blobs: Path, status: int, reason: str) -> None:
    """Uploads to a known task and to a new one, and what is stored after them."""
    files = stored_files(blobs)
    for seed in range(10, 16):
        for task in ("t", "u"):
            refused = served.put(task, native(seed))
            assert refused.status_code == status, refused.text
            assert reason in refused.json()["detail"]
    assert [one["version"] for one in served.http.get("/v1/prefixes/t").json()["versions"]] == [1]
    assert served.http.get("/v1/prefixes/u").status_code == 404
    assert stored_files(blobs) == files


@pytest.mark.parametrize("blobs_are", ["beside", "elsewhere"])
def test_full_disk_of_the_embedded_registry(disk: SmallDisk, blobs_are: str, model_path: Path, tmp_path: Path) -> None:
    blobs = disk.path / "data" / "blobs" if blobs_are == "beside" else tmp_path / "blobs"
    with serving(settings_for(disk.path / "data", blob_url=str(blobs)), model_path) as served:
        assert served.put("t", native(1)).status_code == 201
        num_before = answers(served, 0.3)
        disk.fill()
        check_refused(served, blobs, 507, "No space left" if blobs_are == "beside" else "is full")
        num_full = answers(served, 1.0)
        assert served.http.get("/readyz").status_code == 200
        disk.free()
        eventually(lambda: num_used(served) == num_before + num_full)  # what was used meanwhile was kept
        assert served.put("t", native(2)).status_code == 201
        assert served.generate(PROMPT, "t", max_new_tokens=1).headers["X-Prefix-Version"] == "2"


def test_full_disk_of_a_replicas_copy(disk: SmallDisk, redis: RedisProcess, model_path: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    settings = settings_for(disk.path / "data", redis_url=redis.url, blob_url=str(blobs))
    with serving(settings, model_path) as served:
        assert served.put("t", native(1)).status_code == 201
        disk.fill()
        eventually(lambda: served.http.get("/readyz").json()["registry"] == "degraded")
        check_refused(served, blobs, 507, "is full")
        answers(served, 1.0)
        assert served.http.get("/readyz").json() == {"status": "ready", "registry": "degraded"}
        disk.free()
        eventually(lambda: served.http.get("/readyz").json()["registry"] == "ok")
        assert served.put("t", native(2)).status_code == 201
        assert served.generate(PROMPT, "t", max_new_tokens=1).headers["X-Prefix-Version"] == "2"


def test_files_that_can_only_be_read(disk: SmallDisk, model_path: Path, tmp_path: Path) -> None:
    with serving(settings_for(tmp_path / "data", blob_url=str(disk.path)), model_path) as served:
        assert served.put("t", native(1)).status_code == 201
        disk.set_read_only(True)
        check_refused(served, disk.path, 503, "Read-only file system")
        answers(served, 0.3)
        disk.set_read_only(False)
        assert served.put("t", native(2)).status_code == 201


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_start_on_a_full_disk(kind: str, disk: SmallDisk, redis: RedisProcess, model_path: Path) -> None:
    """After a stop SQLite needs some room beside its file; after a kill it has that, and the server starts."""
    settings = settings_for(disk.path, redis_url=redis.url if kind == "redis" else None)
    with serving(settings, model_path) as served:
        assert served.put("t", native(1)).status_code == 201
    disk.fill()
    with pytest.raises(StorageFullError, match="is full"):
        open_registry(settings)
    disk.free()
    with serving(settings, model_path) as served:
        answers(served, 0.3)
        other = sqlite3.connect(disk.path / ("registry.sqlite" if kind == "sqlite" else "mirror.sqlite"))
        other.execute("SELECT * FROM tenants").fetchall()  # what is beside the file stays, as after a kill
    disk.fill()
    with serving(settings, model_path) as served:
        check_refused(served, disk.path / "blobs", 507, "")
        answers(served, 0.3)
        disk.free()
        eventually(lambda: served.put("t", native(2)).status_code == 201)
    other.close()


def test_examples_that_find_no_room_do_not_end_the_start(disk: SmallDisk, model_path: Path, tmp_path: Path) -> None:
    for task in ("t", "u", "v"):
        save_prompt(tmp_path / "examples" / task)
    with serving(settings_for(disk.path), model_path) as served:
        assert served.put("t", native(1)).status_code == 201
        disk.fill()
        with capture_logs() as logs:
            publish_examples(served.state.store, tmp_path / "examples")
        refused = [(line["task"], line["reason"]) for line in logs if line["event"] == "example_not_published"]
        assert [task for task, _ in refused] == ["u", "v"]
        assert all("No space left" in reason for _, reason in refused)
        answers(served, 0.3)
        disk.free()
        publish_examples(served.state.store, tmp_path / "examples")
        for task in ("u", "v"):
            assert served.generate(PROMPT, task, max_new_tokens=1).status_code == 200


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_start_on_a_disk_that_can_only_be_read_is_refused_in_a_line(
    kind: str, disk: SmallDisk, redis: RedisProcess, model_path: Path
) -> None:
    redis_url = redis.url if kind == "redis" else None
    with serving(settings_for(disk.path, redis_url=redis_url), model_path) as served:
        assert served.put("t", native(1)).status_code == 201
    disk.set_read_only(True)
    options = ["--redis-url", redis_url] if redis_url else []
    done = CliRunner().invoke(app, ["serve", "--data-dir", str(disk.path), "--model", str(model_path), *options])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "expected to read and write the registry, got: unable to open database file" in done.output
