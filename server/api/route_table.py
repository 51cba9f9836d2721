"""Which methods a path has, asked before any route."""

from __future__ import annotations

from collections.abc import Iterable
from re import Pattern

from starlette.routing import BaseRoute, Route

EVERY = "*"  # the target of an OPTIONS that asks about the server
ORDER = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")


class RouteTable:
    """The paths of an application's routes."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._rules: list[tuple[Pattern[str], set[str]]] = [
            (route.path_regex, set(route.methods or ())) for route in routes if isinstance(route, Route)
        ]

    def methods(self, path: str) -> tuple[str, ...]:
        """Empty: there is no such path, or a route without methods has it."""
        found = {method for rule, methods in self._rules if path == EVERY or rule.match(path) for method in methods}
        if "GET" in found:
            found.add("HEAD")
        if found:
            found.add("OPTIONS")
        return tuple(method for method in ORDER if method in found)
