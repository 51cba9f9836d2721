"""HTTP by hand: what no client library would send."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from tests.conftest import Served

ENDS_S = 20.0


@dataclass(frozen=True)
class RawAnswer:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


def connect(served: Served) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=ENDS_S)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one


def everything(one: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    try:
        while piece := one.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def exchange(served: Served, sent: bytes) -> bytes:
    """What the server answers to the bytes until it closes the connection."""
    with connect(served) as one:
        one.sendall(sent)
        return everything(one)


def ask(served: Served, line: str, *headers: str, body: bytes = b"") -> RawAnswer:
    """One request with `Connection: close`; `line` is its first, without the version."""
    head = "\r\n".join((f"{line} HTTP/1.1", "Host: localhost", "Connection: close", *headers))
    return parsed(exchange(served, f"{head}\r\n\r\n".encode() + body))


def parsed(received: bytes) -> RawAnswer:
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return RawAnswer(int(first.split()[1]), headers, body)
