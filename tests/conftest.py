"""A real server on a free loopback port: a tiny random Llama, a byte-level tokenizer, a real store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn

from prefix_store.native_format import write_native
from prefix_store.prefix import Prefix
from server.api.app import Server, server_config
from server.api.state import AppState
from server.config import Settings
from server.engine.cpu_kernels import CpuKernels, load_kernels
from server.model_files import ModelFiles
from server.start import make_state
from tests.byte_model import HEAD_DIM, KV_HEADS, LAYERS, save_byte_model
from tests.prefix_store.s3_process import S3Process

NAME = "tiny"
NATIVE = "application/octet-stream"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads wait for each other at every product of a tiny model, the longer the busier the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    found = load_kernels(tmp_path_factory.mktemp("kernels"))
    assert found is not None, "the tests need a C compiler"
    return found


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model") / NAME)


@dataclass(frozen=True)
class Served:
    url: str
    state: AppState
    http: httpx.Client
    clients: ExitStack  # closes those of `as_key` with the server
    server: uvicorn.Server

    def metric(self, name: str) -> float:
        """A metric as `/metrics` has it, with its labels; 0 where it is not there."""
        lines = self.http.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"prefixserve_{name} ")), 0.0)

    def generate(self, inputs: str, task: str | None = None, **parameters: object) -> httpx.Response:
        query = {} if task is None else {"task": task}
        return self.http.post("/generate", params=query, json={"inputs": inputs, "parameters": parameters})

    def put(self, task: str, body: bytes, **query: str) -> httpx.Response:
        return self.http.put(f"/v1/prefixes/{task}", params=query, content=body, headers={"Content-Type": NATIVE})

    def as_key(self, key: str) -> Served:
        """The same server, asked with a key."""
        http = self.clients.enter_context(httpx.Client(base_url=self.url, timeout=30, headers=bearer(key)))
        return replace(self, http=http)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def settings_for(data_dir: Path, **more: object) -> Settings:
    return Settings.model_validate(
        {"port": 0, "data_dir": data_dir, "dtype": "float32", "max_rows": 8, "max_queued": 16, "model_alias": ("mini",)}
        | {"prefix_bytes": 64 * 4096, "max_upload_bytes": 2**20, "max_virtual_tokens": 64}
        | more
    )


def serve_in_thread(state: AppState) -> Iterator[Served]:
    server = Server(server_config(state), state, lambda: None)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline_s = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline_s, "the server did not start in time"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with ExitStack() as clients:
            http = clients.enter_context(httpx.Client(base_url=url, timeout=30))
            yield Served(url, state, http, clients, server)
    finally:
        server.should_exit = True
        thread.join()
        state.store.close()


@contextmanager
def serving(settings: Settings, model_path: Path) -> Iterator[Served]:
    """A server of the tiny model for a while."""
    server = serve_in_thread(make_state(settings, ModelFiles(model_path, NAME)))
    try:
        yield next(server)
    finally:
        with pytest.raises(StopIteration):
            next(server)


@pytest.fixture(scope="session")
def served(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = settings_for(tmp_path_factory.mktemp("data"))
    yield from serve_in_thread(make_state(settings, ModelFiles(model_path, NAME)))


def native(seed: int, num_virtual_tokens: int = 5, *, base_model: str | None = NAME, **fields: str) -> bytes:
    """A native KV prefix for the tiny model, which its file names."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(LAYERS, 2, KV_HEADS, num_virtual_tokens, HEAD_DIM, generator=generator)
    layers = {layer: (kv[layer, 0], kv[layer, 1]) for layer in range(LAYERS)}
    return write_native(Prefix("kv", layers=layers, base_model=base_model, **fields))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def films(served: Served) -> str:
    """A task with two versions, the second active."""
    for seed in (1, 2):
        assert served.put("films", native(seed)).status_code == 201
    return "films"


OPERATOR_KEY = "an-operator-key-of-more-than-32-characters"


def write_key(path: Path, key: str) -> Path:
    """A file that its owner alone may read."""
    path.touch(0o600)
    path.write_text(key + "\n")
    return path


@pytest.fixture(scope="module")
def keyed(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that has keys, asked by its operator."""
    folder = tmp_path_factory.mktemp("keyed")
    key_file = write_key(folder / "operator.key", OPERATOR_KEY)
    settings = settings_for(folder / "data", operator_key_file=key_file)
    for served in serve_in_thread(make_state(settings, ModelFiles(model_path, NAME))):
        yield served.as_key(OPERATOR_KEY)


def make_tenant(keyed: Served, name: str, **limits: object) -> Served:
    """The server as a new tenant asks it, with its first key."""
    made = keyed.http.put(f"/v1/tenants/{name}", json={"limits": limits} if limits else {})
    assert made.status_code == 201, made.text
    return keyed.as_key(made.json()["key"])


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Process]:
    process = S3Process()
    for name, value in process.environment.items():
        monkeypatch.setenv(name, value)
    yield process
    process.kill()
