"""What is wrong with a field of a request: its name as the caller wrote it, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from prefix_store.bounded_json import shown
from server.api.wire import WRONG_FIELD

MAX_PATH = 200  # characters
BODY = "the body"

# What a type of error expected of a value, in which the error's context stands. These name a type that did not come:
KINDS = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_type": "a text",
}
# and these a value of the right type:
VALUES = {
    "finite_number": "a finite number",
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "int_parsing_size": "a number of fewer digits",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "a text of the form {pattern}",
    "string_unicode": "a text without lone surrogates",
}
LENGTHS = {
    "string_too_long": "<= {max_length} characters",
    "string_too_short": ">= {min_length} characters",
    "too_long": "<= {max_length} items",
    "too_short": ">= {min_length} items",
}


@dataclass(frozen=True)
class FieldError:
    """`path` is empty where the body as a whole is wrong."""

    path: str
    message: str


def field_error(errors: Sequence[ErrorDetails], body: Any) -> FieldError:
    """The first field's of pydantic's `errors` about `body`. Of a value that may have several types each type has its
    errors: they are one error here, of the type that the value has, or of all."""
    paths = [_path(error, body) for error in errors]
    within = (f"{paths[0]}.", f"{paths[0]}[")
    of_first = [i for i, path in enumerate(paths) if path == paths[0] or path.startswith(within)]
    best = max(of_first, key=lambda i: (errors[i]["type"] not in KINDS, paths[i].count(".") + paths[i].count("[")))
    path, error = paths[best][:MAX_PATH], errors[best]
    if error["type"] in KINDS:
        same = [KINDS[errors[i]["type"]] for i in of_first if paths[i] == paths[best] and errors[i]["type"] in KINDS]
        expected = " or ".join(dict.fromkeys(same))
        return FieldError(path, f"{path or BODY} must be {expected}, got {shown(error['input'])}")
    return _of_value(path, error)


def _of_value(path: str, error: ErrorDetails) -> FieldError:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    name = path or BODY
    if kind == WRONG_FIELD:
        field = ".".join(filter(None, (path, context["field"])))
        return FieldError(field, f"{field or BODY} {context['reason']}")
    if kind == "missing":
        return FieldError(path, f"{path or 'a JSON body'} is required")
    if kind == "extra_forbidden":
        return FieldError(path, f"{path} is no field of this request, got {shown(value)}")
    if kind in LENGTHS:
        return FieldError(path, f"{name} must have {LENGTHS[kind].format(**context)}, got {len(value)}")
    if kind in VALUES:
        return FieldError(path, f"{name} must be {VALUES[kind].format(**_short(context))}, got {shown(value)}")
    return FieldError(path, f"{name}: {error['msg'].removeprefix('Value error, ')}")


def _path(error: ErrorDetails, body: Any) -> str:
    """`messages[1].content`: the steps of pydantic's location that lead through the body, and not those that name one
    of a field's types."""
    source, *steps = error["loc"]
    if source != "body":  # a query parameter or a header
        return str(steps[0])
    path, value = "", body
    for i, step in enumerate(steps):
        is_item = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if is_item or (isinstance(value, dict) and step in value):
            value = value[step]
        elif error["type"] != "missing" or i < len(steps) - 1:
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path


def _short(context: dict[str, Any]) -> dict[str, Any]:
    """Bounds that are whole numbers, without a fraction."""
    return {name: int(x) if isinstance(x, float) and x.is_integer() else x for name, x in context.items()}
