"""The wall clock steps by hours and days while a server runs. What lasts is measured on another clock; what has a date,
as the end of a key, goes by the clock as it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from server.api import faults
from tests.conftest import Served, bearer, make_tenant, native
from tests.waiting import eventually

HOUR, MONTH = 3600.0, 30 * 86400.0
STEPS = (-MONTH, -HOUR, HOUR, MONTH)
LONG = {"inputs": "x", "parameters": {"max_new_tokens": 200, "ignore_eos": True}}
Step = Callable[[float], None]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    """The wall clock, from now on so far from the true one. Every module asks `time.time`."""
    wall, off_s = time.time, 0.0

    def by(seconds: float) -> None:
        nonlocal off_s
        off_s = seconds

    monkeypatch.setattr(time, "time", lambda: wall() + off_s)
    return by


def day_at(by_s: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(time.time() + by_s))


def tenant_of(keyed: Served, kind: str, by_s: float, **limits: object) -> Served:
    return make_tenant(keyed, f"{kind}-{STEPS.index(by_s)}", **limits)


@pytest.mark.parametrize("by_s", STEPS)
def test_a_step_neither_fills_a_bucket_nor_locks_a_tenant_out(keyed: Served, step: Step, by_s: float) -> None:
    slow = tenant_of(keyed, "slow", by_s, requests_per_minute=2)
    quick = tenant_of(keyed, "quick", by_s, requests_per_minute=600)

    def use_up(tenant: Served) -> int:
        for _ in range(700):
            if (response := tenant.generate("x", max_new_tokens=1)).status_code == 429:
                return int(response.headers["Retry-After"])
        raise AssertionError("it was never full")

    assert use_up(slow) <= 30
    step(by_s)
    refused = slow.generate("x", max_new_tokens=1)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) <= 30
    assert float(refused.headers["x-ratelimit-reset-requests"][:-1]) <= 60
    assert quick.generate("x", max_new_tokens=1).status_code == 200
    step(0)
    assert slow.generate("x", max_new_tokens=1).status_code == 429
    assert quick.generate("x", max_new_tokens=1).status_code == 200


@pytest.mark.parametrize("by_s", STEPS)
def test_a_stream_goes_on_over_a_step(keyed: Served, step: Step, by_s: float) -> None:
    with keyed.http.stream("POST", "/generate_stream", json=LONG) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        step(by_s)
        (*_, last) = lines
    assert json.loads(last.removeprefix("data: "))["details"]["generated_tokens"] == 200
    answer = keyed.generate("x", max_new_tokens=1)
    assert 0 <= int(answer.headers["x-total-time"]) < 10_000
    assert [keyed.http.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]


def test_a_key_ends_by_the_clock_as_it_is(keyed: Served, step: Step) -> None:
    make_tenant(keyed, "ending")
    made = keyed.http.post("/v1/tenants/ending/keys", json={"expires_in_s": 2 * HOUR}).json()
    status = {}
    for by_s in (0, HOUR, 3 * HOUR, -MONTH, 0):
        step(by_s)
        status[by_s] = keyed.http.get("/v1/models", headers=bearer(made["key"])).status_code
    assert status == {0: 200, HOUR: 200, 3 * HOUR: 401, -MONTH: 200}
    step(-HOUR)  # one made by a clock that is behind ends early, not late
    early = keyed.http.post("/v1/tenants/ending/keys", json={"expires_in_s": HOUR / 2}).json()
    step(0)
    assert keyed.http.get("/v1/models", headers=bearer(early["key"])).status_code == 401


@pytest.mark.parametrize("by_s", STEPS)
def test_usage_and_the_audit_lose_nothing(keyed: Served, step: Step, by_s: float) -> None:
    tenant = tenant_of(keyed, "counted", by_s)
    for number, at_s in enumerate((0, by_s, 0), 1):
        step(at_s)
        assert tenant.put("t", native(number)).json()["version"] == number
        assert tenant.generate("x", "t", max_new_tokens=3, ignore_eos=True).status_code == 200
    rows = tenant.http.get("/v1/usage", params={"first_day": "0001-01-01", "last_day": "9999-12-31"}).json()["usage"]
    assert sum(row["num_requests"] for row in rows) == 3
    assert sum(row["generated_tokens"] for row in rows) == 9
    assert all(row["resident_byte_s"] >= 0 for row in rows)
    assert len({row["day"] for row in rows}) == len({day_at(0), day_at(by_s)})
    entries = tenant.http.get("/v1/audit").json()["entries"]
    subjects = [entry["subject"] for entry in entries if entry["action"] == "publish"]
    assert subjects == ["t@3", "t@2", "t@1"]


@pytest.mark.parametrize("by_s", STEPS)
def test_faults_within_a_minute_are_counted_over_a_step(keyed: Served, step: Step, by_s: float) -> None:
    tenant = tenant_of(keyed, "faulty", by_s)
    for seed in (1, 2):
        assert tenant.put("t", native(seed)).status_code == 201
    digest = tenant.http.get("/v1/prefixes/t").json()["versions"][1]["digest"]
    (blob,) = keyed.state.settings.data_dir.rglob(f"faulty-{STEPS.index(by_s)}/**/{digest}*")
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    for number in range(faults.MAX_FAULTS):
        assert tenant.generate("x", "t", max_new_tokens=1).status_code == 424
        step(number * by_s)
    eventually(lambda: tenant.http.get("/v1/prefixes/t").json()["active"] == 1)
    assert tenant.generate("x", "t", max_new_tokens=1).status_code == 200
