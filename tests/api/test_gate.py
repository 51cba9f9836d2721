"""What every request passes first, and the error body of each family of routes."""

from __future__ import annotations

import httpx
import pytest

from tests.conftest import NATIVE, Served

JSON = {"Content-Type": "application/json"}
BODY = {"inputs": "x", "parameters": {"max_new_tokens": 1}}


def test_request_id_is_kept_if_it_is_sane(served: Served) -> None:
    for given, is_kept in (("abc-1.2_3", True), ("a" * 300, False), ("no spaces", False)):
        response = served.http.post("/generate", json=BODY, headers={"X-Request-Id": given})
        assert (response.headers["X-Request-Id"] == given) is is_kept
    assert served.http.get("/no/such/route").headers["X-Request-Id"]


def test_two_requests_may_have_one_id(served: Served) -> None:
    with httpx.Client(base_url=served.url, headers={"X-Request-Id": "same"}) as http:
        body = BODY | {"parameters": {"max_new_tokens": 60, "ignore_eos": True}, "stream": True}
        with http.stream("POST", "/generate", json=body) as one:
            assert http.post("/generate", json=BODY).status_code == 200
            assert b"error" not in one.read()


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1", "127.1.2.3:80", "[::1]:8000", "[::1]"])
def test_loopback_hosts_are_served(served: Served, host: str) -> None:
    assert served.http.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "localhost.evil.example:80", ""]
)
def test_other_hosts_are_refused(served: Served, host: str) -> None:
    response = served.http.post("/generate", json=BODY, headers={"Host": host})
    assert response.status_code in (400, 403)
    assert "error" in response.json()


def test_page_of_another_origin_is_refused(served: Served) -> None:
    response = served.http.post("/v1/prefixes/films/pin", headers={"Origin": "https://evil.example"})
    assert response.status_code == 403
    for origin in ("http://[", "null", ""):
        assert served.http.post("/generate", json=BODY, headers={"Origin": origin}).status_code == 403
    assert served.http.post("/generate", json=BODY, headers={"Origin": "http://localhost:3000"}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_json_routes_want_json(served: Served, films: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    for path in ("/generate", "/", "/v1/completions", "/v1/chat/completions", f"/v1/prefixes/{films}/activate"):
        assert served.http.post(path, content=b'{"inputs": "x"}', headers=headers).status_code == 415


def test_content_encoding_is_refused(served: Served) -> None:
    for method, path in (("POST", "/generate"), ("PUT", "/v1/prefixes/zipped")):
        response = served.http.request(method, path, content=b"x", headers=JSON | {"Content-Encoding": "gzip"})
        assert response.status_code == 415


def test_large_bodies_are_refused(served: Served) -> None:
    limit = served.state.settings.max_upload_bytes

    def pieces() -> object:
        for _ in range(40):
            yield b"x" * (limit // 20)

    for content in (b"x" * (limit + 1), b"x" * (8 * limit), pieces()):
        response = served.http.put("/v1/prefixes/large", content=content, headers={"Content-Type": NATIVE})  # type: ignore[arg-type]
        assert response.status_code == 413, response.text
        assert response.headers["content-type"] == "application/problem+json"
    multipart = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * (limit + 1)}
    assert served.http.put("/v1/prefixes/large", files=multipart).status_code == 413

    def long_json() -> object:
        yield b'{"inputs": "'
        for _ in range(9):
            yield b"x" * 2**20
        yield b'"}'

    assert served.http.post("/generate", content=long_json(), headers=JSON).status_code == 413  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["key", "api_key", "token", "API_KEY", "access_token"])
def test_key_in_the_query_is_refused(served: Served, name: str) -> None:
    response = served.http.post("/generate", params={name: "secret"}, json=BODY)
    assert response.status_code == 400
    assert "secret" not in response.text


def test_authorization_header_is_ignored(served: Served) -> None:
    assert served.http.post("/generate", json=BODY, headers={"Authorization": "Bearer x"}).status_code == 200


def test_misspelt_query_is_refused(served: Served) -> None:
    for path, method in (("/generate", "POST"), ("/generate_stream", "POST"), ("/", "POST")):
        response = served.http.request(method, path, params={"tsk": "films"}, json=BODY)
        assert response.status_code == 422
        assert "tsk" in response.json()["error"]
    response = served.http.put(
        "/v1/prefixes/q", params={"acivate": "false"}, content=b"", headers={"Content-Type": NATIVE}
    )
    assert response.status_code == 422
    assert "acivate" in response.json()["detail"]


def test_task_that_comes_twice_is_refused(served: Served, films: str) -> None:
    response = served.http.post("/generate", params=[("task", films), ("task", "other")], json=BODY)
    assert response.status_code == 422
    assert "task" in response.json()["error"]


def test_unknown_routes_answer_in_their_family(served: Served) -> None:
    assert served.http.get("/generate").json()["error_type"] == "validation"
    assert served.http.get("/generate").status_code == 405
    assert "error" in served.http.get("/v1/completions").json()
    unknown = served.http.get("/v1/unknown")
    assert (unknown.status_code, unknown.headers["content-type"]) == (404, "application/problem+json")


def test_fault_of_ours_is_a_500_in_the_familys_body(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(type(served.state), "resolve_task", fail)
    answers = [
        served.http.post("/generate", json=BODY, headers={"X-Request-Id": "r1"}),
        served.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers={"X-Request-Id": "r1"}),
    ]
    for response in answers:
        assert response.status_code == 500
        assert response.headers["X-Request-Id"] == "r1"
        assert "error" in response.json()
        assert "secret" not in response.text
