"""JSON bodies of requests, read strictly: what is no JSON is refused by line and column, a doubled key by its name."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from prefix_store.bounded_json import parse_json
from prefix_store.errors import InvalidArtefactError


def read_body(body: bytes) -> Any:
    """The body's value. NaN and infinities are left to the fields. Raises HTTPException 422."""
    try:
        return parse_json(body, "the body", allows_nan=True)
    except InvalidArtefactError as error:
        raise HTTPException(422, str(error)) from error


class StrictRequest(Request):
    """A request whose JSON FastAPI reads with `read_body`."""

    async def json(self) -> Any:
        return read_body(await self.body())


class JSONRoute(APIRoute):
    """A route that takes a JSON body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle
