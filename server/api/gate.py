"""What every request passes first: its id, its key and scope or the loopback rules, the bounds on its body, and the
count for draining."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import parse_qsl, urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.auth import NOBODY, Caller, needed_scope
from server.api.bodies import Body, BodyMemory, BodyPace
from server.api.cors import Cors
from server.api.errors import RequestError, error_response, refusal
from server.api.preconditions import is_current
from server.api.route_table import RouteTable
from server.api.state import DRAIN_RETRY_S, AppState
from server.config import is_loopback
from server.engine.errors import EngineError
from server.engine.text_lanes import give_memory_back

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
KEY_NAMES = {"key", "api_key", "api-key", "apikey", "token", "access_token", "authorization"}
MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_MEMORY = 64 * MAX_JSON_BYTES
LARGE_BYTES = 2**20  # of JSON, after which freed memory is given back
MAX_UPLOADS_HELD = 2  # of the largest size
UPLOADS = "/v1/prefixes/"
NAMED = ("/v1/models/", "/v1/prefixes/")  # below them OWNER/TASK may be one encoded segment
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
log = structlog.get_logger()
UNCOUNTED = ("/healthz", "/health", "/readyz", "/metrics", "/info")


class Gate:
    """Pure ASGI, so that a disconnect reaches the route."""

    def __init__(self, app: ASGIApp, state: AppState, routes: RouteTable) -> None:
        self.app = app
        self._state = state
        self._routes = routes
        settings = state.settings
        self._root_path = settings.root_path
        self._cors = Cors(settings.cors_allow_origin)
        self._max_requests_per_key = settings.max_requests_per_key or settings.max_rows + settings.max_queued
        self._num_by_key: Counter[tuple[str, str]] = Counter()  # requests that are served now
        self.json_bodies = BodyMemory(MAX_JSON_MEMORY)
        self.pace = BodyPace()
        self.uploads = BodyMemory(MAX_UPLOADS_HELD * int(settings.max_upload_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_gone: Callable[[], bool] = scope.setdefault("state", {}).get("is_gone", lambda: False)
        if is_gone():
            self._state.connections.dropped()
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        path = self._own_path(scope["path"])
        scope["state"] |= {"request_id": request_id, "path": path}
        scope = {**scope, "path": self._root_path + path, "root_path": self._root_path}
        is_read = scope["method"] in ("GET", "HEAD")
        if is_read:  # the connection leaves the body out
            scope["method"] = "GET"
        max_bytes, memory = self._bounds(scope, headers)
        body = Body(receive, memory, max_bytes, self.pace, is_whole=not _has_body(headers), is_gone=is_gone)
        has_started = is_unchanged = False

        async def send_on(message: Message) -> None:
            nonlocal has_started, is_unchanged
            if message["type"] == "http.response.start":
                has_started = True
                added = MutableHeaders(scope=message)
                added["X-Request-Id"] = request_id
                self._cors.add(headers, added)
                if is_read and message["status"] == 200 and is_current(headers, added.get("etag")):
                    is_unchanged = True
                    message["status"] = 304
                    for name in ("content-length", "content-type", "content-disposition"):
                        del added[name]
                if not body.is_whole:
                    if "expect" not in headers:  # one that waits for a go-ahead sends nothing
                        await body.drop_rest()
                    if not body.is_whole:
                        added["Connection"] = "close"
            elif is_unchanged:
                message["body"] = b""
            await send(message)

        try:
            answer = self._check(scope, headers, max_bytes)
        except (RequestError, EngineError) as error:
            answer = refusal(path, error)
        if answer is not None:
            await answer(scope, receive, send_on)
            return
        if not _is_upload(scope, headers):
            caller = scope["state"].get("caller")
            body.tenant = "" if caller is None else caller.tenant.name
        counted = path not in UNCOUNTED
        key = _key(scope)
        self._state.num_active += counted
        self._num_by_key[key] += counted
        try:
            await self.app(scope, body.receive, send_on)
        except ClientDisconnect:  # nobody is left to answer
            self._state.metrics.rejected("gone")
        except Exception:
            if has_started:
                raise
            log.exception("request_failed", request_id=request_id, path=path)
            await error_response(path, 500, "the server failed; its log has the reason")(scope, receive, send_on)
        finally:
            body.release()
            if body.tenant is not None and body.num_bytes > LARGE_BYTES:
                asyncio.get_running_loop().run_in_executor(None, give_memory_back)
            self._state.num_active -= counted
            self._num_by_key[key] -= counted
            if not self._num_by_key[key]:
                del self._num_by_key[key]

    def _own_path(self, path: str) -> str:
        """Without the prefix that the server is served behind, whether the proxy took it off or not."""
        own = path.removeprefix(self._root_path)
        if not self._root_path or own == path or own[:1] not in ("", "/"):
            return path
        own = own or "/"
        return own if self._routes.methods(own) or not self._routes.methods(path) else path

    def _bounds(self, scope: Scope, headers: Headers) -> tuple[int, BodyMemory]:
        """How large the body may be, and what it counts in."""
        if _is_upload(scope, headers):
            return int(self._state.settings.max_upload_bytes), self.uploads
        return MAX_JSON_BYTES, self.json_bodies

    def _check(self, scope: Scope, headers: Headers, max_bytes: int) -> Response | None:
        """What is answered before the body is read, if anything. Raises RequestError, EngineError."""
        method, path = scope["method"], scope["state"]["path"]
        self._check_path(path, scope.get("raw_path", b""))
        if self._state.keys.is_open:
            self._check_loopback(method, path, headers)
        for key, _ in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
            if key.lower() in KEY_NAMES:
                raise RequestError(400, f"{key!r} in the query: a key belongs into the Authorization header")
        methods = self._routes.methods(path)
        if method == "OPTIONS" and methods:
            allow = {"Allow": ", ".join(methods)}
            return Response(status_code=204, headers=allow | self._cors.preflight(headers, methods))
        needed = needed_scope(method, path)
        if needed is not None:
            scope["state"]["caller"] = caller = self._state.keys.caller(headers.get("authorization"))
            if methods and method not in methods:
                raise _no_such_method(method, methods)
            caller.check_route(needed, method, path)
            if caller.actor != NOBODY and self._num_by_key[_key(scope)] >= self._max_requests_per_key:
                self._state.metrics.rejected("key_busy")
                raise RequestError(
                    429, f"a key may have {self._max_requests_per_key} requests at once", headers={"Retry-After": "1"}
                )
        elif methods and method not in methods:
            raise _no_such_method(method, methods)
        if self._state.is_draining and path not in UNCOUNTED:
            self._state.metrics.rejected("draining")
            raise RequestError(503, "the server is stopping", headers={"Retry-After": str(DRAIN_RETRY_S)})
        if needed == "generate":
            self._check_rates(caller)
        if headers.get("content-encoding", "identity") != "identity":
            raise RequestError(415, f"Content-Encoding must not be given, got {headers['content-encoding'][:40]!r}")
        if method == "PUT" and "content-range" in headers:
            raise RequestError(400, "Content-Range must not be given: a PUT is of the whole")
        kind = _content_type(headers)
        is_upload = method == "PUT" and path.startswith(UPLOADS)
        if method in ("POST", "PUT") and not is_upload and kind != "application/json" and (_has_body(headers) or kind):
            raise RequestError(415, f"Content-Type must be application/json, got {kind[:80]!r}")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > max_bytes:
            raise RequestError(413, f"the body must be <= {max_bytes} bytes, got {length}")
        return None

    def _check_rates(self, caller: Caller) -> None:
        """What can be said before the body is there. Raises RequestError 429, EngineError."""
        try:
            self._state.limits.check_requests(caller.tenant)
        except RequestError:
            self._state.metrics.rejected("rate_limit")
            raise
        self._state.engine.check_queue(caller.tenant.name)

    def _check_path(self, path: str, raw_path: bytes) -> None:
        """A path means the same to a proxy's rules, to the rules of scopes and to the router. Raises RequestError."""
        if not path.isprintable():  # a router's "$" matches before a newline, no rule does
            raise RequestError(400, f"a path must be of printable characters, got {path[:100]!r}")
        if not {".", ".."}.isdisjoint(path.split("/")):
            raise RequestError(400, f"a path must be without . and .. as segments, got {path[:100]!r}")
        literal, encoded, _ = raw_path.lower().partition(b"%2f")
        if encoded and not literal.decode("latin-1").removeprefix(self._root_path.lower()).startswith(NAMED):
            raise RequestError(400, f"a path must have its slashes unencoded, got {path[:100]!r}")

    def _check_loopback(self, method: str, path: str, headers: Headers) -> None:
        """While no keys are configured only this machine may ask, and no page of another but those that the settings
        name; with `*` others may generate. Raises RequestError."""
        host = headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
        if not is_loopback(name):
            raise RequestError(403, f"Host must be a loopback name while no keys are configured, got {host[:100]!r}")
        origin = headers.get("origin")
        if method in SAFE_METHODS or origin is None or self._cors.names(origin):
            return
        if self._cors.is_any and needed_scope(method, path) == "generate":
            return
        name_of_origin = None
        with suppress(ValueError):  # as of http://[
            name_of_origin = urlsplit(origin).hostname
        if not (name_of_origin and is_loopback(name_of_origin)):
            raise RequestError(403, f"Origin must be this machine, got {origin[:100]!r}")


def _no_such_method(method: str, methods: tuple[str, ...]) -> RequestError:
    allowed = ", ".join(methods)
    return RequestError(405, f"the method must be one of {allowed}, got {method[:40]!r}", headers={"Allow": allowed})


def _key(scope: Scope) -> tuple[str, str]:
    """What tells a key from others; nothing where none is needed."""
    caller = scope["state"].get("caller")
    return ("", "") if caller is None else (caller.tenant.name, caller.actor)


def _content_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_upload(scope: Scope, headers: Headers) -> bool:
    """A file, which may be larger than JSON."""
    is_put = scope["method"] == "PUT" and scope["state"]["path"].startswith(UPLOADS)
    return is_put and _content_type(headers) != "application/json"


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
