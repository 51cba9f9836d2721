"""What HTTP promises of every route: HEAD, OPTIONS, Allow, 304; pages of other origins; a prefix before the path."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.config import Settings
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import (
    NAME,
    NATIVE,
    OPERATOR_KEY,
    Served,
    bearer,
    make_tenant,
    native,
    serve_in_thread,
    settings_for,
    write_key,
)
from tests.raw_http import ask

PAGE = "https://app.example"
BODY = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
PATHS = ("/healthz", "/readyz", "/info", "/v1/models", "/v1/models/tiny", "/v1/prefixes", "/v1/prefixes/films")
MORE = ("/v1/prefixes/films/versions/1", "/v1/prefixes/films/versions/1/file", "/v1/tenants", "/v1/audit", "/v1/usage")


def serving(model_path: Path, folder: Path, **more: object) -> Iterator[Served]:
    yield from serve_in_thread(make_state(settings_for(folder, **more), ModelFiles(model_path, NAME)))


@pytest.fixture(scope="module")
def prefixed(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server behind a prefix, with an operator's key and a page that may ask."""
    folder = tmp_path_factory.mktemp("prefixed")
    write_key(folder / "key", OPERATOR_KEY)
    more = {"root_path": "/team/llm/", "cors_allow_origin": (PAGE,), "operator_key_file": folder / "key"}
    yield from serving(model_path, folder / "data", **more)


def test_a_key_behind_a_prefix_ends_itself(prefixed: Served) -> None:
    operator = prefixed.as_key(OPERATOR_KEY)
    make_tenant(operator, "house")
    for path in ("/team/llm", ""):
        made = operator.http.post("/v1/tenants/house/keys", json={"scopes": ["generate"]}).json()
        own = prefixed.as_key(made["key"]).http.delete(f"{path}/v1/tenants/house/keys/{made['id']}")
        assert own.status_code == 204, own.text


@pytest.fixture(scope="module")
def open_to_all(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server without keys that any page may ask."""
    yield from serving(model_path, tmp_path_factory.mktemp("open"), cors_allow_origin="*")


@pytest.mark.parametrize("path", [*PATHS, *MORE, "/metrics"])
def test_head_is_get_without_the_body(served: Served, films: str, path: str) -> None:
    got, headed = served.http.get(path), ask(served, f"HEAD {path}")
    assert (headed.status, headed.body) == (got.status_code, b"")
    assert headed.headers.keys() >= set(got.headers) - {"date"}
    if path != "/metrics" and path != "/v1/usage":
        assert headed.headers["content-length"] == got.headers["content-length"]


def test_head_of_what_is_not_there_has_no_body(served: Served) -> None:
    for path, status in (("/v1/prefixes/none", 404), ("/no/such", 404), ("/generate", 405)):
        assert served.http.get(path).status_code == status
        headed = ask(served, f"HEAD {path}")
        assert (headed.status, headed.body) == (status, b"")


def test_options_names_every_method_of_a_path_without_a_key(keyed: Served) -> None:
    for path, allow in (
        ("/generate", "POST, OPTIONS"),
        ("/healthz", "GET, HEAD, OPTIONS"),
        ("/v1/prefixes/films", "GET, HEAD, PUT, DELETE, OPTIONS"),
        ("/v1/tenants/north/keys", "POST, OPTIONS"),
        ("*", "GET, HEAD, POST, PUT, DELETE, OPTIONS"),
    ):
        answer = ask(keyed, f"OPTIONS {path}")
        assert (answer.status, answer.headers["allow"], answer.body) == (204, allow, b"")
    assert httpx.options(f"{keyed.url}/no/such").status_code == 401
    assert keyed.http.options("/no/such").status_code == 404


def test_a_wrong_method_is_405_whatever_the_content_type(served: Served, films: str) -> None:
    for method, path, allow in (
        ("PUT", "/generate", "POST, OPTIONS"),
        ("POST", f"/v1/prefixes/{films}", "GET, HEAD, PUT, DELETE, OPTIONS"),
        ("PATCH", f"/v1/prefixes/{films}", "GET, HEAD, PUT, DELETE, OPTIONS"),
        ("POST", "/healthz", "GET, HEAD, OPTIONS"),
        ("DELETE", "/v1/usage", "GET, HEAD, OPTIONS"),
    ):
        for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
            answer = served.http.request(method, path, content=b"x", headers=headers)
            assert (answer.status_code, answer.headers["Allow"]) == (405, allow), (method, path)


def test_a_key_is_asked_for_before_the_method_is_told(keyed: Served) -> None:
    answer = httpx.put(f"{keyed.url}/generate", content=b"x")
    assert (answer.status_code, "allow" in answer.headers) == (401, False)
    assert keyed.http.put("/generate", content=b"x").status_code == 405


def test_what_the_caller_has_is_304(served: Served, films: str) -> None:
    for path in (f"/v1/prefixes/{films}", f"/v1/prefixes/{films}@1", *MORE[:2]):
        first = served.http.get(path)
        etag = first.headers["ETag"]
        for given in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            again = served.http.get(path, headers={"If-None-Match": given})
            assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)
            assert again.headers["X-Request-Id"]
            assert ask(served, f"HEAD {path}", f"If-None-Match: {given}").status == 304
        for given in ('"other"', etag.strip('"')):
            assert served.http.get(path, headers={"If-None-Match": given}).content == first.content
    assert served.http.get("/v1/prefixes/none", headers={"If-None-Match": "*"}).status_code == 404
    assert served.http.get("/info", headers={"If-None-Match": "*"}).status_code == 200


def test_a_part_of_an_upload_is_refused(served: Served) -> None:
    headers = {"Content-Type": NATIVE, "Content-Range": "bytes 0-9/100"}
    assert served.http.put("/v1/prefixes/part", content=native(5), headers=headers).status_code == 400
    assert served.http.get("/v1/prefixes/part").status_code == 404


@pytest.mark.parametrize("path", ["/v1/prefixes/", "//v1/prefixes", "/v1//prefixes", "/generate/", "/v1/tenants/"])
def test_paths_with_other_slashes_are_not_there(keyed: Served, path: str) -> None:
    assert keyed.http.request("GET", f"{keyed.url}{path}").status_code in (404, 405)
    assert httpx.get(f"{keyed.url}{path}").status_code == 401


@pytest.mark.parametrize(
    "path",
    ["/v1%2Ftenants", "/v1/tenants%2fnorth", "%2Fv1/audit", "/v1/prefixes/../tenants", "/v1/./audit", "/%2e%2e/x"],
)
def test_paths_that_a_proxy_reads_otherwise_are_refused(keyed: Served, path: str) -> None:
    answer = ask(keyed, f"GET {path}", f"Authorization: Bearer {OPERATOR_KEY}")
    assert answer.status == 400, answer.body


def test_a_task_of_another_may_be_one_encoded_segment(served: Served) -> None:
    assert served.http.get("/v1/models/owner%2Ftask").json()["error"]["code"] == "model_not_found"


class TestCors:
    def test_no_answer_has_it_by_default(self, served: Served) -> None:
        answer = served.http.get("/healthz", headers={"Origin": "http://localhost:3000"})
        assert not [name for name in answer.headers if name.startswith("access-control")]

    def test_a_page_is_told_what_it_may_send(self, prefixed: Served) -> None:
        wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-own"}
        asked = httpx.options(f"{prefixed.url}/v1/chat/completions", headers={"Origin": PAGE} | wanted)
        assert asked.status_code == 204
        assert asked.headers["Access-Control-Allow-Origin"] == PAGE
        assert "POST" in asked.headers["Access-Control-Allow-Methods"]
        assert asked.headers["Access-Control-Allow-Headers"] == "authorization, x-own"
        other = httpx.options(f"{prefixed.url}/v1/models", headers={"Origin": "https://evil.example"} | wanted)
        assert "access-control-allow-origin" not in other.headers

    def test_errors_are_readable_too(self, prefixed: Served) -> None:
        for path, key, status in (("/info", "", 401), ("/no/such", OPERATOR_KEY, 404), ("/info", OPERATOR_KEY, 200)):
            answer = httpx.get(f"{prefixed.url}{path}", headers={"Origin": PAGE} | (bearer(key) if key else {}))
            assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (status, PAGE)
            assert "Origin" in answer.headers["Vary"]
            for name in ("X-Request-Id", "X-Task", "X-Prefix-Version", "ETag"):
                assert name in answer.headers["Access-Control-Expose-Headers"]

    def test_any_page_may_ask_and_change_nothing(self, open_to_all: Served) -> None:
        page = {"Origin": "https://somewhere.example"}
        asked = open_to_all.http.post("/generate", json=BODY, headers=page)
        assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (200, "*")
        put = open_to_all.http.put("/v1/prefixes/films", content=native(1), headers=page | {"Content-Type": NATIVE})
        assert (put.status_code, put.headers["Access-Control-Allow-Origin"]) == (403, "*")

    @pytest.mark.parametrize("wrong", ["app.example", "https://app.example/", "https://app.example/page", "https://"])
    def test_what_is_no_origin_stops_the_start(self, wrong: str) -> None:
        with pytest.raises(ValueError, match="origin must be"):
            Settings(cors_allow_origin=(wrong,))


class TestRootPath:
    @pytest.mark.parametrize("prefix", ["", "/team/llm"])
    def test_a_proxy_may_take_the_prefix_off_or_not(self, prefixed: Served, prefix: str) -> None:
        http = prefixed.as_key(OPERATOR_KEY).http
        assert httpx.get(f"{prefixed.url}{prefix}/healthz").status_code == 200
        assert http.post(f"{prefix}/generate", json=BODY).status_code == 200
        put = http.put(f"{prefix}/v1/prefixes/films", content=native(3), headers={"Content-Type": NATIVE})
        assert put.headers["Location"].startswith("/team/llm/v1/prefixes/films/versions/")
        assert http.get(f"{prefix}/v1/prefixes/films").status_code == 200

    def test_rules_and_errors_go_by_the_path_behind_it(self, prefixed: Served) -> None:
        operator = prefixed.as_key(OPERATOR_KEY)
        key = operator.http.put("/v1/tenants/behind").json()["key"]
        behind = prefixed.as_key(key).http
        for path in ("/v1/tenants", "/team/llm/v1/tenants"):
            assert behind.get(path).status_code == 403
            assert httpx.get(f"{prefixed.url}{path}").status_code == 401
        for path in (
            "/team/llm/team/llm/v1/tenants",
            "/team/llmx/healthz",
            "/team/v1/tenants",
            "/team/llm/v1%2Ftenants",
        ):
            assert behind.get(path).status_code in (400, 404)
        assert "error_type" in operator.http.post("/team/llm/generate", json={}).json()
        assert "error" in operator.http.get("/team/llm/v1/models/none").json()

    def test_the_openapi_page_names_it(self, prefixed: Served) -> None:
        schema = prefixed.as_key(OPERATOR_KEY).http.get("/team/llm/openapi.json").json()
        assert {"url": "/team/llm"} in schema["servers"]
        assert "/generate" in schema["paths"]
        page = httpx.get(f"{prefixed.url}/team/llm/docs").text
        (script,) = re.findall(r'src="(docs/start[^"]*)"', page)  # relative, so that the prefix stays before it
        assert '"openapi.json"' in httpx.get(f"{prefixed.url}/team/llm/{script}").text
