"""A stop signal in a process of its own: what runs is finished, new work refused, exit 0; a second one ends at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.conftest import NATIVE, native
from tests.waiting import eventually

PROGRAM = """
import asyncio, sys
from pathlib import Path
from server.api.app import serve
from server.config import Settings
from server.model_files import ModelFiles
from server.start import make_state

model, data, port = sys.argv[1:]
settings = Settings(
    port=int(port), data_dir=Path(data), dtype="float32", max_rows=1, max_queue_s=300, prefix_bytes=2**20
)
asyncio.run(serve(make_state(settings, ModelFiles(Path(model), "tiny"))))
"""
LONG = {"inputs": "x", "parameters": {"max_new_tokens": 250, "ignore_eos": True}}
NUM_LONG = 8
GAUGES = ("prefixserve_num_requests_running", "prefixserve_num_requests_waiting")


@contextmanager
def process(model_path: Path, data_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PROGRAM, str(model_path), str(data_dir), str(port)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # a tiny model's threads wait for each other beside other processes
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            url = f"http://127.0.0.1:{port}"
            deadline_s = time.monotonic() + 120
            while True:
                assert running.poll() is None
                assert time.monotonic() < deadline_s
                try:
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx.TransportError:  # not listening yet
                    time.sleep(0.1)
            yield running, url
        finally:
            running.kill()


@contextmanager
def long_ones(url: str) -> Iterator[list[Future[httpx.Response]]]:
    """So many that the server has something to finish for seconds: one row runs at a time."""
    with ThreadPoolExecutor(NUM_LONG) as pool:
        asked = [pool.submit(httpx.post, f"{url}/generate", json=LONG, timeout=60) for _ in range(NUM_LONG)]
        eventually(lambda: num_unfinished(url) >= NUM_LONG)
        yield asked


def num_unfinished(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(GAUGES))


def test_signal_finishes_what_runs_and_refuses_the_rest(model_path: Path, tmp_path: Path) -> None:
    with process(model_path, tmp_path) as (running, url), httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/generate_stream", json=LONG) as response, long_ones(url) as others:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            running.send_signal(signal.SIGTERM)
            while http.get("/readyz").status_code != 503:
                pass
            refused = http.post("/generate", json=LONG)
            assert refused.status_code == 503
            assert refused.json()["error_type"] == "overloaded"
            assert int(refused.headers["Retry-After"]) >= 1
            upload = http.put("/v1/prefixes/late", content=native(1), headers={"Content-Type": NATIVE})
            assert (upload.status_code, int(upload.headers["Retry-After"]) >= 1) == (503, True)
            last = json.loads(list(lines)[-1].removeprefix("data: "))
            assert last["details"]["generated_tokens"] == 250
            assert [other.result().status_code for other in others] == [200] * NUM_LONG
        assert running.wait(20) == 0


def test_an_upload_on_its_way_finishes(model_path: Path, tmp_path: Path) -> None:
    body = native(2)
    head = f"PUT /v1/prefixes/films HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with process(model_path, tmp_path) as (running, url), httpx.Client(base_url=url, timeout=60) as http:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as one:
            one.sendall(head.encode() + body[:100])
            assert http.get("/readyz").status_code == 200  # its head was read before this was
            running.send_signal(signal.SIGTERM)
            while http.get("/readyz").status_code != 503:
                pass
            time.sleep(0.3)
            assert httpx.get(f"{url}/readyz").status_code == 503  # it says so as long as it finishes something
            one.sendall(body[100:])
            assert one.recv(12) == b"HTTP/1.1 201"
        assert running.wait(20) == 0
    with process(model_path, tmp_path) as (running, url):
        assert httpx.get(f"{url}/v1/prefixes/films").json()["active"] == 1


def test_signal_to_an_idle_server_ends_it(model_path: Path, tmp_path: Path) -> None:
    with process(model_path, tmp_path) as (running, _):
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0


def test_second_signal_ends_it_at_once(model_path: Path, tmp_path: Path) -> None:
    with process(model_path, tmp_path) as (running, url), long_ones(url) as others:
        running.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/readyz").status_code != 503:
            pass
        running.send_signal(signal.SIGTERM)
        running.wait(20)
        finished = [other for other in others if not other.exception() and other.result().status_code == 200]
        assert len(finished) < NUM_LONG
