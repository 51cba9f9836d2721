"""JSON from strangers: bounded, no duplicate keys, no NaN."""

from __future__ import annotations

import json
from typing import Any

from prefix_store.errors import InvalidArtefactError


def read_json_object(body: bytes, name: str, max_bytes: int) -> dict[str, Any]:
    """The object in `body`. Raises InvalidArtefactError naming `name`."""
    if len(body) > max_bytes:
        raise InvalidArtefactError(f"{name} must be <= {max_bytes} bytes, got {len(body)}")
    found = parse_json(body, name)
    if not isinstance(found, dict):
        raise InvalidArtefactError(f"{name} must be a JSON object, got {shown(found)}")
    return found


def parse_json(body: bytes, name: str, *, allows_nan: bool = False) -> Any:
    """The value in `body`. Raises InvalidArtefactError naming `name`. With `allows_nan` NaN and infinities are values,
    which a caller that checks each field refuses by the field's name."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if not items:  # of which a few MiB may hold a million
            return {}
        made = dict(items)
        if len(made) != len(items):
            keys = [key for key, _ in items]
            doubled = next((key for key in keys if len(keys) < 64 and keys.count(key) > 1), None)
            raise InvalidArtefactError(
                f"{name}: duplicate keys" if doubled is None else f"{name}: duplicate key {shown(doubled)}"
            )
        return made

    def constant(text: str) -> float:
        if not allows_nan:
            raise InvalidArtefactError(f"{name}: {text} is not JSON")
        return float(text)

    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise InvalidArtefactError(f"{name} is not valid JSON: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno} ({error.msg})"
        raise InvalidArtefactError(f"{name} is not valid JSON: {where}") from error
    except ValueError as error:  # of an integer's length
        raise InvalidArtefactError(f"{name} is not valid JSON: a number has too many digits") from error
    except RecursionError as error:
        raise InvalidArtefactError(f"{name} is not valid JSON: it nests too deeply") from error


def shown(value: object) -> str:
    """A JSON value as reasons name it: short, on one line, a text in quotes."""
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:60]
