"""A connection that is given up when its peer stands still: one that does not read, or does not say what it wants."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_STALL_S = 60.0  # to take some 50 KB of a full buffer
MAX_HEAD_S = 30.0  # to send a request's line and headers
MAX_FLUSH_S = 10.0  # at a stop, to read what was answered


class BoundedConnection(H11Protocol):
    """uvicorn's connection with clocks. Its buffer of what is to be sent is full at 64 KiB; rows never wait for
    it."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._stall: asyncio.TimerHandle | None = None
        self._head: asyncio.TimerHandle | None = None
        self._flush: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._stall, self._head, self._flush):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

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
        """From a request's first byte to its last header. Between two requests uvicorn has a clock of its own."""
        is_waiting = self.cycle is None or (self.cycle.response_complete and bool(self.conn.trailing_data[0]))
        if not is_waiting and self._head is not None:
            self._head.cancel()
            self._head = None
        elif is_waiting and self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(MAX_HEAD_S, self.transport.abort)
