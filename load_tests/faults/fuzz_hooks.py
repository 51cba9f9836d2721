"""Names of what is there, in half of the requests that schemathesis makes up: it cannot know them from the schema.

`SCHEMATHESIS_HOOKS` of `faults.fuzz_http`.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import schemathesis

KNOWN = {"task": "films", "model": "films", "version": "1", "name": "default"}


def _named(operation: Any, given: Any) -> Any:
    """As `given`, or with the names of what is there: by its content, so that a run can be repeated. What is no name
    stays: the check that it is refused knows of it. Deletions and suspensions are asked of what is not there."""
    if not isinstance(given, dict) or operation.method.upper() == "DELETE" or operation.path.endswith("/suspend"):
        return given
    if not _is_named(given):
        return given
    return {name: KNOWN[name] if name in KNOWN and _may_be(value) else value for name, value in given.items()}


def _may_be(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= 64


def _is_named(given: dict[str, Any]) -> bool:
    return zlib.crc32(json.dumps(given, sort_keys=True, default=str).encode()) % 2 == 0


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    return _named(context.operation, path_parameters)


@schemathesis.hook
def map_headers(context: Any, headers: Any) -> Any:
    """None of the conditions, which nobody guesses."""
    if not isinstance(headers, dict) or not _is_named(headers):
        return headers
    return {name: value for name, value in headers.items() if name not in ("If-Match", "If-None-Match")}


@schemathesis.hook
def map_query(context: Any, query: Any) -> Any:
    return _named(context.operation, query)


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    return _named(context.operation, body)
