"""A start with another registry than the files': one line, and no file is touched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from prefix_store.blobs import Blobs
from prefix_store.sqlite_registry import SqliteRegistry
from server.cli import app
from tests.conftest import native, serving, settings_for
from tests.prefix_store.redis_process import RedisProcess

PROMPT = "A fine film."


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    process.start()
    yield process
    process.kill()


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.stdout or done.stderr


def stored(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", ["another data folder", "registry moved away", "another Redis database"])
def test_start_with_another_registry_is_refused_in_one_line(
    mistake: str, redis: RedisProcess, model_path: Path, tmp_path: Path
) -> None:
    root, data, more = tmp_path / "blobs", tmp_path / "data", tmp_path / "more"
    is_redis = mistake == "another Redis database"
    settings = settings_for(data, blob_url=str(root), redis_url=redis.url if is_redis else None)
    with serving(settings, model_path) as served:
        assert served.put("t", native(1)).status_code == 201
        own = served.state.registry.identity().id
    for path in root.rglob("*.safetensors"):
        os.utime(path, (1e9, 1e9))
    files = stored(root)
    options = ["--data-dir", str(more if mistake == "another data folder" else data), "--blob-url", str(root)]
    if mistake == "registry moved away":
        data.rename(tmp_path / "away")
    options += ["--redis-url", redis.url.removesuffix("0") + "1"] if is_redis else []
    code, output = run("serve", "--model", str(model_path), *options)
    assert (code, output.count("\n")) == (1, 1), output
    assert own in output
    assert str(root) in output
    assert "prefixserve registry take-over" in output
    assert stored(root) == files
    if mistake == "registry moved away":
        (tmp_path / "data").rename(more)
        (tmp_path / "away").rename(data)
    with capture_logs() as logs, serving(settings, model_path) as served:
        assert served.generate(PROMPT, "t", max_new_tokens=1).status_code == 200
    assert [line["num_files"] for line in logs if line["event"] == "files_swept"] == [0]


def test_root_of_an_earlier_version_goes_on(model_path: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "data")
    with serving(settings, model_path) as served:
        assert served.put("t", native(1)).status_code == 201
    mark = tmp_path / "data" / "blobs" / "REGISTRY"
    mark.unlink()
    with serving(settings, model_path) as served:
        assert served.generate(PROMPT, "t", max_new_tokens=1).status_code == 200
    assert mark.exists()


def test_callers_are_not_told_where_files_of_another_registry_are(model_path: Path, tmp_path: Path) -> None:
    with serving(settings_for(tmp_path / "data"), model_path) as served:
        (tmp_path / "data" / "blobs" / "REGISTRY").write_text("another")
        with capture_logs() as lines:
            refused = served.put("t", native(1))
    assert (refused.status_code, str(tmp_path) in refused.text) == (503, False)
    assert "another registry" in refused.json()["detail"]
    assert any(str(tmp_path) in line.get("reason", "") for line in lines)


def test_operator_gives_the_files_to_another_registry(model_path: Path, tmp_path: Path) -> None:
    root = tmp_path / "blobs"
    with serving(settings_for(tmp_path / "data", blob_url=str(root)), model_path) as served:
        assert served.put("t", native(1)).status_code == 201
    SqliteRegistry(tmp_path / "more" / "registry.sqlite").close()
    code, output = run("registry", "take-over", "--data-dir", str(tmp_path / "more"), "--blob-url", str(root), "--json")
    assert code == 0, output
    found = json.loads(output)
    assert (found["files"], found["known_files"], found["missing_files"]) == (1, 0, 0)
    with serving(settings_for(tmp_path / "more", blob_url=str(root)), model_path) as served:
        assert served.put("t", native(2)).status_code == 201
    code, output = run("registry", "take-over", "--data-dir", str(tmp_path / "data"), "--blob-url", str(root), "--json")
    assert (code, json.loads(output)["before"]) == (0, found["registry"])
    with serving(settings_for(tmp_path / "data", blob_url=str(root)), model_path) as served:
        assert served.generate(PROMPT, "t", max_new_tokens=1).status_code == 200


def test_operator_sweeps_what_a_start_leaves(model_path: Path, tmp_path: Path) -> None:
    with serving(settings_for(tmp_path / "data"), model_path) as served:
        assert served.put("t", native(1)).status_code == 201
    blobs = Blobs(tmp_path / "data" / "blobs")
    digests = [blobs.put("gone", bytes(number)) for number in range(3)]
    options = ["registry", "sweep", "--data-dir", str(tmp_path / "data"), "--min-age-s", "0", "--json"]
    code, output = run(*options)
    found = json.loads(output)
    assert (code, found["num_files"], found["num_kept"]) == (0, 0, 3)
    assert "knows 1 of 4 files" in found["reason"]
    found = json.loads(run(*options, "--all")[1])
    assert (found["num_files"], found["num_bytes"], found["num_kept"]) == (3, 3, 0)
    assert not any(blobs.exists("gone", digest) for digest in digests)
    assert json.loads(run(*options, "--grace-s", "0")[1])["num_deleted"] == 3
