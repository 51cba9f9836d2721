"""A caller who goes amid an upload leaves nothing, or a whole version: no half a task, no file that nobody refers to,
no lease, no place of an upload; on both registries."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from structlog.testing import capture_logs

from prefix_store import redis_keys as keys
from prefix_store.blobs import Blobs
from server.api.gate import Gate
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, NATIVE, Served, native, serve_in_thread, settings_for
from tests.prefix_store.redis_process import RedisProcess
from tests.waiting import eventually

ENDS_S = 20.0
RESET = b"\1\0\0\0\0\0\0\0"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    process.start()
    yield process
    process.kill()


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def stored(
    request: pytest.FixtureRequest, model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    more = {} if request.param == "sqlite" else {"redis_url": request.getfixturevalue("redis").url}
    settings = settings_for(tmp_path_factory.mktemp("data"), max_upload_bytes=4 * 2**20, **more)
    yield from serve_in_thread(make_state(settings, ModelFiles(model_path, NAME)))


def files(served: Served) -> set[Path]:
    return {path for path in (served.state.settings.data_dir / "blobs").rglob("*") if path.is_file()}


def send(served: Served, task: str, length: str, body: bytes, kind: str = NATIVE) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
    head = f"PUT /v1/prefixes/{task} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n{length}\r\n\r\n"
    one.sendall(head.encode() + body)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return one


def assert_quiet(served: Served) -> None:
    eventually(lambda: served.state.num_active == 0)
    assert served.state.uploads._value == 2
    found: Any = served.server.config.app
    found = found.middleware_stack
    while not isinstance(found, Gate):
        found = found.app
    assert found.uploads.num_bytes == 0
    if served.state.settings.redis_url is not None:
        with Redis.from_url(served.state.settings.redis_url) as client:
            assert not list(client.scan_iter(keys.leases("*", "*")))
            assert not list(client.scan_iter(keys.dropping("*", "*")))


@pytest.mark.parametrize(
    ("length", "kind", "start"),
    [
        ("Content-Length: 5000", NATIVE, b""),
        ("Content-Length: 5000", NATIVE, b"x" * 4999),
        ("Transfer-Encoding: chunked", NATIVE, b"1000\r\n" + b"x" * 0x1000 + b"\r\n10\r\nx"),
        ("Content-Length: 9000", "multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=a"),
        (
            "Content-Length: 3000000",
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="adapter_model.safetensors"; filename="f"\r\n\r\n'
            + b"x" * 2 * 2**20,
        ),
        ("Content-Length: 9000", "application/json", b'{"kind": "ensemble"'),
    ],
    ids=["before it", "at its end", "chunked", "in a part's head", "in a part on disk", "JSON"],
)
def test_one_who_goes_amid_the_body_leaves_nothing(stored: Served, length: str, kind: str, start: bytes) -> None:
    assert stored.put("kept", native(900)).status_code in (200, 201)
    before = files(stored)
    eventually(lambda: stored.state.num_active == 0)
    with send(stored, "cut", length, start, kind):
        eventually(lambda: stored.state.num_active == 1)
    assert_quiet(stored)
    assert files(stored) == before
    assert stored.http.get("/v1/prefixes/cut").status_code == 404
    assert stored.put("kept", native(900)).status_code == 200


@pytest.mark.parametrize("place", ["trial", "file", "registry", "answer"])
@pytest.mark.parametrize("task", ["new", "kept"])
def test_one_who_goes_later_leaves_a_whole_version(
    stored: Served, monkeypatch: pytest.MonkeyPatch, place: str, task: str
) -> None:
    """In the trial forward, before and after the file is stored, before the answer."""
    assert stored.put("kept", native(901)).status_code in (200, 201)
    seed = 910 + 10 * ["trial", "file", "registry", "answer"].index(place) + (task == "new")
    is_there, may_go_on = threading.Event(), threading.Event()
    name = f"{task}-{place}" if task == "new" else task
    owner, method = {
        "trial": (type(stored.state.engine._engine.runner), "check"),
        "file": (Blobs, "put"),
        "registry": (type(stored.state.store), "_add_version"),
        "answer": (type(stored.state.store), "publish"),
    }[place]
    work = getattr(owner, method)

    def held(*arguments: Any, **more: Any) -> Any:
        done = work(*arguments, **more) if place == "answer" else None
        is_there.set()
        assert may_go_on.wait(ENDS_S)
        return done or work(*arguments, **more)

    body = native(seed)
    with monkeypatch.context() as holding:
        holding.setattr(owner, method, held)
        with send(stored, name, f"Content-Length: {len(body)}", body):
            assert is_there.wait(ENDS_S)
        assert stored.generate("x", max_new_tokens=1).status_code == 200
        may_go_on.set()
        assert_quiet(stored)
    shown = stored.http.get(f"/v1/prefixes/{name}").json()
    newest = shown["versions"][-1]
    assert shown["active"] == newest["version"]
    assert any(newest["digest"] in path.name for path in files(stored))
    assert stored.http.get(f"/v1/prefixes/{name}/versions/{newest['version']}/file").status_code == 200
    assert stored.generate("x", name, max_new_tokens=1).status_code == 200
    again = stored.put(name, body)
    assert (again.status_code, again.json()["version"]) == (200, newest["version"])


@pytest.mark.parametrize("place", ["trial", "file", "registry"])
def test_an_upload_that_fails_leaves_nothing(stored: Served, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """For want of memory, wherever it is."""
    before = files(stored)
    engine = stored.state.engine._engine
    owner, name = {
        "trial": (type(engine.runner), "check"),
        "file": (Blobs, "put"),
        "registry": (type(stored.state.registry), "change"),
    }[place]
    work = getattr(owner, name)

    def fail(*arguments: Any, **more: Any) -> Any:
        if place == "file":
            work(*arguments, **more)
        raise MemoryError

    with monkeypatch.context() as failing, capture_logs():
        failing.setattr(owner, name, fail)
        assert stored.put("failed", native(950)).status_code == 500
    assert_quiet(stored)
    assert files(stored) == before
    assert stored.http.get("/v1/prefixes/failed").status_code == 404
    assert stored.put("failed", native(950)).status_code == 201
    assert stored.http.delete("/v1/prefixes/failed").status_code == 204
