"""What strangers may send is bounded everywhere: a clear 4xx in the route's own form, never a 500, and soon."""

from __future__ import annotations

import json

import httpx
import pytest
from pydantic import ValidationError

from prefix_store.local_files import CONFIG, WEIGHTS
from server.api.schemas import (
    MAX_PROMPTS,
    ActivateRequest,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    ShareRequest,
    WireModel,
)
from tests.conftest import NATIVE, Served, native

JSON = {"Content-Type": "application/json"}
# Bodies in which @ stands for what a test puts there.
GENERATE = '{"inputs": "x", "parameters": {@}}'
COMPLETION = '{"model": "tiny", "prompt": "x", @}'
CHAT = '{"model": "tiny", "messages": [{"role": "user", "content": "x"}], @}'
ACTIVATE, SHARE = "/v1/prefixes/films/activate", "/v1/prefixes/films/share"
GENERATING = {
    "/generate": GENERATE,
    "/generate_stream": GENERATE,
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
}
TEXTS = {
    "/generate": (
        '{"inputs": [@]}',
        '{"inputs": "x", @: 1}',
        '{"inputs": "x", "parameters": {"stop": [@]}}',
        '{"inputs": "x", "parameters": {"adapter_id": @}}',
        '{"inputs": "x", "parameters": {"best_of": @}}',
        '{"inputs": "x", "parameters": {"seed": @}}',
        '{"inputs": "x", "parameters": {@: 1}}',
    ),
    "/v1/completions": (
        '{"model": @, "prompt": "x"}',
        '{"model": "tiny", "prompt": "x", "user": @}',
        '{"model": "tiny", "prompt": "x", "suffix": @}',
        '{"model": "tiny", "prompt": "x", "stop": @}',
        '{"model": "tiny", "prompt": "x", @: 1}',
    ),
    "/v1/chat/completions": (
        '{"model": "tiny", "messages": [{"role": @, "content": "x"}]}',
        '{"model": "tiny", "messages": [{"role": "user", "content": "x", @: 1}]}',
        '{"model": "tiny", "messages": [{"role": "user", "content": "x", "name": @}]}',
        '{"model": "tiny", "messages": [{"role": "user", "content": [{"type": @, "text": ""}]}]}',
    ),
    ACTIVATE: ('{"version": @}', '{"weights": {@: 1}}'),
    SHARE: ('{"tenants": [@]}',),
    "/v1/tenants/a/keys": ('{"tasks": [@]}', '{"scopes": [@]}', '{"replaces": @}'),
}
PROMPTS = {
    "/generate": '{"inputs": @}',
    "/v1/completions": '{"model": "tiny", "prompt": @}',
    "/v1/chat/completions": '{"model": "tiny", "messages": [{"role": "user", "content": @}]}',
}
HUGE, ENDLESS = "1" + "0" * 400, "1" + "0" * 5000
NUMBERS = ("max_new_tokens", "max_tokens", "max_completion_tokens", "temperature", "top_k", "top_p", "seed", "n")
NUMBERS += ("repetition_penalty", "logprobs", "top_logprobs", "best_of", "top_n_tokens", "truncate", "typical_p")
MAX_ANSWER = 13_000  # bytes: a thousand characters of a message, six bytes each, twice
ONE_TOKEN = b'{"inputs": "x", "parameters": {"max_new_tokens": 1}}'
MANY = 2**22
MODELS: dict[str, type[WireModel]] = {
    "/generate": GenerateRequest,
    "/generate_stream": GenerateRequest,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    ACTIVATE: ActivateRequest,
    SHARE: ShareRequest,
}


def post(served: Served, path: str, body: str | bytes) -> httpx.Response:
    return served.http.post(path, content=body, headers=JSON)


def assert_refused(response: httpx.Response) -> None:
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:500])
    assert len(response.content) <= MAX_ANSWER, response.text[:500]
    assert response.headers["content-type"] in ("application/json", "application/problem+json")


@pytest.mark.parametrize("path", GENERATING)
def test_giant_numbers_are_refused(served: Served, path: str) -> None:
    for name in NUMBERS:
        for value in (HUGE, f"-{HUGE}", ENDLESS, "1e400", "-1e400", "NaN", "Infinity", f'"{HUGE}"', f"{HUGE}.5"):
            assert_refused(post(served, path, GENERATING[path].replace("@", f'"{name}": {value}')))


@pytest.mark.parametrize("path", [*GENERATING, ACTIVATE, SHARE, "/v1/tenants/a/keys"])
def test_nests_and_what_is_no_object_are_refused(served: Served, films: str, path: str) -> None:
    for depth in (200, 900, 990, 5000, 500_000):
        for opened, closed in (("[", "]"), ('{"a":', "}")):
            nest = opened * depth + "1" + closed * depth
            for body in (nest, opened * depth, f'{{"inputs": {nest}}}', f'{{"weights": {nest}}}'):
                assert_refused(post(served, path, body))
            for name in ("best_of", "grammar", "tools", "stop", "nothing"):
                if path in GENERATING:
                    assert_refused(post(served, path, GENERATING[path].replace("@", f'"{name}": {nest}')))
    for body in ("null", "1", '"x"', "[]", "nonsense", "{'a': 1}", "\ufeff{}", b"\xff\xfe{", b"\0", b"\xed\xa0\x80"):
        assert_refused(post(served, path, body))


@pytest.mark.parametrize("text", [r"\ud800", r"\udfff\ud800", r"a\udc00b"])
def test_lone_surrogates_are_refused(served: Served, films: str, text: str) -> None:
    for bodies in (TEXTS, {path: (body,) for path, body in PROMPTS.items()}):
        for path, all_of_path in bodies.items():
            for body in all_of_path:
                assert_refused(post(served, path, body.replace("@", f'"{text}"')))
    part = '[{"type": "text", "text": "@"}]'.replace("@", text)
    assert_refused(post(served, "/v1/chat/completions", PROMPTS["/v1/chat/completions"].replace("@", part)))
    ensemble = '{"kind": "ensemble", "rule": "mean_probs", "members": ["@", "films"]}'.replace("@", text)
    assert_refused(served.http.put("/v1/prefixes/e", content=ensemble, headers=JSON))


@pytest.mark.parametrize("text", ["a" * 2**20, "\0" * 5000, "é" * 2**19], ids=["letters", "NUL", "two bytes each"])
def test_long_texts_are_refused_and_not_sent_back(served: Served, films: str, text: str) -> None:
    for path, all_of_path in TEXTS.items():
        for body in all_of_path:
            assert_refused(post(served, path, body.replace("@", json.dumps(text))))


def test_nul_in_a_text_is_a_character(served: Served) -> None:
    assert served.generate("a\0b", max_new_tokens=1).status_code == 200
    for path in (r"/v1/prefixes/a%00b", r"/v1/prefixes/a%00b/versions/1", r"/v1/models/a%00b"):
        assert_refused(served.http.get(path))
    assert_refused(served.put("a%00b", native(1)))


def test_four_mib_of_small_things_cost_few_errors(served: Served) -> None:
    """Making one for each of 300,000 unknown fields takes seconds, in which nobody else is answered."""
    fields = "".join(f'"{i}":1,' for i in range(MANY // 12)) + '"a":1'
    texts, numbers, objects = (f"[{item * (MANY // len(item) - 99)}1]" for item in ('"a",', "1,", "{},"))
    bodies = [(path, body.replace("@", fields)) for path, body in GENERATING.items()]
    bodies += [(path, f"{{{fields}}}") for path in MODELS] + [(ACTIVATE, f'{{"weights": {{{fields}}}}}')]
    for items in (texts, numbers, objects):
        bodies += [(path, body.replace("@", items)) for path, body in PROMPTS.items()]
        bodies += [(path, body.replace("@", f'"stop": {items}')) for path, body in GENERATING.items()]
        bodies += [(SHARE, f'{{"tenants": {items}}}')]
    bodies += [("/v1/chat/completions", f'{{"model": "tiny", "messages": {objects}}}')]
    for path, body in bodies:
        assert len(body) <= MANY
        with pytest.raises(ValidationError) as refused:
            MODELS[path].model_validate(json.loads(body))
        assert refused.value.error_count() <= 2 * MAX_PROMPTS, (path, body[:80])
    assert_refused(post(served, "/generate", GENERATE.replace("@", fields)))


def test_a_long_ensemble_is_refused_as_any_json(served: Served) -> None:
    """And not by the bound of files, which may be far larger."""
    members = '"films",' * (MANY // 8)
    ensemble = f'{{"kind": "ensemble", "rule": "mean_probs", "members": [{members}"films"]}}'
    response = served.http.put("/v1/prefixes/e", content=ensemble, headers=JSON)
    assert response.status_code == 413
    assert str(MANY) in response.json()["detail"]


@pytest.mark.parametrize("value", ["1e400", HUGE, f"-{HUGE}", ENDLESS, "%00", "%ff", "a" * 9999, "%F0%9F%98%80" * 200])
def test_queries_and_paths_are_bounded(served: Served, films: str, value: str) -> None:
    tasks, audit, usage = "/v1/prefixes", "/v1/audit", "/v1/usage"
    for path in (f"{tasks}?limit=", f"{audit}?before=", f"{audit}?limit=", f"{usage}?first_day=", f"{usage}?format="):
        assert_refused(served.http.get(path + value))
    for path in (f"{tasks}/@", f"{tasks}/films/versions/@", f"{tasks}/films/versions/@/file", "/v1/tenants/@"):
        assert_refused(served.http.get(path.replace("@", value)))
    for path in ("/generate?task=", "/generate_stream?task=", "/generate?x="):
        assert_refused(post(served, path + value, '{"inputs": "x"}'))
    for name in ("index", "activate", "accept_base"):
        headers = {"Content-Type": NATIVE}
        assert_refused(served.http.put(f"{tasks}/q?{name}={value}", content=native(1), headers=headers))
    for path in (f"{tasks}?after=", f"{audit}?tenant=", f"{usage}?tenant="):
        assert served.http.get(path + value).status_code < 500
    noted = served.http.put(f"{tasks}/noted?note={value}", content=native(1), headers={"Content-Type": NATIVE})
    assert noted.status_code < 500


@pytest.mark.parametrize("value", [b"\xff\xfe", b"a" * 9999, b"1" * 5000, b"1e400", b'"\xff"', b"*,*", b'"a",' * 2000])
def test_headers_are_bounded(served: Served, films: str, value: bytes) -> None:
    names = ["X-Request-Id", "X-Session-Id", "If-Match", "If-None-Match", "Content-Type", "Origin", "Host"]
    for name in [*names, "Authorization", "Content-Encoding", "Accept"]:
        headers = {b"Content-Type": b"application/json"} | {name.encode(): value}
        answers = [
            served.http.post("/generate?task=films", content=ONE_TOKEN, headers=headers),
            served.http.post(ACTIVATE, content=b'{"version": 2}', headers=headers),
            served.http.put("/v1/prefixes/films", content=native(2), headers=headers),
        ]
        for response in answers:
            assert response.status_code < 500, (name, response.text)
            assert len(response.content) <= MAX_ANSWER


@pytest.mark.parametrize("charset", ["unicode_escape", "undefined", "nonsense", "utf-16"])
def test_a_charset_that_the_caller_names_is_no_fault_of_the_servers(served: Served, charset: str) -> None:
    part = 'Content-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
    body = "".join(f"--b\r\n{part.format(name, chr(92) + 'ud800')}" for name in (CONFIG, WEIGHTS)) + "--b--\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    refused = served.http.put("/v1/prefixes/odd", content=body.encode(), headers=headers)
    assert refused.status_code == 422, refused.text


def test_what_is_not_served_is_refused_however_deep_it_is(served: Served) -> None:
    for depth in range(20, 1000, 7):
        nest = "[" * depth + "]" * depth
        assert_refused(post(served, "/generate", f'{{"inputs": "x", "parameters": {{"grammar": {nest}}}}}'))
