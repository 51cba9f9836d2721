"""Health, readiness, what is served, metrics, the OpenAPI page."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.app import create_app
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, Served, settings_for


def scrape(served: Served) -> dict[str, float]:
    response = served.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        sample.name + "".join(f"[{k}={v}]" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_health_and_readiness(served: Served) -> None:
    for path in ("/healthz", "/health", "/readyz"):
        assert served.http.get(path).status_code == 200


def assert_problem(response: httpx.Response, word: str) -> None:
    assert response.status_code == response.json()["status"] == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert word in response.json()["detail"]


def test_engine_that_does_not_run_is_neither_healthy_nor_ready(model_path: Path, tmp_path: Path) -> None:
    state = make_state(settings_for(tmp_path), ModelFiles(model_path, NAME))

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(state))  # which does not start the application
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return [await http.get(path) for path in ("/healthz", "/health", "/readyz")]

    try:
        for response, word in zip(asyncio.run(ask()), ("stopped", "stopped", "not ready"), strict=True):
            assert_problem(response, word)
    finally:
        state.store.close()


def test_draining_is_not_ready_and_refuses_work(served: Served) -> None:
    served.state.is_draining = True
    try:
        assert_problem(served.http.get("/readyz"), "stopping")
        assert served.http.get("/healthz").status_code == 200
        assert served.http.get("/metrics").status_code == 200
        refused = served.http.post("/generate", json={"inputs": "x"})
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert served.http.put("/v1/prefixes/late", content=b"x").status_code == 503
    finally:
        served.state.is_draining = False


def test_info_says_what_is_served(served: Served) -> None:
    info = served.http.get("/info").json()
    assert info["model_id"] == NAME
    assert (info["max_total_tokens"], info["max_input_tokens"], info["max_virtual_tokens"]) == (256, 255, 64)
    assert (info["model_aliases"], info["model_dtype"], info["model_device_type"]) == (["mini"], "float32", "cpu")
    assert info["quantize"] is None
    assert len(info["fingerprint"]) == 64
    assert info["version"]


def test_metrics_count_what_happens(served: Served, films: str) -> None:
    before = scrape(served)
    served.generate("abc", films, max_new_tokens=7, ignore_eos=True)
    after = scrape(served)

    def grew(name: str) -> float:
        return after[f"prefixserve_{name}"] - before.get(f"prefixserve_{name}", 0)

    assert grew("prompt_tokens_total") == 3
    assert grew("generation_tokens_total") == 7
    assert grew("request_success_total[finished_reason=length]") == 1
    for name, value in (("prompt", 3), ("generation", 7)):
        assert grew(f"request_{name}_tokens_count") == 1
        assert grew(f"request_{name}_tokens_sum") == value
    assert grew("time_to_first_token_seconds_count") == 1
    assert grew("inter_token_latency_seconds_count") == 6
    assert grew("e2e_request_latency_seconds_count") == 1
    assert grew("request_queue_time_seconds_count") == 1
    assert grew("prefix_hits_total") + grew("prefix_misses_total") == 1
    for name in [
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "num_preemptions_total",
        "prefix_loads_total",
        "prefix_load_failures_total",
        "prefix_evictions_total",
        "prefix_resident",
        "prefix_resident_bytes",
        "prefix_pool_bytes",
    ]:
        assert f"prefixserve_{name}" in after
    assert after["prefixserve_prefix_resident_bytes"] <= after["prefixserve_prefix_pool_bytes"]
    assert after[f"prefixserve_task_resident_bytes[task={films}][tenant=default]"] > 0


def test_finished_reasons_are_vllms(served: Served) -> None:
    whole = served.generate("x", max_new_tokens=20, ignore_eos=True).json()["generated_text"]
    stop = next(letter for letter in whole if letter.isascii() and letter.isprintable())
    before = scrape(served)
    answer = served.generate("x", max_new_tokens=20, ignore_eos=True, stop=[stop], details=True).json()
    assert answer["details"]["finish_reason"] == "stop_sequence"
    name = "prefixserve_request_success_total[finished_reason=stop]"
    assert scrape(served)[name] == before.get(name, 0) + 1


def test_rejections_are_counted_by_reason(served: Served) -> None:
    name = "prefixserve_request_rejected_total[reason=draining]"
    before = scrape(served).get(name, 0)
    served.state.is_draining = True
    try:
        served.http.post("/generate", json={"inputs": "x"})
    finally:
        served.state.is_draining = False
    assert scrape(served)[name] == before + 1


def test_buckets_and_cache_config_are_vllms(served: Served) -> None:
    scraped = scrape(served)
    for name, bounds in {
        "time_to_first_token_seconds": ("0.001", "0.02", "0.75", "640.0", "2560.0"),
        "inter_token_latency_seconds": ("0.01", "0.025", "0.15", "80.0"),
        "e2e_request_latency_seconds": ("0.3", "0.8", "60.0", "1920.0", "7680.0"),
        "request_queue_time_seconds": ("0.3", "0.8", "60.0", "1920.0", "7680.0"),
        "request_prompt_tokens": ("1.0", "2.0", "5.0", "10.0", "1000.0"),
        "request_generation_tokens": ("1.0", "2.0", "5.0", "10.0", "1000.0"),
    }.items():
        for bound in (*bounds, "+Inf"):
            assert f"prefixserve_{name}_bucket[le={bound}]" in scraped
    stats = served.state.engine.stats()
    assert scraped[f"prefixserve_cache_config_info[block_size=16][num_gpu_blocks={stats.kv_blocks_total}]"] == 1


ROUTES = {
    "post": ["/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"],
    "get": ["/v1/models", "/v1/prefixes", "/healthz", "/health", "/readyz", "/info", "/metrics"],
}


@pytest.mark.filterwarnings("error")
def test_openapi_describes_every_route(served: Served) -> None:
    described = served.http.get("/openapi.json").json()
    for method, paths in ROUTES.items():
        for path in paths:
            assert described["paths"][path][method]["summary"]
    identifiers = [route["operationId"] for path in described["paths"].values() for route in path.values()]
    assert len(identifiers) == len(set(identifiers))
    for path in [*ROUTES["post"], "/v1/prefixes/{task}/activate"]:
        schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["examples"]
    upload = described["paths"]["/v1/prefixes/{task}"]["put"]["requestBody"]["content"]
    assert set(upload) == {"application/octet-stream", "multipart/form-data", "application/json"}
    assert all(kind["examples"] for kind in upload.values())


def test_openapi_says_which_routes_want_a_key_and_which_scope(served: Served) -> None:
    described = served.http.get("/openapi.json").json()
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    public = {
        path for path, routes in described["paths"].items() for route in routes.values() if not route.get("security")
    }
    assert public == {"/healthz", "/health", "/readyz"}
    refused = described["paths"]["/v1/prefixes/{task}"]["put"]["responses"]
    assert "`upload`" in refused["403"]["description"]
    assert refused["401"]["content"] == refused["default"]["content"]


def test_openapi_bounds_what_queries_and_headers_may_say(served: Served) -> None:
    described = served.http.get("/openapi.json").json()["paths"]
    for path, routes in described.items():
        for route in routes.values():
            for parameter in route.get("parameters", ()):
                if parameter["in"] in ("query", "header"):
                    kinds = parameter["schema"].get("anyOf", [parameter["schema"]])
                    texts = [kind for kind in kinds if kind["type"] == "string" and "enum" not in kind]
                    assert all("maxLength" in kind or "pattern" in kind for kind in texts), (path, parameter["name"])


def test_openapi_shows_each_familys_errors(served: Served) -> None:
    described = served.http.get("/openapi.json").json()["paths"]
    for method, path, ask in (
        ("post", "/generate", {"params": {"task": "film"}, "json": {"inputs": "x"}}),
        ("post", "/v1/completions", {"json": {"model": "film", "prompt": "x"}}),
        ("get", "/v1/prefixes/{task}", {}),
    ):
        answer = served.http.request(method, path.format(task="film"), **ask)
        content = described[path][method]["responses"]["default"]["content"]
        assert set(described[path][method]["responses"]) <= {"200", "401", "403", "default"}
        example = content[answer.headers["content-type"]]["example"]
        assert example.keys() == answer.json().keys()
        if isinstance(example.get("error"), dict):
            assert example["error"] == answer.json()["error"]
