"""Two replicas on one Redis: what one changes the other serves; without Redis both go on with what they know."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from prefix_store.mirror import Mirror
from server.engine import recent_failures
from server.start import open_registry, publish_examples
from tests.byte_model import save_prompt
from tests.conftest import OPERATOR_KEY, Served, make_tenant, native, serving, settings_for, write_key
from tests.prefix_store.redis_process import RedisProcess
from tests.waiting import eventually

PROMPT = "A fine film."


@contextmanager
def replica(folder: Path, redis_url: str, model_path: Path, name: str) -> Iterator[Served]:
    """Its copy of the registry is its own, the files are shared."""
    key_file = write_key(folder / "operator.key", OPERATOR_KEY)
    settings = settings_for(
        folder / name,
        operator_key_file=key_file,
        redis_url=redis_url,
        blob_url=str(folder / "blobs"),
        max_requests_per_key=128,
    )
    with serving(settings, model_path) as served:
        yield served.as_key(OPERATOR_KEY)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path / "redis")
    process.start()
    yield process
    if process.is_running:
        process.kill()


@pytest.fixture
def replicas(redis: RedisProcess, model_path: Path, tmp_path: Path) -> Iterator[tuple[Served, Served]]:
    with ExitStack() as stack:
        one, other = (stack.enter_context(replica(tmp_path, redis.url, model_path, name)) for name in ("one", "other"))
        yield one, other


def version(served: Served, task: str) -> str | int:
    answer = served.generate(PROMPT, task, max_new_tokens=1)
    return answer.headers["X-Prefix-Version"] if answer.status_code == 200 else answer.status_code


def test_a_flip_a_key_and_a_deletion_reach_the_other(replicas: tuple[Served, Served]) -> None:
    one, other = replicas
    tenant = make_tenant(one, "north")
    elsewhere = other.as_key(tenant.http.headers["Authorization"].split()[1])
    eventually(lambda: elsewhere.http.get("/v1/prefixes").status_code == 200)
    for seed in (1, 2):
        assert tenant.put("t", native(seed)).status_code == 201
        eventually(lambda seed=seed: version(elsewhere, "t") == str(seed))
    assert tenant.http.post("/v1/prefixes/t/activate", json={"version": "previous"}).status_code == 200
    eventually(lambda: version(elsewhere, "t") == "1")
    assert elsewhere.http.delete("/v1/prefixes/t").status_code == 204
    eventually(lambda: version(tenant, "t") == 404)
    assert one.http.post("/v1/tenants/north/suspend").status_code == 200
    eventually(lambda: elsewhere.http.get("/v1/prefixes").status_code == 403)


def test_pins_are_held_by_both(replicas: tuple[Served, Served]) -> None:
    one, other = replicas
    assert one.put("t", native(1)).status_code == 201
    assert one.http.put("/v1/tenants/default", json={"limits": {"max_pinned_bytes": None}}).is_success
    assert one.http.post("/v1/prefixes/t/pin").status_code == 200
    eventually(lambda: other.http.get("/v1/prefixes/t").json().get("residency") == "resident")


def test_a_file_that_is_put_right_is_tried_again_by_both(
    replicas: tuple[Served, Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_failures, "REMEMBERED_S", 3600.0)
    one, other = replicas
    assert one.put("t", native(1)).status_code == 201
    next((tmp_path / "blobs").rglob("*.safetensors")).write_bytes(b"")
    eventually(lambda: version(other, "t") == 424)
    assert one.put("t", native(1)).status_code == 200
    eventually(lambda: version(other, "t") == "1")
    assert version(one, "t") == "1"


def test_without_redis_known_tasks_answer_and_uploads_wait(
    redis: RedisProcess, model_path: Path, tmp_path: Path
) -> None:
    with replica(tmp_path, redis.url, model_path, "one") as one:
        with replica(tmp_path, redis.url, model_path, "other") as other:
            assert one.put("t", native(1)).status_code == 201
            eventually(lambda: version(other, "t") == "1")
            tenant = make_tenant(one, "limited", requests_per_minute=1000)
            redis.kill()
            for served in (one, other):
                assert [version(served, "t") for _ in range(3)] == ["1"] * 3
        eventually(lambda: one.http.get("/readyz").json()["registry"] == "degraded")
        refused = one.put("t", native(2))
        assert (refused.status_code, "127.0.0.1" in refused.text) == (503, False)
        assert int(refused.headers["Retry-After"]) >= 1
        assert tenant.generate(PROMPT, max_new_tokens=1).status_code == 200
        with replica(tmp_path, redis.url, model_path, "other") as other:  # it starts from what is on its disk
            assert version(other, "t") == "1"
            assert other.http.get("/readyz").json() == {"status": "ready", "registry": "degraded"}
            redis.start()
            eventually(lambda: one.http.get("/readyz").json()["registry"] == "ok")
            assert one.put("t", native(2)).status_code == 201
            eventually(lambda: version(other, "t") == "2")


def test_a_request_beyond_a_replicas_part_of_the_limit_is_to_wait(
    redis: RedisProcess, replicas: tuple[Served, Served]
) -> None:
    one, _ = replicas
    tenant = make_tenant(one, "limited", tokens_per_minute=100)
    mirror = one.state.registry
    assert isinstance(mirror, Mirror)
    mirror._next_beat_s = 0.0
    eventually(lambda: mirror._num_replicas == 2)
    redis.kill()
    eventually(lambda: mirror.is_degraded)
    refused = tenant.generate("a", max_new_tokens=80)
    assert (refused.status_code, refused.headers.get("Retry-After")) == (429, "60")
    assert tenant.generate("a", max_new_tokens=20).status_code == 200


def test_known_tasks_answer_while_changes_wait_for_a_hanging_redis(
    redis: RedisProcess, model_path: Path, tmp_path: Path
) -> None:
    patient = f"{redis.url}?socket_timeout=25"  # nobody gives up before the known task has answered
    with replica(tmp_path, patient, model_path, "one") as one, ThreadPoolExecutor(64) as others:
        assert one.put("t", native(1)).status_code == 201
        redis.stop()
        waiting = [others.submit(one.http.post, "/v1/prefixes/t/activate", json={"version": "1"}) for _ in range(64)]
        eventually(lambda: one.state.num_active == len(waiting))
        assert version(one, "t") == "1"
        assert not any(change.done() for change in waiting)
        redis.go_on()
        assert {change.result().status_code for change in waiting} == {200}


def test_examples_that_redis_does_not_have_yet_do_not_end_a_start_without_it(
    redis: RedisProcess, model_path: Path, tmp_path: Path
) -> None:
    save_prompt(tmp_path / "examples" / "t")
    with replica(tmp_path, redis.url, model_path, "one") as one:
        publish_examples(one.state.store, tmp_path / "examples")
    redis.kill()
    for task in ("u", "v"):
        save_prompt(tmp_path / "examples" / task)
    with replica(tmp_path, redis.url, model_path, "one") as one:
        with capture_logs() as logs:
            publish_examples(one.state.store, tmp_path / "examples")
        refused = [(line["task"], line["reason"]) for line in logs if line["event"] == "example_not_published"]
        assert [task for task, _ in refused] == ["u", "v"]
        assert all("the registry is not followed" in reason for _, reason in refused)
        assert [version(one, task) for task in ("t", "u", "v")] == ["1", 404, 404]
        redis.start()
        eventually(lambda: one.http.get("/readyz").json()["registry"] == "ok")
        publish_examples(one.state.store, tmp_path / "examples")
        assert [version(one, task) for task in ("t", "u", "v")] == ["1", "1", "1"]


def logged_at_start(redis: RedisProcess, data_dir: Path) -> list[tuple[object, object]]:
    with capture_logs() as logs:
        open_registry(settings_for(data_dir, redis_url=redis.url)).close()
    return [(line["expected"], line["got"]) for line in logs if line["event"] == "redis_may_lose_what_it_acknowledged"]


def test_redis_that_may_lose_changes_is_told_of_at_start(redis: RedisProcess, tmp_path: Path) -> None:
    assert logged_at_start(redis, tmp_path) == []
    with redis.client() as client:
        client.config_set("appendfsync", "everysec")
        client.config_set("maxmemory-policy", "allkeys-lru")
        wanted = {"appendfsync": "always", "maxmemory-policy": "noeviction"}
        found = {"appendfsync": "everysec", "maxmemory-policy": "allkeys-lru"}
        assert logged_at_start(redis, tmp_path) == [(wanted, found)]
        client.config_set("appendonly", "no")
        ((wanted, found),) = logged_at_start(redis, tmp_path)
        assert (wanted["appendonly"], found["appendonly"]) == ("yes", "no")
        client.acl_setuser("default", enabled=True, nopass=True, categories=["+@all"], commands=["-config"], keys=["*"])
        assert logged_at_start(redis, tmp_path) == []  # a managed one that does not say
        redis.stop()
        try:
            assert logged_at_start(redis, tmp_path) == []
        finally:
            redis.go_on()
