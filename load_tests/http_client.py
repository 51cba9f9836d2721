"""HTTP/1.1 over one kept connection, with little work a token: the client must not be what is measured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

MAX_LINE = 1 << 20


class Connection:
    """One request at a time, each with the key if there is one. `headers` are those of the last answer, in lower
    case."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str | None = None) -> None:
        self._reader, self._writer = reader, writer
        self.headers: dict[str, str] = {}
        self._authorization = "" if key is None else f"Authorization: Bearer {key}\r\n"

    @classmethod
    async def open(cls, port: int, key: str | None = None) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=MAX_LINE), key)

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def request(self, method: str, target: str, body: Any = None) -> bytes:
        """The whole answer. Raises RuntimeError for one that is an error."""
        return b"".join([piece async for piece in self._pieces(method, target, body)])

    async def events(self, target: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events as they come. Raises RuntimeError for a failure, also midway."""
        rest = b""
        async for piece in self._pieces("POST", target, body):
            *whole, rest = (rest + piece).split(b"\n\n")
            for event in (each for each in whole if not each.startswith(b":")):
                found = json.loads(event.removeprefix(b"data:"))
                if "error" in found:
                    raise RuntimeError(f"{target}: {found['error']}")
                yield found

    async def _pieces(self, method: str, target: str, body: Any) -> AsyncIterator[bytes]:
        content = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else "Content-Type: application/json\r\n"
        lead = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n{self._authorization}{kind}"
        head = f"{lead}Content-Length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)
        status_line, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.headers = headers
        status = int(status_line.split()[1])
        if status >= 400:
            reason = await self._reader.readexactly(int(headers.get("content-length", "0")))
            raise RuntimeError(f"{method} {target}: {status} {reason.decode()[:300]}")
        if headers.get("transfer-encoding") != "chunked":
            yield await self._reader.readexactly(int(headers.get("content-length", "0")))
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readuntil(b"\r\n")
