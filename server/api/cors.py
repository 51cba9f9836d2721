"""Which pages of other origins may read answers (the Fetch standard's CORS protocol)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders

ANY_ORIGIN = "*"
MAX_AGE_S = 600
NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
MAX_NAMES = 1000  # characters
RATES = tuple(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens"))
EXPOSED = ", ".join(
    (
        "X-Request-Id",
        "X-Task",
        "X-Prefix-Version",
        "ETag",
        "Location",
        "Allow",
        "Retry-After",
        "Content-Disposition",
        "WWW-Authenticate",
        "x-queue-time",
        "x-inference-time",
        "x-total-time",
        *RATES,
    )
)


class Cors:
    """`origins` as `https://HOST`, or `*` for all; without any no answer has a header of CORS."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.lower() for origin in origins)

    def names(self, origin: str) -> bool:
        """Whether this very origin is let in."""
        return origin.lower() in self._origins - {ANY_ORIGIN}

    @property
    def is_any(self) -> bool:
        return ANY_ORIGIN in self._origins

    def add(self, asked: Headers, answer: MutableHeaders) -> None:
        """What a page may read of an answer."""
        if not self._origins:
            return
        origin = asked.get("origin")
        if not self.is_any:
            answer.add_vary_header("Origin")
        if origin is not None and (self.is_any or self.names(origin)):
            answer["Access-Control-Allow-Origin"] = ANY_ORIGIN if self.is_any else origin
            answer["Access-Control-Expose-Headers"] = EXPOSED

    def preflight(self, asked: Headers, methods: Iterable[str]) -> dict[str, str]:
        """What a browser asks before it sends a request; `add` says whether this origin may."""
        if not self._origins or "access-control-request-method" not in asked:
            return {}
        wanted = asked.get("access-control-request-headers", "")
        names = {"Access-Control-Allow-Headers": wanted} if len(wanted) <= MAX_NAMES and NAMES.fullmatch(wanted) else {}
        allowed = {"Access-Control-Allow-Methods": ", ".join(methods), "Access-Control-Max-Age": str(MAX_AGE_S)}
        return allowed | names
