"""`If-Match` and `If-None-Match` as the store understands them."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Header
from starlette.datastructures import Headers

from prefix_store.task import Precondition
from server.api.errors import RequestError

IfMatch = Annotated[
    str | None, Header(alias="If-Match", max_length=1000, description="The task's revision (a version's digest).")
]
IfNoneMatch = Annotated[
    str | None, Header(alias="If-None-Match", max_length=80, description="`*`: only if there is none yet.")
]
ENTITY_TAGS = re.compile(r'"[^"]*"')
ETAG = re.compile(r'"([^"]*)"|(\*)')


def precondition_of(if_match: str | None, if_none_match: str | None) -> Precondition:
    if if_none_match not in (None, "*"):
        raise RequestError(422, f"If-None-Match must be *, got {str(if_none_match)[:80]!r}")
    if if_match is None:
        return Precondition(must_be_new=if_none_match is not None)
    parts = [part.strip() for part in if_match.split(",")]
    matches = [ETAG.fullmatch(part) for part in parts]
    if not all(matches):
        raise RequestError(422, f'If-Match must be "ETAG", a list of them, or *; got {if_match[:80]!r}')
    return Precondition(frozenset(m.group(1) or m.group(2) or "" for m in matches if m), if_none_match is not None)


def is_current(headers: Headers, etag: str | None) -> bool:
    """Whether a read that has `If-None-Match` names what would be answered (RFC 9110 13.1.2, weak comparison)."""
    given = ",".join(headers.getlist("if-none-match"))
    if etag is None or not given:
        return False
    return given.strip() == "*" or etag.removeprefix("W/") in ENTITY_TAGS.findall(given)
