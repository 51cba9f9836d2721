"""The listening socket: which connections are let in. A caller that is gone again, or beyond a bound, costs no more
than this."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from server.api.connections import Connections, peer_of

MAX_IN_ROW = 64  # that are let in before the loop goes on with other work
MAX_AT_ONCE = 256  # that are dropped or refused before the loop goes on with other work
MAX_CLOSING = 64  # connections beyond the most, while those given up for them close
PAUSE_S = 0.01  # where the system has no memory for a connection: the loop would spin
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
GONE = (7, 8)  # Linux' TCP_CLOSE and TCP_CLOSE_WAIT: the peer has reset the connection, or closed its side
RETRY_S = 1


def _answer(status: str, text: str) -> bytes:
    body = f'{{"error": "{text}", "error_type": "overloaded"}}'
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Retry-After: {RETRY_S}\r\nConnection: close\r\n\r\n{body}".encode()


TOO_MANY_OF_PEER = _answer("429 Too Many Requests", "this address has too many connections; close some")
TOO_MANY = _answer("503 Service Unavailable", "the server has too many connections; try again")


def is_gone(one: socket.socket) -> bool:
    """Whether the peer has hung up, though what it sent before may be unread. False where the system does not say."""
    if sys.platform != "linux":
        return False
    try:
        return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in GONE
    except OSError:  # it is closed on this side, too
        return True


class Accepted(socket.socket):
    """A connection that counts until it is closed."""

    def __init__(self, one: socket.socket, connections: Connections, peer: str) -> None:
        super().__init__(one.family, one.type, one.proto, one.detach())
        self._connections = connections
        self._peer: str | None = peer
        connections.open(peer)

    def close(self) -> None:
        if self._peer is not None:
            self._connections.close(self._peer)
            self._peer = None
        super().close()


class Listener(socket.socket):
    """Takes the place of the socket `bound`. Its `accept` passes over callers that are gone, and refuses those beyond
    the bounds."""

    def __init__(self, bound: socket.socket, connections: Connections) -> None:
        # Without a protocol asyncio sets no TCP_NODELAY.
        super().__init__(bound.family, socket.SOCK_STREAM, socket.IPPROTO_TCP, bound.detach())
        self._connections = connections
        self._num_in_row = 0
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)  # with which to refuse when there is no other

    def accept(self) -> tuple[socket.socket, Any]:
        """As a socket's: a caller that is there. Raises BlockingIOError when there is none now."""
        self._num_in_row += 1
        if self._num_in_row > MAX_IN_ROW:
            self._num_in_row = 0
            raise BlockingIOError
        for _ in range(MAX_AT_ONCE):
            try:
                one, address = super().accept()
            except OSError as error:
                if error.errno not in NO_DESCRIPTOR:
                    raise
                self._refuse_without_descriptor()
                continue
            peer = peer_of(address[0])
            if is_gone(one):
                self._connections.dropped()
                one.close()
            elif not self._connections.allows(peer):
                self._connections.refused("peer")
                _refuse(one, TOO_MANY_OF_PEER)
            elif self._has_room():
                return Accepted(one, self._connections, peer), address
            else:
                self._connections.refused("full")
                _refuse(one, TOO_MANY)
        raise BlockingIOError

    def close(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        super().close()

    def _has_room(self) -> bool:
        """For one more, made by giving up an idle connection where need be."""
        connections = self._connections
        if not connections.is_full:
            return True
        return connections.make_room("full") and connections.num_open < connections.max_open + MAX_CLOSING

    def _refuse_without_descriptor(self) -> None:
        """Take the next caller with the spare descriptor, and say so. Raises BlockingIOError where that fails."""
        self._connections.make_room("descriptors")
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        try:
            one, _ = super().accept()
            self._connections.refused("descriptors")
            _refuse(one, TOO_MANY)
            self._spare = os.open(os.devnull, os.O_RDONLY)
        except BlockingIOError:
            raise
        except OSError as error:
            time.sleep(PAUSE_S)
            raise BlockingIOError from error


def _refuse(one: socket.socket, answer: bytes) -> None:
    """Without waiting for anything; what came is taken, so that closing does not discard the answer."""
    with suppress(OSError):  # nothing came yet
        one.recv(65536, socket.MSG_DONTWAIT)
    with suppress(OSError):  # it is gone
        one.send(answer, socket.MSG_DONTWAIT)
    one.close()
