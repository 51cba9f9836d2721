"""What every request passes first: its id, the loopback rules, the bounds on its body, and the count for draining."""

from __future__ import annotations

import re
import uuid
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import RequestError, error_response
from server.api.state import DRAIN_RETRY_S, AppState
from server.config import is_loopback

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
KEY_NAMES = {"key", "api_key", "api-key", "apikey", "token", "access_token", "authorization"}
MAX_JSON_BYTES = 4 * 2**20
UNCOUNTED = ("/healthz", "/health", "/readyz", "/metrics", "/info")


class Gate:
    """Pure ASGI, so that a disconnect reaches the route."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        path = scope["path"]
        try:
            max_bytes = self._check(scope, headers)
        except RequestError as error:
            retry = {"Retry-After": str(DRAIN_RETRY_S)} if error.status == 503 else None
            response = error_response(path, error.status, str(error), headers=retry)
            await response(scope, receive, send_with_id)
            return
        num_bytes = 0

        async def bounded_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > max_bytes:
                    raise RequestError(413, f"the body must be <= {max_bytes} bytes, got more")
            return message

        counted = path not in UNCOUNTED
        self._state.num_active += counted
        try:
            await self._app(scope, bounded_receive, send_with_id)
        finally:
            self._state.num_active -= counted

    def _check(self, scope: Scope, headers: Headers) -> int:
        """The bound on the body. Raises RequestError."""
        method, path = scope["method"], scope["path"]
        host = headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
        if not is_loopback(name):
            raise RequestError(403, f"Host must be a loopback name while no keys are configured, got {host[:100]!r}")
        for key, _ in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
            if key.lower() in KEY_NAMES:
                raise RequestError(400, f"{key!r} in the query: a key belongs into the Authorization header")
        if self._state.is_draining and path not in UNCOUNTED:
            raise RequestError(503, "the server is stopping")
        if headers.get("content-encoding", "identity") != "identity":
            raise RequestError(415, f"Content-Encoding must not be given, got {headers['content-encoding'][:40]!r}")
        is_upload = method == "PUT"
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json" and (has_body or kind):
            raise RequestError(415, f"Content-Type must be application/json, got {kind[:80]!r}")
        max_bytes = int(self._state.settings.max_upload_bytes) if is_upload else MAX_JSON_BYTES
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > max_bytes:
            raise RequestError(413, f"the body must be <= {max_bytes} bytes, got {length}")
        return max_bytes
