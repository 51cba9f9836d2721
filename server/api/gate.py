"""What every request passes first: its id, its key and scope or the loopback rules, the bounds on its body, and the
count for draining."""

from __future__ import annotations

import asyncio
import re
import uuid
from contextlib import suppress
from urllib.parse import parse_qsl, urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.auth import needed_scope
from server.api.bodies import Body, BodyMemory, BodyPace
from server.api.errors import RequestError, error_response
from server.api.state import DRAIN_RETRY_S, AppState
from server.config import is_loopback
from server.engine.text_lanes import give_memory_back

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
KEY_NAMES = {"key", "api_key", "api-key", "apikey", "token", "access_token", "authorization"}
MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_MEMORY = 64 * MAX_JSON_BYTES
LARGE_BYTES = 2**20  # of JSON, after which freed memory is given back
MAX_UPLOADS_HELD = 2  # of the largest size
UPLOADS = "/v1/prefixes/"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
log = structlog.get_logger()
UNCOUNTED = ("/healthz", "/health", "/readyz", "/metrics", "/info")


class Gate:
    """Pure ASGI, so that a disconnect reaches the route."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self.app = app
        self._state = state
        self.json_bodies = BodyMemory(MAX_JSON_MEMORY)
        self.pace = BodyPace()
        self.uploads = BodyMemory(MAX_UPLOADS_HELD * int(state.settings.max_upload_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        path, method = scope["path"], scope["method"]
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        is_upload = method == "PUT" and path.startswith(UPLOADS) and kind != "application/json"
        max_bytes = int(self._state.settings.max_upload_bytes) if is_upload else MAX_JSON_BYTES
        memory = self.uploads if is_upload else self.json_bodies
        body = Body(receive, memory, max_bytes, self.pace, is_whole=not _has_body(headers))
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                added = MutableHeaders(scope=message)
                added["X-Request-Id"] = request_id
                if not body.is_whole:
                    if "expect" not in headers:  # one that waits for a go-ahead sends nothing
                        await body.drop_rest()
                    if not body.is_whole:
                        added["Connection"] = "close"
            await send(message)

        try:
            self._check(scope, headers, max_bytes)
        except RequestError as error:
            response = error_response(path, error.status, str(error), headers=error.headers)
            await response(scope, receive, send_with_id)
            return
        if not is_upload:
            caller = scope["state"].get("caller")
            body.tenant = "" if caller is None else caller.tenant.name
        counted = path not in UNCOUNTED
        self._state.num_active += counted
        try:
            await self.app(scope, body.receive, send_with_id)
        except ClientDisconnect:  # nobody is left to answer
            log.info("client_gone", request_id=request_id, path=path)
        except Exception:
            if has_started:
                raise
            log.exception("request_failed", request_id=request_id, path=path)
            await error_response(path, 500, "the server failed; its log has the reason")(scope, receive, send_with_id)
        finally:
            body.release()
            if body.tenant is not None and body.num_bytes > LARGE_BYTES:
                asyncio.get_running_loop().run_in_executor(None, give_memory_back)
            self._state.num_active -= counted

    def _check(self, scope: Scope, headers: Headers, max_bytes: int) -> None:
        """Raises RequestError."""
        method, path = scope["method"], scope["path"]
        if not path.isprintable():  # a router's "$" matches before a newline, no rule does
            raise RequestError(400, f"a path must be of printable characters, got {path[:100]!r}")
        if self._state.keys.is_open:
            _check_loopback(method, headers)
        for key, _ in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
            if key.lower() in KEY_NAMES:
                raise RequestError(400, f"{key!r} in the query: a key belongs into the Authorization header")
        needed = needed_scope(method, path)
        if needed is not None:
            caller = self._state.keys.caller(headers.get("authorization"))
            caller.check_route(needed, method, path)
            scope["state"]["caller"] = caller
        if self._state.is_draining and path not in UNCOUNTED:
            self._state.metrics.rejected("draining")
            raise RequestError(503, "the server is stopping", headers={"Retry-After": str(DRAIN_RETRY_S)})
        if headers.get("content-encoding", "identity") != "identity":
            raise RequestError(415, f"Content-Encoding must not be given, got {headers['content-encoding'][:40]!r}")
        is_upload = method == "PUT" and path.startswith(UPLOADS)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method in ("POST", "PUT") and not is_upload and kind != "application/json" and (_has_body(headers) or kind):
            raise RequestError(415, f"Content-Type must be application/json, got {kind[:80]!r}")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > max_bytes:
            raise RequestError(413, f"the body must be <= {max_bytes} bytes, got {length}")


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _check_loopback(method: str, headers: Headers) -> None:
    """While no keys are configured only this machine may ask, and no page of another. Raises RequestError."""
    host = headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    if not is_loopback(name):
        raise RequestError(403, f"Host must be a loopback name while no keys are configured, got {host[:100]!r}")
    if method in SAFE_METHODS or "origin" not in headers:
        return
    origin = None
    with suppress(ValueError):  # as of http://[
        origin = urlsplit(headers["origin"]).hostname
    if not (origin and is_loopback(origin)):
        raise RequestError(403, f"Origin must be this machine, got {headers['origin'][:100]!r}")
