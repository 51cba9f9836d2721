"""Requests of two callers at once, over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import httpx

from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, make_tenant, serve_in_thread, settings_for

NUM_ROUNDS = 12


def at_once(*asks: Callable[[], httpx.Response]) -> list[int]:
    """The statuses of requests that were let go together."""
    start, statuses = threading.Barrier(len(asks)), [0] * len(asks)

    def ask(i: int, one: Callable[[], httpx.Response]) -> None:
        start.wait()
        statuses[i] = one().status_code

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(asks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def test_the_last_two_keys_do_not_end_together(model_path: Path, tmp_path: Path) -> None:
    """Without any key a server on loopback is open."""
    for served in serve_in_thread(make_state(settings_for(tmp_path), ModelFiles(model_path, NAME))):
        one = make_tenant(served, "alone")
        (held,) = one.http.get("/v1/tenants/alone").json()["keys"]
        for _ in range(NUM_ROUNDS):
            made = one.http.post("/v1/tenants/alone/keys", json={}).json()
            other = served.as_key(made["key"])
            statuses = at_once(
                lambda: one.http.delete(f"/v1/tenants/alone/keys/{held['id']}"),  # noqa: B023
                lambda: other.http.delete(f"/v1/tenants/alone/keys/{made['id']}"),  # noqa: B023
            )
            assert served.http.get("/v1/tenants").status_code == 401, statuses
            assert sorted(statuses) == [204, 409]
            if statuses[0] == 204:
                one, held = other, made
