"""A query parameter that the route does not know, or that comes twice, is refused: a misspelt `task` must not mean
the bare model."""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute

from server.api.errors import RequestError


async def refuse_unknown_query(request: Request) -> None:
    """Raises RequestError."""
    route = request.scope.get("route")
    if not request.query_params or not isinstance(route, APIRoute):
        return
    known = {param.alias for param in route.dependant.query_params}
    for name in request.query_params:
        if name not in known:
            wanted = f"known are {', '.join(sorted(known))}" if known else "this route has none"
            raise RequestError(422, f"unknown query parameter {name[:80]!r}; {wanted}", name[:80])
        if len(request.query_params.getlist(name)) > 1:
            raise RequestError(422, f"query parameter {name!r} must come once, came more often", name)
