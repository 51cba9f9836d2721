"""A connection that is given up when its peer stands still, and whose requests are not begun when its peer is gone."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.connections import Connections
from server.api.listener import is_gone
from server.api.strict_http import StrictHttp

MAX_STALL_S = 60.0  # to take some 50 KB of a full buffer
MAX_HEAD_S = 30.0  # to send a request's line and headers
MAX_FLUSH_S = 10.0  # at a stop, to read what was answered


class BoundedConnection(H11Protocol):
    """uvicorn's connection with clocks and a stricter parser. Its buffer of what is to be sent is full at 64 KiB; rows
    never wait for it."""

    def __init__(self, *arguments: Any, connections: Connections, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.conn: StrictHttp = StrictHttp()
        self.app_state = self.app_state | {"is_gone": self.is_gone}
        self._connections = connections
        self._stall: asyncio.TimerHandle | None = None
        self._head: asyncio.TimerHandle | None = None
        self._flush: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def is_gone(self) -> bool:
        """Whether the peer has hung up, also where the loop has not yet read so far. Then nobody is answered."""
        if not self.transport.is_closing() and not is_gone(self.transport.get_extra_info("socket")):
            return False
        self.transport.abort()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._stall, self._head, self._flush):
            if timer is not None:
                timer.cancel()
        self._connections.set_busy(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.is_gone():
            self._connections.dropped()
            return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        """What was wrong with the request. Where its answer has begun it ends with the connection."""
        error = self.conn.refusal
        assert error is not None
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status = HTTPStatus(error.error_status_hint)
            problem = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": str(error)}
            body = json.dumps(problem).encode()
            headers = [
                ("Content-Type", "application/problem+json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            events = (
                h11.Response(status_code=status, headers=headers, reason=status.phrase),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(MAX_STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def shutdown(self) -> None:
        super().shutdown()
        self._flush = self.loop.call_later(MAX_FLUSH_S, self.transport.abort)

    def _watch_head(self) -> None:
        """From a request's first byte to its last header. Between two requests uvicorn has a clock of its own, and the
        connection may be given up for others."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and not self.transport.is_closing():
            self._connections.set_idle(self, self.transport.abort)
        else:
            self._connections.set_busy(self)
        is_waiting = self.cycle is None or (is_idle and bool(self.conn.trailing_data[0]))
        if not is_waiting and self._head is not None:
            self._head.cancel()
            self._head = None
        elif is_waiting and self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(MAX_HEAD_S, self.transport.abort)
