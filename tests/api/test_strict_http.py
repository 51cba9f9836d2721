"""Requests that this server and a proxy before it could read differently are refused, and their connection ends."""

from __future__ import annotations

import pytest

from tests.conftest import NATIVE, Served
from tests.raw_http import ask, connect, everything, exchange, parsed

BODY = b'{"inputs": "x", "parameters": {"max_new_tokens": 1}}'
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
START = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
TE = b"Transfer-Encoding: chunked\r\n"


def with_chunks(chunks: bytes) -> bytes:
    return START + TE + b"\r\n" + chunks


@pytest.mark.parametrize(
    "request_",
    [
        START + LENGTH + TE + b"\r\n" + CHUNKED,
        START + TE + LENGTH + b"\r\n" + CHUNKED,
        START + b"Content-Length: 5\r\n" + TE + b"\r\n" + CHUNKED,
        START + LENGTH + LENGTH + b"\r\n" + BODY,
        START + LENGTH + b"content-length: 3\r\n\r\n" + BODY,
        START + b"Content-Length: %d, %d\r\n\r\n" % (len(BODY), len(BODY)) + BODY,
        START + b"Content-Length: +%d\r\n\r\n" % len(BODY) + BODY,
        START + b"Content-Length: 0x10\r\n\r\n" + BODY,
        START + b"Content-Length: \r\n\r\n" + BODY,
        START + b"Content-Length : %d\r\n\r\n" % len(BODY) + BODY,
        START + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED,
        START + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED,
        START + b"Transfer-Encoding: identity\r\n" + LENGTH + b"\r\n" + BODY,
        START + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
        START + b"Transfer-Encoding: chunked;q=1\r\n\r\n" + CHUNKED,
        START + TE + TE + b"\r\n" + CHUNKED,
        START + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKED,
        START + b"X: y\r\n\tTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
        (START + TE).replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n" + CHUNKED,
        START.replace(b"HTTP/1.1", b"HTTP/2.0") + LENGTH + b"\r\n" + BODY,
        START.replace(b"\r\n", b"\n") + LENGTH + b"\r\n" + BODY,
        (START + LENGTH).replace(b"\r\n", b"\n") + b"\n" + BODY,
        START + b"Host: other\r\n" + LENGTH + b"\r\n" + BODY,
        START.replace(b"Host: localhost\r\n", b"") + LENGTH + b"\r\n" + BODY,
        START.replace(b"localhost", b"local host") + LENGTH + b"\r\n" + BODY,
        with_chunks(b"-5\r\nhello\r\n0\r\n\r\n"),
        with_chunks(b"0x5\r\nhello\r\n0\r\n\r\n"),
        with_chunks(b"5 \r\nhello\r\n0\r\n\r\n"),
        with_chunks(b"5\nhello\r\n0\r\n\r\n"),
        with_chunks(b"5\r\nhello!\r\n0\r\n\r\n"),
        with_chunks(b"5\r\nhello0\r\n\r\n"),
        with_chunks(b"5;\rx\r\nhello\r\n0\r\n\r\n"),
        with_chunks(b"5;a\n\r\nhello\r\n0\r\n\r\n"),
        with_chunks(b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
        with_chunks(b"\r\n\r\n"),
        with_chunks(b"5\r\nhello\r\n0\r\n\n"),
        with_chunks(b"5\r\nhello\r\n0\r\nX: y\n\r\n"),
    ],
)
def test_a_request_of_two_meanings_is_refused_and_the_connection_ends(served: Served, request_: bytes) -> None:
    received = exchange(served, request_ + SMUGGLED)
    assert received.count(b"HTTP/1.1 ") == 1, received
    answer = parsed(received)
    assert answer.status in (400, 501, 505)
    assert answer.headers["connection"] == "close"
    assert b'"detail"' in answer.body


def test_an_unknown_coding_is_501_and_a_length_beside_chunks_400(served: Served) -> None:
    coded = exchange(served, START + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED)
    both = exchange(served, START + TE + LENGTH + b"\r\n" + CHUNKED)
    assert (parsed(coded).status, parsed(both).status) == (501, 400)
    assert b"one Content-Length or Transfer-Encoding, got 2" in both


def test_good_requests_pass_on_one_connection(served: Served) -> None:
    """Chunks with extensions and trailers, a length, and none."""
    chunks = b"5;a=b\r\n" + BODY[:5] + b"\r\n%X\r\n" % (len(BODY) - 5) + BODY[5:] + b"\r\n0;c\r\nX-Trailer: y\r\n\r\n"
    with connect(served) as one:
        for sent in (with_chunks(chunks), START + LENGTH + b"\r\n" + BODY, START + TE + b"\r\n" + CHUNKED):
            one.sendall(sent)
            received = b""
            while b"generated_text" not in received:
                received += one.recv(65536)
            assert received.startswith(b"HTTP/1.1 200")
        one.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert everything(one).startswith(b"HTTP/1.1 200")


def test_a_bad_chunk_amid_an_upload_stores_nothing(served: Served) -> None:
    head = f"PUT /v1/prefixes/cut-chunk HTTP/1.1\r\nHost: localhost\r\nContent-Type: {NATIVE}\r\n".encode()
    received = exchange(served, head + TE + b"\r\n5\r\nhello\r\nzz\r\n" + SMUGGLED)
    assert parsed(received).status == 400
    assert received.count(b"HTTP/1.1 ") == 1
    assert served.http.get("/v1/prefixes/cut-chunk").status_code == 404


def test_a_target_may_be_a_url(served: Served) -> None:
    for host in ("localhost", "127.0.0.1:80"):
        assert ask(served, f"GET http://{host}/healthz").status == 200
        assert ask(served, f"GET HTTP://{host}/v1/prefixes?limit=1").status == 200
    assert ask(
        served, "POST http://localhost", "Content-Type: application/json", "Content-Length: 2", body=b"{}"
    ).status
    assert ask(served, "OPTIONS http://localhost").headers["allow"]
    sent = b"POST http://localhost/generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    answer = parsed(exchange(served, sent + b"Content-Type: application/json\r\n" + LENGTH + b"\r\n" + BODY))
    assert answer.status == 200


def test_a_urls_host_counts_in_the_place_of_the_headers(served: Served) -> None:
    assert ask(served, "GET http://evil.example/healthz").status == 403
    sent = b"GET http://localhost/healthz HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert parsed(exchange(served, sent)).status == 200


@pytest.mark.parametrize(
    "target", ["healthz", "http://", "http:///healthz", "http://u:p@localhost/", "ftp://localhost/", "http://[/", "*"]
)
def test_another_target_is_refused(served: Served, target: str) -> None:
    assert ask(served, f"GET {target}").status == 400


def test_connect_is_not_implemented(served: Served) -> None:
    assert ask(served, "CONNECT localhost:80").status == 501
