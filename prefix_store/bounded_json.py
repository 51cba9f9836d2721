"""JSON from strangers: bounded, no duplicate keys, no NaN."""

from __future__ import annotations

import json
from typing import Any

from prefix_store.errors import InvalidArtefactError


def read_json_object(body: bytes, name: str, max_bytes: int) -> dict[str, Any]:
    """The object in `body`. Raises InvalidArtefactError naming `name`."""
    if len(body) > max_bytes:
        raise InvalidArtefactError(f"{name} must be <= {max_bytes} bytes, got {len(body)}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        for key in keys:
            if len(keys) < 64 and keys.count(key) > 1:
                raise InvalidArtefactError(f"{name}: duplicate key {key!r}")
        made = dict(items)
        if len(made) != len(items):
            raise InvalidArtefactError(f"{name}: duplicate keys")
        return made

    def constant(text: str) -> None:
        raise InvalidArtefactError(f"{name}: {text} is not JSON")

    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise InvalidArtefactError(f"{name} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise InvalidArtefactError(f"{name} must be a JSON object, got {type(found).__name__}")
    return found
