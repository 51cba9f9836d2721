"""HTTP/1.1 as RFC 9112 has it: h11, less what it lets through that another server or proxy may read otherwise."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import h11
from h11._receivebuffer import ReceiveBuffer

MAX_HEAD_BYTES = 64 * 1024
LENGTHS = re.compile(rb"\r\n(?:content-length:[ \t]*([^\r\n]*?)[ \t]*|transfer-encoding:[^\r\n]*)(?=\r\n)", re.I)
DIGITS = re.compile(rb"[0-9]+")
CHUNK_HEADER = re.compile(rb"[0-9A-Fa-f]{1,16}(;[\t\x20-\x7e\x80-\xff]*)?\r\n")
HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(:[0-9]*)?")
SCHEMES = (b"http://", b"https://")


class StrictBuffer(ReceiveBuffer):
    """What was received and not yet read. Raises LocalProtocolError, which h11 makes an error of the peer."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """The lines of a head or a trailer."""
        before = bytes(self)
        lines = super().maybe_extract_lines()
        if lines is None:
            return None
        head = before[: len(before) - len(self)]
        if head.count(b"\n") != head.count(b"\r\n"):
            raise h11.LocalProtocolError("lines must end with CR and LF, got a lone LF")
        if b"\r\n " in head or b"\r\n\t" in head:
            raise h11.LocalProtocolError("a header must be one line, got one that goes on in the next")
        lengths = LENGTHS.findall(head)
        if len(lengths) > 1:
            raise h11.LocalProtocolError(
                f"a request must have one Content-Length or Transfer-Encoding, got {len(lengths)} of them"
            )
        if any(length and not DIGITS.fullmatch(length) for length in lengths):
            raise h11.LocalProtocolError(f"Content-Length must be one number, got {lengths[0][:40]!r}")
        return lines

    def maybe_extract_next_line(self) -> bytearray | None:
        """The line before a chunk."""
        line = super().maybe_extract_next_line()
        if line is not None and not CHUNK_HEADER.fullmatch(line):
            raise h11.LocalProtocolError(f"a chunk must begin with its size in hex, got {bytes(line[:40])!r}")
        return line


class StrictHttp(h11.Connection):
    """A server's side of a connection. `refusal` is what was wrong with what came, once something was."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._receive_buffer = StrictBuffer()
        self.refusal: h11.RemoteProtocolError | None = None

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """As h11's, and a request's target is a path, or `*`. Raises RemoteProtocolError."""
        try:
            event = super().next_event()
            return _checked(event) if isinstance(event, h11.Request) else event
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise


def _checked(request: h11.Request) -> h11.Request:
    """The request in the form that servers are asked in. Raises RemoteProtocolError."""
    version, target = request.http_version, request.target
    if not version.startswith(b"1."):
        raise h11.RemoteProtocolError(f"HTTP/{version.decode()} is not spoken here", error_status_hint=505)
    names = [name for name, _ in request.headers]
    if version == b"1.0" and b"transfer-encoding" in names:
        raise h11.RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")
    for name, value in request.headers:
        if name == b"host" and not HOST.fullmatch(value):
            raise h11.RemoteProtocolError("Host must be a name or an address, and may have a port")
    if target.startswith(b"/") or (target == b"*" and request.method == b"OPTIONS"):
        return request
    if request.method == b"CONNECT":
        raise h11.RemoteProtocolError("CONNECT is for proxies", error_status_hint=501)
    if not target.lower().startswith(SCHEMES):
        raise h11.RemoteProtocolError("a request's target must be a path or an http URL; * is for OPTIONS")
    return _as_origin(request)


def _as_origin(request: h11.Request) -> h11.Request:
    """From `GET http://HOST/PATH` to `GET /PATH`, HOST in the place of the header's."""
    try:
        url = urlsplit(request.target)
    except ValueError as error:  # as of http://[
        raise h11.RemoteProtocolError("a request's target must be a path or an http URL") from error
    if not url.netloc or not HOST.fullmatch(url.netloc) or url.fragment:
        raise h11.RemoteProtocolError("a request's URL must have a host, and neither user nor fragment")
    path = url.path or (b"*" if request.method == b"OPTIONS" and not url.query else b"/")
    headers = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        target=path + (b"?" + url.query if url.query else b""),
        headers=[(b"Host", url.netloc), *headers],
        http_version=request.http_version,
    )
