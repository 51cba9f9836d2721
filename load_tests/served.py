"""The real program in a process of its own on a free loopback port, and this process as its client."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psutil
from http_client import Connection
from machine import ROOT
from workloads import Ask, Measures, Task

from prefix_store.native_format import write_native

READY_S, STOP_S = 120, 30


@dataclass(frozen=True)
class Answer:
    """When each token came, seconds after the request was sent, and the details of the last event."""

    sent_s: float
    tokens_s: tuple[float, ...]
    details: dict[str, Any]


class Served:
    """`ready_s` is the time from its start to the first good answer of `/readyz`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, ready_s: float) -> None:
        self._process, self.port = process, port
        self._published: set[Task] = set()
        self.ready_s = ready_s

    def kill(self) -> None:
        """As `kill -9` does."""
        self._process.kill()
        self._process.wait()

    @property
    def memory_bytes(self) -> int:
        return int(psutil.Process(self._process.pid).memory_info().rss)

    @property
    def processor_s(self) -> float:
        """That it has computed on all its threads since it started."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=60).raise_for_status().json()
        return found

    def put(self, task: str, **body: Any) -> None:
        """A version of `task`: `content` a native file, or `json` an ensemble."""
        url = f"http://127.0.0.1:{self.port}/v1/prefixes/{task}?accept_base=1"
        httpx.put(url, timeout=300, **body).raise_for_status()

    def publish(self, tasks: Iterable[Task], measures: Measures) -> None:
        """Those that are not there yet."""
        for task in tasks:
            if task not in self._published:
                headers = {"Content-Type": "application/octet-stream"}
                self.put(task.name, content=write_native(task.prefix(measures)), headers=headers)
                self._published.add(task)

    def preload(self, tasks: Iterable[str]) -> None:
        """Make them resident, one after another."""
        asyncio.run(self.preload_all(tasks))

    async def preload_all(self, tasks: Iterable[str]) -> None:
        connection = await Connection.open(self.port)
        for task in tasks:
            await connection.request("POST", f"/v1/prefixes/{task}/preload")
        await connection.close()

    def lookup_s(self, tasks: Sequence[str]) -> float:
        """Seconds that describing a task takes, one after another."""

        async def ask() -> float:
            connection = await Connection.open(self.port)
            start_s = time.perf_counter()
            for task in tasks:
                await connection.request("GET", f"/v1/prefixes/{task}")
            took_s = time.perf_counter() - start_s
            await connection.close()
            return took_s / len(tasks)

        return asyncio.run(ask())

    def seconds(self, asks: Sequence[Ask], num_out: int, num_at_once: int = 64) -> float:
        """From the first request to the last answer, `num_out` new tokens each, EOS ignored."""
        return asyncio.run(self._seconds(asks, num_out, num_at_once))

    def streams(self, asks: Sequence[Ask], num_out: int) -> list[Answer]:
        """All at once, a token an event."""
        return asyncio.run(self.stream_all(asks, num_out))

    async def stream_all(self, asks: Sequence[Ask], num_out: int) -> list[Answer]:
        connections = await asyncio.gather(*(Connection.open(self.port) for _ in asks))

        async def listen(connection: Connection, ask: Ask) -> Answer:
            sent_s = time.perf_counter()
            times, details = [], {}
            async for event in connection.events(_target("/generate_stream", ask), _body(ask, num_out)):
                times.append(time.perf_counter() - sent_s)
                details = event["details"] or details
            return Answer(sent_s, tuple(times), details)

        found = await asyncio.gather(*map(listen, connections, asks))
        await asyncio.gather(*(connection.close() for connection in connections))
        return found

    async def _seconds(self, asks: Sequence[Ask], num_out: int, num_at_once: int) -> float:
        waiting = iter(asks)
        connections = await asyncio.gather(*(Connection.open(self.port) for _ in asks[:num_at_once]))

        async def work(connection: Connection) -> None:
            for ask in waiting:
                await connection.request("POST", _target("/generate", ask), _body(ask, num_out))

        start_s = time.perf_counter()
        await asyncio.gather(*map(work, connections))
        took_s = time.perf_counter() - start_s
        await asyncio.gather(*(connection.close() for connection in connections))
        return took_s


@contextmanager
def served(*options: str, data_dir: Path | None = None, port: int | None = None) -> Iterator[Served]:
    """`options` are those of `serve`. Ready at entry; without a `data_dir` of the caller's its data is thrown away,
    without a `port` it has a free one."""
    port = port or free_port()
    with tempfile.TemporaryDirectory() as folder:
        data = ["--data-dir", str(data_dir or Path(folder) / "data"), "--port", str(port)]
        command = [sys.executable, "-m", "server", "serve", *data, *options]
        start_s = time.perf_counter()
        with (
            (Path(folder) / "log").open("wb") as log,
            subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process,
        ):
            try:
                while not _is_ready(port):
                    took_s = time.perf_counter() - start_s
                    if process.poll() is not None or took_s > READY_S:
                        raise RuntimeError(f"no server after {took_s:.0f} s: {Path(log.name).read_text()[-2000:]}")
                    time.sleep(0.02)
                yield Served(process, port, time.perf_counter() - start_s)
                process.terminate()
                process.wait(STOP_S)
            finally:
                process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found: int = free.getsockname()[1]
    return found


def _is_ready(port: int) -> bool:
    """With nothing but a socket: building a client of its own would take longer than the answer."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
            one.sendall(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return one.recv(64).split(b" ", 2)[1:2] == [b"200"]
    except OSError:
        return False


def _target(route: str, ask: Ask) -> str:
    return route if ask.task is None else f"{route}?task={quote(ask.task.name)}"


def _body(ask: Ask, num_out: int) -> dict[str, Any]:
    return {"inputs": ask.text, "parameters": {"max_new_tokens": num_out, "ignore_eos": True}}
