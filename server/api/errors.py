"""From exceptions to status codes and bodies: TGI's, OpenAI's, or RFC 9457 problems, by the route asked."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from prefix_store import errors as store_errors
from prefix_store.printable import escaped
from server.api.field_errors import field_error
from server.engine import errors as engine_errors

TGI_PATHS = ("/", "/generate", "/generate_stream")
RETRY_S = 1
NO_RETRY = {"x-should-retry": "false"}  # read by OpenAI's clients, which else try again after 408, 409, 429 and 5xx
TRANSIENT = (408, 424, 425, 429, 500, 502, 503, 504)  # where a second try may succeed, unless `NO_RETRY` is given
MAX_MESSAGE = 1000  # characters; what a caller sent may stand in it
OPENAI_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models")
log = structlog.get_logger()

Responses = dict[int | str, dict[str, Any]]


def documented(media_type: str, body: dict[str, Any]) -> Responses:
    """A router's errors on the OpenAPI page."""
    return {"default": {"description": "An error.", "content": {media_type: {"example": body}}}}


def also(media_type: str) -> Responses:
    """What else a route may answer with 200, on the OpenAPI page."""
    return {200: {"content": {media_type: {}}}}


class RequestError(Exception):
    """What a caller got wrong: `status`, the text, the field it concerns, OpenAI's `code`, the answer's headers."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}


STATUSES: dict[type[Exception], int] = {
    store_errors.InvalidArtefactError: 422,
    store_errors.ArtefactTooLargeError: 413,
    store_errors.KeyEndedError: 401,
    store_errors.SuspendedError: 403,
    store_errors.NotFoundError: 404,
    store_errors.ConflictError: 409,
    store_errors.DisabledError: 423,
    store_errors.PreconditionFailedError: 412,
    store_errors.DamagedBlobError: 500,
    store_errors.InvalidTenantError: 422,
    store_errors.InvalidChangeError: 422,
    store_errors.StorageFullError: 507,
    store_errors.UnavailableError: 503,
    engine_errors.PromptTooLongError: 422,
    engine_errors.ChatRefusedError: 422,
    engine_errors.TooManyAnswersError: 422,
    engine_errors.UnknownTokenError: 422,
    engine_errors.OverloadedError: 503,
    engine_errors.TenantBusyError: 429,
    engine_errors.PrefixLoadError: 424,
    engine_errors.PrefixAwayError: 503,
    engine_errors.PrefixFaultError: 422,
    engine_errors.GenerationError: 500,
}


def status_of(error: Exception) -> int:
    if isinstance(error, RequestError):
        return error.status
    return next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), 500)


def tgi_type(status: int) -> str:
    """TGI's `error_type` of a status."""
    return {404: "not_found", 424: "generation", 429: "overloaded", 503: "overloaded"}.get(
        status, "generation" if status >= 500 else "validation"
    )


def error_response(
    path: str,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """The body that callers of `path` expect. What a second try would not mend says so."""
    message, param = _sendable(message), param and _sendable(param)
    headers = (headers or {}) | ({} if status in TRANSIENT else NO_RETRY)
    is_final = headers.keys() >= NO_RETRY.keys()
    if path in TGI_PATHS:
        kind = tgi_type(422 if is_final and status in TRANSIENT else status)
        return JSONResponse({"error": message, "error_type": kind}, status, headers)
    if path.startswith(OPENAI_PATHS):
        status = 400 if status == 422 else status
        error = openai_error(status, message, param, code)
        if is_final:
            error["type"] = "invalid_request_error"
        return JSONResponse({"error": error}, status, headers)
    problem = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": message}
    return JSONResponse(problem, status, headers, media_type="application/problem+json")


def _sendable(text: str) -> str:
    """Bounded, and printable whatever the caller sent."""
    return escaped(text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…")


def openai_error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """`code`: where it is not told by the status."""
    kind = "invalid_request_error" if status < 500 and status not in (424, 429) else "server_error"
    code = code or {
        401: "invalid_api_key",
        403: "permission_denied",
        404: "model_not_found",
        429: "rate_limit_exceeded",
        503: "overloaded",
    }.get(status)
    return {"message": message, "type": kind, "param": param, "code": code}


TGI_ERRORS = documented("application/json", {"error": "no task 'film'", "error_type": "not_found"})
OPENAI_ERRORS = documented("application/json", {"error": openai_error(404, "the model 'film' does not exist", "model")})
PROBLEMS = documented(
    "application/problem+json",
    {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "no task 'film'"},
)


def own_path(request: Request) -> str:
    """The path as routes have it, without the prefix that the server is served behind."""
    path: str = request.state.path
    return path


def refusal(path: str, error: Exception) -> JSONResponse:
    """The answer to an error that has a status."""
    status, headers = status_of(error), dict(getattr(error, "headers", {}))
    if status == 401:
        headers.setdefault("WWW-Authenticate", "Bearer")
    if status in (429, 503) and not headers.keys() & NO_RETRY:
        headers.setdefault("Retry-After", str(getattr(error, "retry_after_s", RETRY_S)))
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return error_response(path, status, str(error), param=param, code=code, headers=headers)


def install(app: FastAPI) -> None:
    """One handler for every exception that may reach a route's end."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        if getattr(error, "detail", ""):
            reason = store_errors.in_full(error)
            log.warning("refused", status=status_of(error), path=own_path(request), reason=reason)
        if isinstance(error, store_errors.ForeignFilesError):  # it names places, which are for operators
            log.warning("refused", status=status_of(error), path=own_path(request), reason=str(error))
            error = store_errors.UnavailableError("the files belong to another registry")
        if isinstance(error, store_errors.MemberError):
            error = error.seen_by(request.state.caller.allows_task)
        return refusal(own_path(request), error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        wrong = field_error(error.errors(), error.body)
        return error_response(own_path(request), 422, wrong.message, param=wrong.path or None)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        return error_response(own_path(request), error.status_code, str(error.detail), headers=headers)

    for kind in (RequestError, store_errors.PrefixStoreError, engine_errors.EngineError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
