"""`If-Match` and `If-None-Match` as the store understands them."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Header

from prefix_store.task import Precondition
from server.api.errors import RequestError

IfMatch = Annotated[
    str | None, Header(alias="If-Match", max_length=1000, description="The task's revision (a version's digest).")
]
IfNoneMatch = Annotated[
    str | None, Header(alias="If-None-Match", max_length=80, description="`*`: only if there is none yet.")
]
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
