"""A server that runs out of file descriptors says so, refuses what it cannot take, and recovers by itself."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.conftest import NATIVE, native
from tests.program import Program, running
from tests.raw_http import parsed
from tests.waiting import eventually

NUM_CALLERS, MAX_DESCRIPTORS = 300, 200
MAX_LINES = 30
HALF = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
BODY = {"inputs": "x", "parameters": {"max_new_tokens": 1}}


def callers(program: Program, stack: ExitStack, sent: bytes) -> list[socket.socket]:
    """Who connect, say so much and stay."""
    found = []
    for _ in range(NUM_CALLERS):
        address = (program.http.base_url.host, program.http.base_url.port)
        found.append(stack.enter_context(socket.create_connection(address, timeout=20)))
        found[-1].sendall(sent)
    return found


def refused(program: Program) -> dict[str, float]:
    """Connections by the reason that they were refused for."""
    lines = program.http.get("/metrics").text.splitlines()
    found = [line.partition("connections_refused_total{reason=")[2] for line in lines]
    return {line.split('"')[1]: float(line.split()[-1]) for line in found if line}


def num_descriptors(program: Program) -> int:
    return len(os.listdir(f"/proc/{program.process.pid}/fd"))


@pytest.mark.program
@pytest.mark.parametrize("sent", [b"", b"GET /healthz HT", HALF], ids=["idle", "half-a-head", "half-a-body"])
def test_connections_leave_descriptors_for_files(model_path: Path, tmp_path: Path, sent: bytes) -> None:
    options = ("--model", str(model_path), "--dtype", "float32")
    with running(tmp_path / "data", *options, max_descriptors=MAX_DESCRIPTORS) as program:
        log = tmp_path / "data.log"
        num_lines = len(log.read_text().splitlines())
        with ExitStack() as stack:
            held = callers(program, stack, sent)
            assert num_descriptors(program) < MAX_DESCRIPTORS
            eventually(lambda: is_short(program))
            assert any(is_refused(one) for one in held)
            assert refused(program)["full"] > 0
            assert takes_an_upload(program), "on a connection that was there before"
            if sent != HALF:
                url = program.http.base_url.join("/readyz")
                eventually(lambda: httpx.get(url).status_code == 200)
                assert refused(program)["idle"] > 0, "who said nothing makes room for others"
        eventually(lambda: program.http.post("/generate", json=BODY).status_code == 200)
        assert len(log.read_text().splitlines()) - num_lines < MAX_LINES
        assert "connections_short" in log.read_text()


def is_short(program: Program) -> bool:
    try:
        return program.http.get("/readyz").json().get("connections") == "short"
    except httpx.TransportError:  # this connection was the one that was idle longest
        return False


def is_refused(one: socket.socket) -> bool:
    one.settimeout(0.001)
    try:
        received = one.recv(65536)
    except OSError:  # it waits, or was reset
        return False
    if not received:  # it was given up
        return False
    answer = parsed(received)
    return (answer.status, answer.headers.get("retry-after")) == (503, "1")


def takes_an_upload(program: Program) -> bool:
    headers = {"Content-Type": NATIVE}
    return program.http.put("/v1/prefixes/films", content=native(1), headers=headers).status_code == 201


@pytest.mark.program
def test_a_limit_that_is_lowered_under_way_is_survived(model_path: Path, tmp_path: Path) -> None:
    """So that accepting itself fails."""
    with running(tmp_path / "data", "--model", str(model_path), "--dtype", "float32") as program:
        log = tmp_path / "data.log"
        num_lines = len(log.read_text().splitlines())
        limit = num_descriptors(program) + 10
        _, most = resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (limit, most))
        with ExitStack() as stack:
            held = callers(program, stack, HALF)
            assert any(is_refused(one) for one in held)
        eventually(lambda: is_served(program))
        assert refused(program)["descriptors"] > 0
        assert len(log.read_text().splitlines()) - num_lines < MAX_LINES
        assert "descriptors" in log.read_text()


def is_served(program: Program) -> bool:
    try:
        return program.http.post("/generate", json=BODY).status_code == 200
    except httpx.TransportError:  # it is refused before the request was read
        return False
