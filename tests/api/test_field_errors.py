"""What is wrong with a request is said of the caller's field: every field and query parameter of the OpenAPI page gets
wrong values, and each answer names the field, the bound and what came."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from prefix_store.bounded_json import shown
from server.api.wire import WireModel
from tests.conftest import NAME, NATIVE, Served, native

JSON = "application/json"
OF_PYDANTIC = re.compile(
    r"constrained|function-|list\[|dict\[|nullable|Annotated|Input should|valid (string|integer|number|list|dict)"
    r"|Value error|literal\[|lax-or-strict|model_|_type|ctx|at position"
)
ROLES = {"tool_calls": "assistant", "refusal": "assistant", "tool_call_id": "tool"}
MAX_TEXT = 2**22  # a longer one is a body that is too large
CANDIDATES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    ("text", ("string",)),
    (5, ("integer", "number")),
    (1.5, ("number",)),
    (True, ("boolean",)),
    ([], ("array",)),
    ({}, ("object",)),
    (None, ("null",)),
)


def said(response: httpx.Response) -> str:
    """The message of a refusal, whatever the route's form."""
    assert response.status_code in (400, 422), (response.status_code, response.text[:300])
    body = response.json()
    if "detail" in body:
        return str(body["detail"])
    return str(body["error"] if isinstance(body["error"], str) else body["error"]["message"])


def post(served: Served, path: str, body: str | bytes) -> httpx.Response:
    return served.http.post(path, content=body, headers={"Content-Type": JSON})


@dataclass(frozen=True)
class Wrong:
    """A value, and what its refusal says beside the field's name."""

    value: Any
    bound: str
    came: str


@dataclass(frozen=True)
class Case:
    method: str
    url: str
    body: Any
    field: str
    wrong: Wrong


class Page:
    """The OpenAPI page, and the wrong values that follow from its schemas."""

    def __init__(self, page: dict[str, Any]) -> None:
        self.paths = page["paths"]
        self._schemas = page["components"]["schemas"]
        self.models: set[str] = set()

    def options(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """The types that a value may have."""
        schema = self._resolved(schema)
        return [found for one in schema["anyOf"] for found in self.options(one)] if "anyOf" in schema else [schema]

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self._schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        return found

    def sample(self, schema: dict[str, Any]) -> Any:
        """A right value."""
        one = self.options(schema)[0]
        if one.get("examples") and one.get("type") == "object":
            return copy.deepcopy(one["examples"][0])
        if "const" in one or "enum" in one:
            return one.get("const", one.get("enum", [None])[0])
        if one["type"] == "object":
            made = {name: self.sample(one["properties"][name]) for name in one.get("required", ())}
            if "role" in made:
                made |= {"role": "user", "content": "x"}
            return {"1": self.sample(one["additionalProperties"])} if not made and "properties" not in one else made
        if one["type"] == "array":
            return [self.sample(one["items"])] * one.get("minItems", 1)
        number = one.get("minimum", one.get("exclusiveMinimum", 0) + 1)
        text = "{}" if one.get("title") == "Arguments" else "a" * max(1, one.get("minLength", 1))
        return {"string": text, "boolean": True, "integer": int(number)}.get(one["type"], number)

    def wrong(self, schema: dict[str, Any]) -> Iterator[Wrong]:
        """Of other types, beyond a bound, too long, too many."""
        options = self.options(schema)
        types = {one.get("type", "string") for one in options}
        for value, kinds in CANDIDATES:
            is_taken = types.intersection(kinds) or (kinds[0] == "boolean" and any("const" in one for one in options))
            if not is_taken and not (value == 5 and "number" in types):
                yield Wrong(value, "must be", shown(value))
        for one in options:
            if "const" in one or "enum" in one:
                if "string" in types and one.get("type", "string") == "string":
                    yield Wrong("nonsense", str(one.get("const", one.get("enum", [""])[0])), "'nonsense'")
                continue
            for name, beyond in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1), ("exclusiveMaximum", 0)):
                if name in one:  # the page has them as floats
                    bound = int(one[name]) if float(one[name]).is_integer() else one[name]
                    yield Wrong(bound + beyond, str(bound), shown(bound + beyond))
            if one.get("type") in ("number", "integer"):
                yield Wrong(float("nan"), "number", "NaN")
            if one.get("type") == "string" and "enum" not in one and len(types - {"null"}) == 1:
                yield Wrong("a\ud800", "surrogates", "got")
                if "pattern" in one:
                    yield Wrong("###", one["pattern"], "'###'")
            if (longest := one.get("maxLength", MAX_TEXT)) < MAX_TEXT:
                yield Wrong("a" * (longest + 1), str(longest), str(longest + 1))
            if one.get("minLength"):
                yield Wrong("", str(one["minLength"]), "got 0")
            if "maxItems" in one:
                most = one["maxItems"]
                yield Wrong([self.sample(one["items"])] * (most + 1), str(most), str(most + 1))
            if one.get("minItems"):
                yield Wrong([], str(one["minItems"]), "got 0")
            if "maxProperties" in one:
                most, item = one["maxProperties"], self.sample(one["additionalProperties"])
                yield Wrong({str(i + 1): item for i in range(most + 1)}, str(most), str(most + 1))

    def fields(self, schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, Wrong]]:
        """Of a model and those within it: a field's path, a body that is right but for it, and what is wrong."""
        model = next(one for one in self.options(schema) if "properties" in one)
        self.models.add(model["title"])
        base = self.sample(model)
        for name, one in model["properties"].items():
            role = {"role": ROLES[name]} if name in ROLES and "role" in base else {}
            for wrong in self.wrong(one):
                yield f"{path}{name}", base | role | {name: wrong.value}, wrong
            if name in model.get("required", ()):
                without = {key: value for key, value in base.items() if key != name}
                yield f"{path}{name}", without, Wrong(None, "is required", "")
            for option in self.options(one):
                for step, inner, wrong in self._within(option):
                    yield f"{path}{name}{step}", base | role | {name: inner}, wrong
        if model.get("additionalProperties") is False:
            yield f"{path}no_such_field", base | {"no_such_field": 1}, Wrong(1, "no field", "1")

    def _within(self, option: dict[str, Any]) -> Iterator[tuple[str, Any, Wrong]]:
        if "properties" in option:
            yield from ((f".{path}", body, wrong) for path, body, wrong in self.fields(option))
        elif option.get("type") == "array":
            item = option["items"]
            right = [self.sample(item)] * max(0, option.get("minItems", 0) - 1)
            if any("properties" in one for one in self.options(item)):
                for path, body, wrong in self.fields(item):
                    yield f"[{len(right)}].{path}", [*right, body], wrong
            else:
                yield from ((f"[{len(right)}]", [*right, wrong.value], wrong) for wrong in self.wrong(item))
        elif option.get("type") == "object":
            values = option["additionalProperties"]
            yield from ((".1", {"1": wrong.value}, wrong) for wrong in self.wrong(values))


def bodies(page: Page) -> Iterator[Case]:
    for path, operations in page.paths.items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            if JSON not in content:
                continue
            url = path.replace("{task}", "films").replace("{name}", "north")
            for field, body, wrong in page.fields(content[JSON]["schema"]):
                yield Case(method, url, body, field, wrong)


def test_every_field_of_every_body_is_named_with_its_bound_and_what_came(served: Served, films: str) -> None:
    page = Page(served.http.get("/openapi.json").json())
    num_cases, faults = 0, []
    for case in bodies(page):
        num_cases += 1
        content = json.dumps(case.body)
        answer = served.http.request(case.method, case.url, content=content, headers={"Content-Type": JSON})
        if answer.status_code not in (400, 422):
            faults.append((case.url, case.field, shown(case.wrong.value), answer.status_code, answer.text[:200]))
            continue
        message = said(answer)
        if OF_PYDANTIC.search(message) or not all(
            text in message for text in (case.field, case.wrong.bound, case.wrong.came)
        ):
            faults.append((case.url, case.field, shown(case.wrong.value), message[:300]))
        error = answer.json().get("error")
        if isinstance(error, dict) and error["param"] != case.field:
            faults.append((case.url, case.field, error["param"]))
    assert not faults, "\n".join(map(str, faults))
    assert num_cases > 500
    assert page.models >= {model.__name__ for model in all_models(WireModel)} - {"OpenAIRequest"}


def as_text(value: Any, schema: dict[str, Any]) -> str | None:
    """As a query has it; None where that is a right value, or none."""
    takes_text = "'string'" in str(schema)
    if isinstance(value, str):
        return value if value.isascii() and value else None
    return str(value) if isinstance(value, int | float) and value is not True and not takes_text else None


def all_models(base: type[WireModel]) -> set[type[WireModel]]:
    return {found for model in base.__subclasses__() for found in (model, *all_models(model))}


def test_every_query_parameter_and_header_is_named_with_its_bound(served: Served, films: str) -> None:
    page = Page(served.http.get("/openapi.json").json())
    num_cases, faults = 0, []
    for path, operations in page.paths.items():
        for method, operation in operations.items():
            url = path.replace("{task}", "films").replace("{name}", "north").replace("{version}", "1")
            schema = operation.get("requestBody", {}).get("content", {}).get(JSON, {}).get("schema")
            is_upload = method == "put" and path == "/v1/prefixes/{task}"
            content = native(1) if is_upload else json.dumps(page.sample(schema)).encode() if schema else b""
            kind = {"Content-Type": NATIVE if is_upload else JSON} if content else {}
            for parameter in operation.get("parameters", ()):
                for wrong in page.wrong(parameter["schema"]):
                    text = as_text(wrong.value, parameter["schema"])
                    if parameter["in"] == "path" or text is None:
                        continue
                    num_cases += 1
                    name = parameter["name"]
                    query = {name: text} if parameter["in"] == "query" else {}
                    headers = kind | ({name: text} if parameter["in"] == "header" else {})
                    answer = served.http.request(method, url, content=content, headers=headers, params=query)
                    message = said(answer)
                    if OF_PYDANTIC.search(message) or name not in message or wrong.bound not in message:
                        faults.append((url, name, text[:60], message[:300]))
    assert not faults, "\n".join(map(str, faults))
    assert num_cases > 20


@pytest.mark.parametrize(
    "path", ["/generate", "/v1/completions", "/v1/prefixes/films/activate", "/v1/tenants/north/keys"]
)
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"a": 1,\n "b" 2}', ("line 2", "column 6")),
        (b"{", ("line 1", "column 2")),
        (b'{"a": 1}}', ("line 1", "column 9")),
        (b'{"a": \xff}', ("UTF-8",)),
        (b'{"n": ' + b"1" * 5000 + b"}", ("too many digits",)),
        (b"[" * 100_000, ("too deeply",)),
        (b'{"seed": 1, "seed": 2}', ("seed", "duplicate")),
        (b'{"parameters": {"stop": [], "stop": []}}', ("stop", "duplicate")),
        (b"[1]", ("an object", "a list")),
        (b'"text"', ("an object", "'text'")),
        (b"", ("required",)),
    ],
)
def test_a_body_that_is_no_json_object_is_refused_by_line(
    served: Served, films: str, path: str, body: bytes, words: tuple[str, ...]
) -> None:
    answer = post(served, path, body)
    message = said(answer)
    assert all(word in message for word in words), message
    assert not OF_PYDANTIC.search(message)
    error = answer.json().get("error")
    assert not isinstance(error, dict) or error["param"] is None


def test_the_number_of_stops_is_told_and_not_a_type_of_ours(served: Served) -> None:
    for path, field in (("/v1/completions", "stop"), ("/generate", "parameters.stop")):
        stops = [str(i) for i in range(17)]
        body = {"model": NAME, "prompt": "x", "stop": stops} if field == "stop" else None
        answer = served.http.post(path, json=body or {"inputs": "x", "parameters": {"stop": stops}})
        assert said(answer) == f"{field} must have <= 16 items, got 17"
    assert answer.json()["error_type"] == "validation"


def test_a_value_that_fits_no_type_of_its_field_is_told_all_of_them(served: Served) -> None:
    body = {"model": NAME, "prompt": "x", "stop": 5}
    assert said(served.http.post("/v1/completions", json=body)) == "stop must be a text or a list, got 5"
    body = {"model": NAME, "prompt": "x", "stop": ["a", 5]}
    assert said(served.http.post("/v1/completions", json=body)) == "stop[1] must be a text, got 5"
