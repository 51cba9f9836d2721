"""Callers who send or read slowly, or not at all, keep nobody waiting and hold bounded memory for a bounded time."""

from __future__ import annotations

import gc
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.api import bodies, connection
from server.api.gate import Gate
from server.engine.request_stream import RequestStream
from server.engine.sequence import TokenOutput
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, NATIVE, Served, native, serve_in_thread, settings_for
from tests.waiting import eventually

NUM_SLOW = 50
ENDS_S = 20.0
SEND_BUFFER = 4096
ROW_TOKENS = 200


def connect(served: Served, **options: int) -> socket.socket:
    one = socket.socket()
    for name, value in options.items():
        one.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    one.settimeout(ENDS_S)
    one.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
    return one


def head(method: str, path: str, kind: str, length: str) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n{length}\r\n\r\n".encode()


def upload_head(task: str, num_bytes: int) -> bytes:
    return head("PUT", f"/v1/prefixes/{task}", NATIVE, f"Content-Length: {num_bytes}")


def answer(one: socket.socket) -> tuple[int, str]:
    """The status and all that follows, until the server closes."""
    received = read_until_reset(one)
    return int(received.split(b" ", 2)[1]), received.decode()


def read_until_reset(one: socket.socket) -> bytes:
    received = b""
    try:
        while piece := one.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def gate_of(served: Served) -> Gate:
    """The middleware is the application's outermost but for the one that catches what nobody does."""
    found: Any = served.server.config.app
    found = found.middleware_stack
    while not isinstance(found, Gate):
        found = found.app
    return found


@pytest.fixture
def idle(served: Served) -> Iterator[Served]:
    """A server that nobody asks anything, before and after."""
    yield served
    gate = gate_of(served)
    eventually(lambda: not served.state.num_active)
    stats = served.state.engine.stats
    eventually(lambda: (stats().num_running, stats().num_waiting, stats().kv_blocks_used) == (0, 0, 0))
    assert (gate.uploads.num_bytes, gate.json_bodies.num_bytes) == (0, 0)
    assert not served.state.uploads.locked()


class TestSlowUploads:
    def test_fifty_that_stop_in_the_middle_keep_nobody_waiting(self, idle: Served) -> None:
        body = native(700)
        with ExitStack() as stack:
            for i in range(NUM_SLOW):
                one = stack.enter_context(connect(idle))
                one.sendall(upload_head(f"slow-{i}", len(body)) + body[: 100 + i])
            eventually(lambda: idle.state.num_active == NUM_SLOW)
            assert idle.put("quick", body).status_code == 201
            assert idle.generate("x", "quick", max_new_tokens=2).status_code == 200
            eventually(lambda: idle.state.num_active == NUM_SLOW)  # they are all still there
            assert gate_of(idle).uploads.num_bytes <= NUM_SLOW * 2 * (100 + NUM_SLOW)
            one.sendall(body[100 + NUM_SLOW - 1 :])  # the last goes on after all
            assert one.recv(12) == b"HTTP/1.1 201"
        assert idle.http.get("/v1/prefixes/slow-0").status_code == 404

    @pytest.mark.parametrize("length", ["Content-Length: 100000", "Transfer-Encoding: chunked"])
    @pytest.mark.parametrize(
        ("method", "path", "kind"),
        [
            ("PUT", "/v1/prefixes/trickle", NATIVE),
            ("PUT", "/v1/prefixes/trickle", "multipart/form-data; boundary=x"),
            ("POST", "/generate", "application/json"),
        ],
    )
    def test_a_body_that_trickles_is_408(
        self, idle: Served, monkeypatch: pytest.MonkeyPatch, method: str, path: str, kind: str, length: str
    ) -> None:
        monkeypatch.setattr(bodies, "GRACE_S", 0.3)
        start = b"--x\r\nContent-Disposition: form-data; name=adapter_config.json\r\n\r\n" if "x" in kind else b"{"
        first, trickle = (
            (b"%x\r\n%s\r\n" % (len(start), start), b"1\r\n-\r\n") if "chunked" in length else (start, b"-")
        )
        with connect(idle) as one:
            one.sendall(head(method, path, kind, length) + first)
            for _ in range(4):
                one.sendall(trickle)
                time.sleep(0.02)
            status, text = answer(one)
        assert status == 408, text
        assert "connection: close" in text.lower()
        assert f"{bodies.MIN_BYTES_PER_S} bytes/s" in text

    def test_a_body_that_keeps_the_rate_may_take_longer(self, idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bodies, "GRACE_S", 0.2)
        monkeypatch.setattr(bodies, "MIN_BYTES_PER_S", 200)
        body = native(701)
        with connect(idle) as one:
            one.sendall(upload_head("steady", len(body)))
            for start in range(0, len(body), len(body) // 4):
                time.sleep(0.1)
                one.sendall(body[start : start + len(body) // 4])
            assert one.recv(12) == b"HTTP/1.1 201"

    def test_bodies_hold_bounded_memory_together(self, idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """The one that would take more is refused, and those that hold it finish."""
        body = native(702)
        monkeypatch.setattr(gate_of(idle).uploads, "max_bytes", 3 * len(body))
        with ExitStack() as stack:
            held = [stack.enter_context(connect(idle)) for _ in range(3)]
            for i, one in enumerate(held):
                one.sendall(upload_head(f"held-{i}", len(body)) + body[:-1])
            eventually(lambda: gate_of(idle).uploads.num_bytes == 3 * len(body) - 3)
            refused = idle.put("fourth", body)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert idle.generate("x", max_new_tokens=1).status_code == 200
            for one in held:
                one.sendall(body[-1:])
                assert one.recv(12) == b"HTTP/1.1 201"
        assert idle.put("fourth", body).status_code == 201

    def test_too_long_a_body_is_413_before_its_end(self, idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counted as it comes, in chunks without a length, and none of it beyond the limit is kept."""
        monkeypatch.setattr(bodies, "MAX_DROP_S", 0.2)
        limit = int(idle.state.settings.max_upload_bytes)
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        with connect(idle) as one:
            one.sendall(head("PUT", "/v1/prefixes/endless", NATIVE, "Transfer-Encoding: chunked"))
            for _ in range(limit // 0x10000 + 1):
                one.sendall(piece)
            status, text = answer(one)  # the last chunk was never sent
        assert status == 413
        assert str(limit) in text

    def test_a_false_length_harms_nobody(self, idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bodies, "GRACE_S", 0.3)
        monkeypatch.setattr(bodies, "MAX_DROP_S", 0.2)
        body = native(703)
        with connect(idle) as one:  # too short: what follows is no request
            one.sendall(upload_head("short", 100) + body)
            assert one.recv(12) == b"HTTP/1.1 422"
        with connect(idle) as one:  # too long: it never comes
            one.sendall(upload_head("long", len(body) + 1) + body)
            assert answer(one)[0] == 408
        for length in ("-1", "1e3", "9" * 30, "1, 2", "0x10"):
            with connect(idle) as one:
                one.sendall(head("PUT", "/v1/prefixes/wrong", NATIVE, f"Content-Length: {length}") + body)
                assert answer(one)[0] in (400, 413)
        for task in ("short", "long", "wrong"):
            assert idle.http.get(f"/v1/prefixes/{task}").status_code == 404

    def test_a_head_that_trickles_is_cut_off(self, idle: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "MAX_HEAD_S", 0.2)
        with connect(idle) as first, connect(idle) as second:
            first.sendall(b"GET /healthz HT")
            second.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert second.recv(12) == b"HTTP/1.1 200"
            while b'"}' not in second.recv(65536):
                pass
            second.sendall(b"GET /heal")  # after a whole request too
            for one in (first, second):
                assert read_until_reset(one) == b""


@contextmanager
def small_buffers(served: Served) -> Iterator[None]:
    """So that a stream of a tiny model fills what the system keeps between two ends."""
    listening = served.server.servers[0].sockets[0]
    kept = listening.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    try:
        yield
    finally:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kept // 2)


def ask_for_much(served: Served) -> socket.socket:
    """A long answer with twenty alternatives a token, over 300 KB of events."""
    wanted = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": ROW_TOKENS,
        "logprobs": True,
        "top_logprobs": 20,
        "ignore_eos": True,
        "stream": True,
    }
    body = json.dumps(wanted).encode()
    one = connect(served, SO_RCVBUF=SEND_BUFFER)
    one.sendall(head("POST", "/v1/chat/completions", "application/json", f"Content-Length: {len(body)}") + body)
    return one


def tokens_in_memory() -> list[TokenOutput]:
    """Every one of this process, whoever holds it: other tests' too, which stay while the list does."""
    return [each for each in gc.get_objects() if type(each) is TokenOutput]


@pytest.fixture
def streams(idle: Served, monkeypatch: pytest.MonkeyPatch) -> list[RequestStream]:
    """Those that began."""
    made: list[RequestStream] = []
    begin = RequestStream.__init__

    def remember(self: RequestStream, *arguments: Any) -> None:
        begin(self, *arguments)
        made.append(self)

    monkeypatch.setattr(RequestStream, "__init__", remember)
    return made


def test_what_nobody_reads_does_not_hold_a_stop(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is finished and waits in the connection's buffer."""
    monkeypatch.setattr(connection, "MAX_FLUSH_S", 0.3)
    serving = serve_in_thread(make_state(settings_for(tmp_path), ModelFiles(model_path, NAME)))
    served = next(serving)
    body = json.dumps({"inputs": "x", "parameters": {"max_new_tokens": ROW_TOKENS, "ignore_eos": True}}).encode()
    with ExitStack() as stack:
        with small_buffers(served):
            one = stack.enter_context(connect(served, SO_RCVBUF=SEND_BUFFER))
            one.sendall(head("POST", "/generate_stream", "application/json", f"Content-Length: {len(body)}") + body)
            eventually(lambda: served.state.num_active == 1)
            eventually(lambda: served.state.num_active == 0)
        with pytest.raises(StopIteration):
            next(serving)


class TestSlowReaders:
    def test_one_that_reads_nothing_holds_no_row(self, idle: Served, streams: list[RequestStream]) -> None:
        engine = idle.state.engine
        alone = idle.generate("x", max_new_tokens=50, ignore_eos=True).json()
        before = tokens_in_memory()
        with small_buffers(idle), ask_for_much(idle):
            eventually(lambda: len(streams) == 2 and bool(streams[1].finish_reason))
            eventually(lambda: engine.stats().num_running == 0 and engine.stats().kv_blocks_used == 0)
            assert idle.state.num_active == 1
            assert ROW_TOKENS // 2 < len(tokens_in_memory()) - len(before) <= ROW_TOKENS
            assert idle.generate("x", max_new_tokens=50, ignore_eos=True).json() == alone
        eventually(lambda: idle.state.num_active == 0)  # it left: the rest goes

    def test_one_that_reads_on_gets_everything(self, idle: Served, streams: list[RequestStream]) -> None:
        with small_buffers(idle), ask_for_much(idle) as one:
            eventually(lambda: len(streams) == 1 and bool(streams[0].finish_reason))
            received = b""
            while b"[DONE]" not in received:
                received += one.recv(65536)
            assert received.count(b'"top_logprobs": [{') == ROW_TOKENS

    def test_one_that_stands_still_is_cut_off(
        self, idle: Served, streams: list[RequestStream], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "MAX_STALL_S", 0.3)
        with small_buffers(idle), ask_for_much(idle) as one:
            eventually(lambda: len(streams) == 1)
            eventually(lambda: idle.state.num_active == 0)
            assert b"[DONE]" not in read_until_reset(one)
