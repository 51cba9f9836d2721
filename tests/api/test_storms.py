"""Callers who hang up cost nothing but their connection; who is refused is refused before its body is read."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from prefix_store.sqlite_registry import SqliteRegistry
from server.api import connections, listener
from server.api.connections import peer_of
from server.api.state import AppState
from server.engine.async_engine import AsyncEngine
from server.engine.prompt_tokenizer import CheckLength, PromptTokenizer
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, NATIVE, Served, bearer, make_tenant, native, serve_in_thread, settings_for, write_key
from tests.raw_http import connect, everything, parsed
from tests.waiting import SOON_S, eventually

NUM_GONE = 50
BODY = json.dumps({"inputs": "x", "parameters": {"max_new_tokens": 200, "ignore_eos": True}}).encode()
CHAT = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()


def request(method: str, path: str, body: bytes = b"", kind: str = "application/json", key: str = "") -> bytes:
    headers = f"Authorization: Bearer {key}\r\n" if key else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


WHOLE = {
    "generate": request("POST", "/generate", BODY),
    "stream": request("POST", "/generate_stream", BODY),
    "chat": request("POST", "/v1/chat/completions", CHAT),
    "models": request("GET", "/v1/models"),
    "upload": request("PUT", "/v1/prefixes/stormy", native(9), NATIVE),
    "health": request("GET", "/healthz"),
    "half": request("POST", "/generate", BODY)[:-7],
    "headers": request("POST", "/generate", BODY)[: -len(BODY)],
    "nothing": b"",
}


class HeldLoop:
    """Keeps the server's loop busy, so that what comes meanwhile waits in the system."""

    def __init__(self, served: Served) -> None:
        self._loop = served.state.engine._loop
        self._is_held = True

    def __enter__(self) -> None:
        def hold() -> None:
            while self._is_held:
                time.sleep(0.001)

        assert self._loop is not None
        self._loop.call_soon_threadsafe(hold)

    def __exit__(self, *_: object) -> None:
        self._is_held = False


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was resolved or stored, and what asked for a place in the queue."""
    found: list[str] = []

    def remember(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def called(*args: Any, **more: Any) -> Any:
            found.append(name)
            return original(*args, **more)

        monkeypatch.setattr(kind, name, called)

    for name in ("resolve_task", "remotely"):
        remember(AppState, name)
    for name in ("generate", "tokenise", "check"):
        remember(AsyncEngine, name)
    remember(SqliteRegistry, "list_tasks")
    return found


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_a_caller_who_is_gone_begins_nothing(served: Served, begun: list[str], name: str, is_reset: bool) -> None:
    served.http.get("/healthz")
    before = served.metric('connections_refused_total{reason="gone"}')
    with HeldLoop(served):
        for _ in range(NUM_GONE):
            with connect(served) as one:
                one.sendall(WHOLE[name])
                if is_reset:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert served.http.get("/healthz").status_code == 200
    assert served.metric('connections_refused_total{reason="gone"}') == before + NUM_GONE
    assert begun == []
    assert served.state.num_active == 0


def test_a_caller_who_goes_after_the_connection_begins_nothing(served: Served, begun: list[str]) -> None:
    """The server knows the connection before the request and the farewell come."""
    with ExitStack() as stack:
        held = [stack.enter_context(connect(served)) for _ in range(NUM_GONE)]
        eventually(lambda: served.state.connections.num_open >= NUM_GONE)
        with HeldLoop(served):
            for one in held:
                one.sendall(WHOLE["generate"])
                one.close()
    assert served.http.get("/healthz").status_code == 200
    eventually(lambda: served.state.connections.num_open <= 1)
    assert begun == []


def test_who_goes_while_its_prompt_waits_is_not_tokenised(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    may_go_on = threading.Event()
    ids = PromptTokenizer.ids

    def wait_first(tokenizer: PromptTokenizer, text: str, check: CheckLength) -> list[int]:
        texts.append(text)
        assert may_go_on.wait(SOON_S)
        return ids(tokenizer, text, check)

    monkeypatch.setattr(PromptTokenizer, "ids", wait_first)
    with connect(served) as first:
        first.sendall(request("POST", "/generate", b'{"inputs": "first", "parameters": {"max_new_tokens": 1}}'))
        eventually(lambda: texts == ["first"])
        with ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(connect(served)).sendall(WHOLE["generate"])
            eventually(lambda: served.state.num_active == 6)
        eventually(lambda: served.state.num_active == 1)
        may_go_on.set()
        assert first.recv(12) == b"HTTP/1.1 200"
    assert texts == ["first"]
    assert served.state.engine.stats().num_waiting == 0


class TestRefusals:
    def test_beyond_its_rate_nothing_is_read_or_looked_up(self, keyed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        tenant = make_tenant(keyed, "stormy", requests_per_minute=1)
        key = tenant.http.headers["Authorization"].removeprefix("Bearer ")
        assert tenant.generate("x", max_new_tokens=1).status_code == 200
        assert tenant.generate("x", max_new_tokens=1).status_code == 429
        taken: list[object] = []
        take = SqliteRegistry.take
        monkeypatch.setattr(SqliteRegistry, "take", lambda *a, **k: (taken.append(a), take(*a, **k))[1])
        for path, body in (("/generate", b"{"), ("/v1/completions", b"no JSON"), ("/generate_stream", BODY)):
            with connect(keyed) as one:
                one.sendall(request("POST", path, body, key=key).replace(b"Host", b"Connection: close\r\nHost"))
                answer = parsed(everything(one))
            assert answer.status == 429
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert taken == []

    def test_a_refusal_ends_with_its_reason(self, keyed: Served) -> None:
        """When the bucket has filled, or the limit is another."""
        tenant = make_tenant(keyed, "patient", requests_per_minute=60)
        while tenant.generate("x", max_new_tokens=1).status_code == 200:
            pass
        eventually(lambda: tenant.generate("x", max_new_tokens=1).status_code == 200)
        while tenant.generate("x", max_new_tokens=1).status_code == 200:
            pass
        keyed.http.put("/v1/tenants/patient", json={"limits": {}})
        eventually(lambda: tenant.generate("x", max_new_tokens=1).status_code == 200)

    def test_a_smaller_request_passes_after_one_of_too_many_tokens(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "thrifty", tokens_per_minute=100)
        assert tenant.generate("x", max_new_tokens=50).status_code == 200
        assert tenant.generate("x", max_new_tokens=90).status_code == 429
        assert tenant.generate("x", max_new_tokens=95).status_code == 429
        assert tenant.generate("x", max_new_tokens=5).status_code == 200

    def test_a_full_queue_is_said_before_the_body_comes(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "queued", max_queued=1, max_rows=1)
        key = tenant.http.headers["Authorization"].removeprefix("Bearer ")
        with connect(keyed) as first, connect(keyed) as second, connect(keyed) as third:
            for one in (first, second):
                one.sendall(request("POST", "/generate", BODY, key=key))
                eventually(lambda: keyed.state.engine.stats().num_running + keyed.state.engine.stats().num_waiting)
            third.sendall(request("POST", "/generate", b"no JSON", key=key))
            status = int(third.recv(65536).split()[1])
        assert status in (422, 429)  # the first may have its token already


@pytest.fixture
def small(model_path: Path, tmp_path: Path) -> Iterator[Served]:
    """A server that lets few in."""
    more = {"max_connections": 6, "max_connections_per_peer": 4, "trusted_proxy": "10.0.0.0/8, fd00::/8"}
    yield from serve_in_thread(make_state(settings_for(tmp_path, **more), ModelFiles(model_path, NAME)))


@pytest.fixture
def narrow(model_path: Path, tmp_path: Path) -> Iterator[Served]:
    """A server that takes two requests of a key at once, asked by its operator."""
    key_file = write_key(tmp_path / "key", "k" * 40)
    settings = settings_for(tmp_path / "data", max_requests_per_key=2, operator_key_file=key_file)
    for found in serve_in_thread(make_state(settings, ModelFiles(model_path, NAME))):
        yield found.as_key("k" * 40)


class TestBounds:
    def test_a_peer_has_so_many_connections_and_then_429(self, small: Served) -> None:
        with ExitStack() as stack:
            held = [stack.enter_context(connect(small)) for _ in range(4)]
            eventually(lambda: small.state.connections.num_open == 4)
            answer = parsed(everything(stack.enter_context(connect(small))))
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            assert b"too many connections" in answer.body
            held[0].sendall(request("GET", "/healthz"))
            assert held[0].recv(12) == b"HTTP/1.1 200"
            assert small.state.connections.num_open == 4
        eventually(lambda: small.state.connections.num_open == 0)
        assert small.http.get("/healthz").status_code == 200

    def test_a_trusted_proxy_has_as_many_as_there_are(self, small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(listener, "peer_of", lambda _: "10.1.2.3")
        with ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(connect(small))
            eventually(lambda: small.state.connections.num_open == 6)

    def test_a_full_server_gives_up_who_is_idle_longest(self, small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(listener, "peer_of", lambda _: "10.1.2.3")
        with ExitStack() as stack:
            held = [stack.enter_context(connect(small)) for _ in range(6)]
            eventually(lambda: small.state.connections.num_open == 6)
            eventually(lambda: small.http.get("/readyz").json().get("connections") == "short")
            assert everything(held[0]) == b""
            held[5].sendall(request("GET", "/healthz"))
            assert held[5].recv(12) == b"HTTP/1.1 200"

    def test_a_full_server_of_busy_connections_refuses(self, small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(listener, "peer_of", lambda _: "10.1.2.3")
        with ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(connect(small)).sendall(WHOLE["half"])
            eventually(lambda: small.state.num_active == 6)
            answer = parsed(everything(stack.enter_context(connect(small))))
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        eventually(lambda: small.state.connections.num_open == 0)

    def test_a_key_has_so_many_requests_at_once_and_then_429(self, narrow: Served) -> None:
        one, other = (make_tenant(narrow, name) for name in ("one", "other"))
        key = one.http.headers["Authorization"].removeprefix("Bearer ")
        with ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(connect(narrow)).sendall(request("POST", "/generate", BODY, key=key)[:-5])
            eventually(lambda: narrow.state.num_active == 2)
            refused = one.generate("x", max_new_tokens=1)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            assert "2 requests at once" in refused.json()["error"]
            assert other.generate("x", max_new_tokens=1).status_code == 200
            assert narrow.http.get("/healthz", headers=bearer(key)).status_code == 200
        eventually(lambda: one.generate("x", max_new_tokens=1).status_code == 200)

    def test_this_machine_has_as_many_as_there_are_by_default(self, served: Served) -> None:
        connections = served.state.connections
        assert [connections.max_of(peer) for peer in ("127.0.0.1", "::1", "192.0.2.7")] == [None, None, 512]

    @pytest.mark.parametrize(
        ("address", "peer"),
        [
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("fe80::1%eth0", "fe80::/64"),
        ],
    )
    def test_an_ipv6_peer_is_its_network(self, address: str, peer: str) -> None:
        assert peer_of(address) == peer

    def test_descriptors_bound_connections_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (1024, 1024))
        assert 0 < connections.max_by_descriptors() < 1024 - connections.RESERVED_FILES
