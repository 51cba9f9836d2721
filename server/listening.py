"""The port that the server will answer on: taken before the model is loaded, listened on when it is ready."""

from __future__ import annotations

import errno
import os
import socket

from server.errors import StartError


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`. Until something listens on them, callers are refused. Port 0: one that is
    free. Raises StartError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise StartError(f"host must be an address or a name of this machine, got {host!r}: {error}") from error
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            made = socket.socket(family, kind, protocol)
        except OSError:  # a machine without IPv6, whose names have such addresses all the same
            continue
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((address[0], port_of(sockets) if sockets else port, *address[2:]))
        except OSError as error:
            made.close()
            if sockets and error.errno == errno.EADDRNOTAVAIL:  # as ::1 is for `localhost` where IPv6 is off
                continue
            for other in sockets:
                other.close()
            raise StartError(f"cannot listen on {host} port {port}: {_reason(error)}") from error
        sockets.append(made)
    if not sockets:
        raise StartError(f"host must be an address or a name of this machine, got {host!r}")
    return sockets


def port_of(sockets: list[socket.socket]) -> int:
    return int(sockets[0].getsockname()[1])


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program uses it; give another --port, or 0 for any that is free"
    return os.strerror(error.errno) if error.errno else str(error)
