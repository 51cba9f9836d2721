"""Health, readiness, what is served, metrics, the OpenAPI page."""

from __future__ import annotations

import pytest
from conftest import NAME, Served
from prometheus_client.parser import text_string_to_metric_families


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


def test_draining_is_not_ready_and_refuses_work(served: Served) -> None:
    served.state.is_draining = True
    try:
        assert served.http.get("/readyz").status_code == 503
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
    assert info["max_total_tokens"] == 256
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
    assert after[f"prefixserve_task_resident_bytes[task={films}]"] > 0


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
    for path in ROUTES["post"]:
        schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["examples"]
    assert "multipart/form-data" in described["paths"]["/v1/prefixes/{task}"]["put"]["requestBody"]["content"]
