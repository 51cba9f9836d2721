"""The whole program: `prefixserve serve` as a process of its own, on a free loopback port."""

from __future__ import annotations

import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
READY_S = 120


@dataclass(frozen=True)
class Program:
    process: subprocess.Popen[bytes]
    http: httpx.Client

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def metric(self, name: str) -> float:
        """A metric without labels, read off `/metrics`."""
        found = re.search(rf"^prefixserve_{name} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found is not None, f"no metric {name}"
        return float(found[1])

    def tokens(self, inputs: str, task: str | None, max_new_tokens: int) -> list[int]:
        """The greedy token ids that `/generate` answers."""
        query = {} if task is None else {"task": task}
        body = {"inputs": inputs, "parameters": {"max_new_tokens": max_new_tokens, "details": True}}
        answer = self.http.post("/generate", params=query, json=body)
        assert answer.status_code == 200, answer.text
        return [token["id"] for token in answer.json()["details"]["tokens"]]


@contextmanager
def running(data_dir: Path, *options: str, max_descriptors: int | None = None) -> Iterator[Program]:
    """Ready at entry; at exit a SIGTERM must end it with 0, unless it is gone already."""

    def limit() -> None:
        if max_descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max_descriptors, max_descriptors))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--data-dir", str(data_dir), *options]
    with (
        (data_dir.parent / f"{data_dir.name}.log").open("ab") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, preexec_fn=limit) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as http,
    ):
        try:
            deadline_s = time.monotonic() + READY_S
            while not _is_ready(http):
                assert process.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline_s, "the server was not ready in time"
                time.sleep(0.05)
            yield Program(process, http)
            if process.poll() is None:
                process.terminate()
                assert process.wait(30) == 0
        finally:
            process.kill()


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False
