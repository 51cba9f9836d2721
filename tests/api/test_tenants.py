"""Tenants that do not trust each other: keys, scopes, what is theirs alone, what they share."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.tenants import SCOPES, Tenant, new_key
from server.api import gate
from server.api.app import create_app
from server.api.auth import PUBLIC, KeyRing, needed_scope
from server.api.errors import RequestError
from server.api.pages import PAGES
from server.engine.tenant_policy import TenantPolicy
from server.errors import StartError
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import (
    NAME,
    OPERATOR_KEY,
    Served,
    bearer,
    make_tenant,
    native,
    serve_in_thread,
    settings_for,
    write_key,
)
from tests.waiting import eventually

PROMPT = "A fine film."


def policy_of(served: Served, tenant: str) -> TenantPolicy:
    return served.state.engine._engine.policies.of(tenant)


def tokens(served: Served, task: str | None) -> list[int]:
    response = served.generate(PROMPT, task, max_new_tokens=8, details=True, ignore_eos=True)
    assert response.status_code == 200, response.text
    return [token["id"] for token in response.json()["details"]["tokens"]]


def routes(served: Served) -> list[tuple[str, str]]:
    """Every method and path of the application, parameters filled in."""
    found = []
    for path, methods in create_app(served.state).openapi()["paths"].items():
        found += [(method.upper(), re.sub(r"{[^}]*}", "x", path)) for method in methods]
    assert len(found) > 30
    return found


def versions(served: Served, task: str) -> list[int]:
    found = served.http.get(f"/v1/prefixes/{task}")
    return [one["version"] for one in found.json()["versions"]] if found.is_success else []


class TestKeys:
    def test_every_route_but_health_wants_a_key(self, keyed: Served) -> None:
        with httpx.Client(base_url=keyed.url) as http:
            for method, path in [
                *routes(keyed),
                *(("GET", page) for page in PAGES),
                ("GET", "/redoc"),
                ("GET", "/nothing"),
            ]:
                for headers in ({}, bearer("ps_wrong"), {"Authorization": f"Basic {OPERATOR_KEY}"}):
                    response = http.request(method, path, headers=headers)
                    expected = 200 if path in PUBLIC else 401
                    assert response.status_code == expected, (method, path, response.text)
                    assert path in PUBLIC or response.headers["WWW-Authenticate"] == "Bearer"

    def test_each_scope_opens_its_routes_and_no_others(self, keyed: Served) -> None:
        make_tenant(keyed, "scoped")
        for scope in ("generate", "upload", "publish", "admin", "metrics"):
            made = keyed.http.post("/v1/tenants/scoped/keys", json={"scopes": [scope]})
            one = keyed.as_key(made.json()["key"])
            for method, path in routes(keyed):
                needed = needed_scope(method, path)
                response = one.http.request(method, path)
                is_open = needed in (None, scope) or (needed == "any" and scope != "metrics")
                assert (response.status_code != 403) is is_open, (scope, method, path, response.text)

    def test_a_path_that_only_the_router_matches_is_refused(self, keyed: Served) -> None:
        """Its patterns end in "$", which matches before a newline as well."""
        make_tenant(keyed, "narrow")
        made = keyed.http.post("/v1/tenants/narrow/keys", json={"scopes": ["generate"]})
        one = keyed.as_key(made.json()["key"])
        for method, path in routes(keyed):
            for end in ("%0A", "%0D%0A", "%00", "%E2%80%A8"):
                assert one.http.request(method, path + end).status_code == 400, (method, path)
        assert keyed.http.get("/v1/tenants/narrow").json()["suspended"] is False

    def test_a_routes_scope_holds_whatever_the_path_looked_like(
        self, keyed: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_tenant(keyed, "misled")
        made = keyed.http.post("/v1/tenants/misled/keys", json={"scopes": ["generate"]})
        one = keyed.as_key(made.json()["key"])
        monkeypatch.setattr(gate, "needed_scope", lambda method, path: None if path in PUBLIC else "any")
        for method, path in routes(keyed):
            needed = needed_scope(method, path, otherwise="forgotten")
            assert needed != "forgotten", (method, path)
            is_open = needed in (None, "any", "generate")
            assert (one.http.request(method, path).status_code != 403) is is_open, (method, path)

    def test_a_key_is_shown_once_and_kept_nowhere(self, keyed: Served, tmp_path: Path) -> None:
        made = keyed.http.put("/v1/tenants/secretive")
        key = made.json()["key"]
        assert made.headers["Cache-Control"] == "no-store"
        assert len(key) >= 43
        again = keyed.http.put("/v1/tenants/secretive")
        assert (again.status_code, "key" in again.json()) == (200, False)
        shown = keyed.http.get("/v1/tenants/secretive").text + keyed.http.get("/v1/audit").text
        assert key not in shown
        files = [path for path in keyed.state.settings.data_dir.rglob("*") if path.is_file()]
        assert files
        assert not [path for path in files if key.encode() in path.read_bytes()]

    def test_expiry_revocation_and_rotation_with_overlap(self, keyed: Served) -> None:
        make_tenant(keyed, "turning")
        short = keyed.http.post("/v1/tenants/turning/keys", json={"expires_in_s": 2}).json()
        assert keyed.as_key(short["key"]).http.get("/v1/prefixes").status_code == 200
        eventually(lambda: keyed.as_key(short["key"]).http.get("/v1/prefixes").status_code == 401)
        body = {"scopes": ["generate"], "tasks": ["films-*"]}
        first = keyed.http.post("/v1/tenants/turning/keys", json=body).json()
        second = keyed.http.post("/v1/tenants/turning/keys", json={"replaces": first["id"], "overlap_s": 2}).json()
        assert (second["scopes"], second["tasks"]) == (["generate"], ["films-*"])
        old, new = (keyed.as_key(each["key"]) for each in (first, second))
        assert [each.http.get("/v1/models").status_code for each in (old, new)] == [200, 200]
        eventually(lambda: [each.http.get("/v1/models").status_code for each in (old, new)] == [401, 200])
        assert keyed.http.delete(f"/v1/tenants/turning/keys/{second['id']}").status_code == 204
        assert new.http.get("/v1/models").status_code == 401
        assert keyed.http.delete(f"/v1/tenants/turning/keys/{second['id']}").status_code == 404

    def test_a_key_for_some_tasks_reaches_no_other(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "patterned")
        for task in ("films-a", "books-a"):
            assert tenant.put(task, native(11)).status_code == 201
        made = tenant.http.post("/v1/tenants/patterned/keys", json={"tasks": ["films-*"]})
        films = keyed.as_key(made.json()["key"])
        assert films.generate(PROMPT, "films-a", max_new_tokens=1).status_code == 200
        for task in ("books-a", "nothing", None):
            assert films.generate(PROMPT, task, max_new_tokens=1).status_code == 403
        assert films.put("books-a", native(12)).status_code == 403
        assert [each["task"] for each in films.http.get("/v1/prefixes").json()["prefixes"]] == ["films-a"]
        assert [each["id"] for each in films.http.get("/v1/models").json()["data"]] == ["films-a"]
        wider = films.http.post("/v1/tenants/patterned/keys", json={"tasks": ["*"]})
        assert wider.status_code == 403
        for member in ("books-a@1", "nothing@1", "books-a"):
            ensemble = {"kind": "ensemble", "members": ["films-a@1", member], "rule": "vote"}
            refused = films.http.put("/v1/prefixes/films-both", json=ensemble)
            assert refused.status_code == 403, refused.text

    def test_a_pattern_is_for_the_task_not_for_its_owners_name(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "films-house")
        for task in ("films-a", "secret"):
            assert tenant.put(task, native(11)).status_code == 201
        made = tenant.http.post("/v1/tenants/films-house/keys", json={"tasks": ["films-*"]})
        films = keyed.as_key(made.json()["key"])
        for task, status in (("films-a", 200), ("secret", 403)):
            for name in (task, f"films-house/{task}", f"films-house/{task}@1"):
                assert films.generate(PROMPT, name, max_new_tokens=1).status_code == status, name
                chat = {"model": name, "prompt": PROMPT, "max_tokens": 1}
                assert films.http.post("/v1/completions", json=chat).status_code == status, name

    @pytest.mark.parametrize("end", ["delete", "suspend", "delete-tenant"])
    def test_a_key_that_ended_while_the_body_came_is_refused(self, keyed: Served, end: str) -> None:
        tenant = make_tenant(keyed, f"late-{end}")
        made = keyed.http.get(f"/v1/tenants/late-{end}").json()

        def pieces(body: bytes) -> Iterator[bytes]:
            yield body[:5]
            time.sleep(0.1)
            path = f"/v1/tenants/late-{end}"
            if end == "delete":
                keyed.http.delete(f"{path}/keys/{made['keys'][0]['id']}")
            elif end == "suspend":
                keyed.http.post(f"{path}/suspend")
            else:
                keyed.http.delete(path)
            yield body[5:]

        asked = [
            ("PUT", "/v1/prefixes/late", native(1), "application/octet-stream"),
            ("POST", f"/v1/tenants/late-{end}/keys", b'{"scopes": ["admin"]}', "application/json"),
        ]
        for method, path, body, kind in asked:
            refused = tenant.http.request(method, path, content=pieces(body), headers={"Content-Type": kind})
            assert refused.status_code == (403 if end == "suspend" else 401), refused.text
            keyed.http.post(f"/v1/tenants/late-{end}/resume")
        left = keyed.http.get(f"/v1/tenants/late-{end}")
        assert (left.status_code, len(left.json().get("keys", []))) in ((200, end != "delete"), (404, 0))
        assert keyed.state.store.list_tasks(f"late-{end}") == []

    @pytest.mark.parametrize("end", ["delete", "suspend", "delete-tenant"])
    def test_a_key_that_ended_while_its_upload_was_tried_stores_nothing(
        self, keyed: Served, end: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tenant, path = make_tenant(keyed, f"tried-{end}"), f"/v1/tenants/tried-{end}"
        key_id = keyed.http.get(path).json()["keys"][0]["id"]
        urls = {"delete": f"{path}/keys/{key_id}", "suspend": f"{path}/suspend", "delete-tenant": path}

        async def check(prefix: object, tenant_id: str) -> None:
            await asyncio.to_thread(keyed.http.request, "POST" if end == "suspend" else "DELETE", urls[end])

        monkeypatch.setattr(keyed.state.engine, "check", check)
        assert tenant.put("t", native(1)).status_code == (403 if end == "suspend" else 401)
        assert keyed.state.store.list_tasks(f"tried-{end}") == []

    def test_the_last_key_is_not_a_tenants_to_end(self, model_path: Path, tmp_path: Path) -> None:
        """A server on loopback is open without any."""
        for served in serve_in_thread(make_state(settings_for(tmp_path), ModelFiles(model_path, NAME))):
            tenant = make_tenant(served, "alone")
            (first,) = tenant.http.get("/v1/tenants/alone").json()["keys"]
            refused = tenant.http.delete(f"/v1/tenants/alone/keys/{first['id']}")
            assert (refused.status_code, served.http.get("/v1/tenants").status_code) == (409, 401)
            second = tenant.http.post("/v1/tenants/alone/keys", json={}).json()
            assert tenant.http.delete(f"/v1/tenants/alone/keys/{second['id']}").status_code == 204

    def test_keys_read_by_two_at_once_are_the_newer_ones(self, keyed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        keys, registry = keyed.state.keys, keyed.state.registry
        list_tenants = registry.list_tenants
        others: list[threading.Thread] = []

        def list_slowly() -> list[Tenant]:
            found = list_tenants()
            if not others:
                registry.update_tenant("newer", lambda _: Tenant("newer"))
                others.append(threading.Thread(target=keys.refresh))
                others[0].start()
                others[0].join(0.5)
            return found

        monkeypatch.setattr(registry, "list_tenants", list_slowly)
        registry.update_tenant("new", lambda _: Tenant("new"))
        keys.refresh()
        others[0].join()
        assert {"new", "newer"} <= set(keys.tenants)

    def test_pages_of_a_key_for_some_tasks_name_no_other(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "paged")
        for task in ("books-a", "films-a", "films-b", "secret", "films-c", "zebra"):
            assert tenant.put(task, native(11)).status_code == 201
        made = tenant.http.post("/v1/tenants/paged/keys", json={"tasks": ["films-*"]})
        films = keyed.as_key(made.json()["key"])
        seen, after = [], ""
        for _ in range(3):
            page = films.http.get("/v1/prefixes", params={"limit": 1, "after": after}).json()
            seen += [each["task"] for each in page["prefixes"]]
            after = page["next"]
            assert after in (seen[-1], None)
        assert (seen, after) == (["films-a", "films-b", "films-c"], None)
        assert len(tenant.http.get("/v1/prefixes", params={"limit": 2}).json()["prefixes"]) == 2

    def test_admin_keys_manage_their_tenant_only(self, keyed: Served) -> None:
        one = make_tenant(keyed, "first")
        make_tenant(keyed, "second")
        assert one.http.get("/v1/tenants/first").json()["name"] == "first"
        there, nowhere = one.http.get("/v1/tenants/second"), one.http.get("/v1/tenants/nobody")
        assert (there.status_code, nowhere.status_code) == (404, 404)
        assert there.text.replace("second", "nobody") == nowhere.text
        assert one.http.post("/v1/tenants/second/keys", json={}).status_code == 404
        assert one.http.post("/v1/tenants/first/keys", json={"scopes": ["operator"]}).status_code == 403
        watcher = keyed.http.post("/v1/tenants/first/keys", json={"scopes": ["metrics"]}).json()["id"]
        assert one.http.delete(f"/v1/tenants/first/keys/{watcher}").status_code == 403
        body = {"replaces": watcher, "scopes": ["generate"]}
        assert one.http.post("/v1/tenants/first/keys", json=body).status_code == 403
        assert keyed.http.delete(f"/v1/tenants/first/keys/{watcher}").status_code == 204
        assert one.http.put("/v1/tenants/first", json={"limits": {"weight": 9}}).status_code == 403
        assert one.http.get("/v1/audit", params={"tenant": "second"}).status_code == 403

    def test_suspension_is_at_once_and_can_be_undone(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "idle")
        assert keyed.http.post("/v1/tenants/idle/suspend").json()["suspended"] is True
        assert tenant.generate(PROMPT, max_new_tokens=1).status_code == 403
        assert keyed.http.post("/v1/tenants/idle/resume").json()["suspended"] is False
        assert tenant.generate(PROMPT, max_new_tokens=1).status_code == 200

    def test_key_in_the_query_is_refused(self, keyed: Served) -> None:
        assert keyed.http.get("/v1/prefixes", params={"api_key": "x"}).status_code == 400

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/tenants/UPPER", {}),
            ("/v1/tenants/x", {"limits": {"weight": 0}}),
            ("/v1/tenants/x", {"limits": {"max_rows": -1}}),
            ("/v1/tenants/x", {"limits": {"what": 1}}),
        ],
    )
    def test_what_cannot_be_is_422(self, keyed: Served, path: str, body: dict[str, object]) -> None:
        assert keyed.http.put(path, json=body).status_code == 422
        assert "x" not in [each["name"] for each in keyed.http.get("/v1/tenants").json()["tenants"]]


class TestIsolation:
    def test_one_name_is_two_tasks(self, keyed: Served) -> None:
        north, south = (make_tenant(keyed, name) for name in ("north", "south"))
        for tenant, seed in ((north, 1), (south, 2)):
            assert tenant.put("same", native(seed)).status_code == 201
        answers = [tokens(tenant, "same") for tenant in (north, south)]
        assert answers[0] != answers[1]
        assert [tokens(tenant, "same") for tenant in (north, south)] == answers

    def test_not_yours_reads_as_not_there(self, keyed: Served) -> None:
        owner, other = (make_tenant(keyed, name) for name in ("owner-a", "other-a"))
        assert owner.put("private", native(3)).status_code == 201
        digest = owner.http.get("/v1/prefixes/private").json()["versions"][0]["digest"]
        for task in ("private", f"private@{digest[:12]}", "owner-a/private", "owner-a/private@1"):
            mine, nobodys = (other.generate(PROMPT, name) for name in (task, task.replace("private", "absent0")))
            assert (mine.status_code, nobodys.status_code) == (404, 404)
            assert mine.text.replace("private", "absent0") == nobodys.text
        for method, path in (
            ("GET", "private"),
            ("GET", "private/versions/1/file"),
            ("POST", "private/pin"),
            ("POST", "private/disable"),
            ("DELETE", "private"),
        ):
            mine, nobodys = (
                other.http.request(method, f"/v1/prefixes/{name}")
                for name in (path, path.replace("private", "absent0"))
            )
            assert mine.status_code == 404, path
            assert mine.text.replace("private", "absent0") == nobodys.text
        assert other.http.get("/v1/prefixes").json()["prefixes"] == []

    def test_equal_content_is_stored_and_resident_apart(self, keyed: Served) -> None:
        one, two = (make_tenant(keyed, name) for name in ("twin-a", "twin-b"))
        assert [tenant.put("t", native(4)).status_code for tenant in (one, two)] == [201, 201]
        assert one.http.post("/v1/prefixes/t/preload").json()["residency"] == "resident"
        assert two.http.get("/v1/prefixes/t").json()["residency"] == "cold"
        assert one.http.delete("/v1/prefixes/t").status_code == 204
        assert tokens(two, "t")

    def test_sharing_is_read_only_and_by_name(self, keyed: Served) -> None:
        owner, friend, stranger = (make_tenant(keyed, name) for name in ("lender", "friend", "stranger"))
        assert owner.put("loan", native(5)).status_code == 201
        own = tokens(owner, "loan")
        assert friend.generate(PROMPT, "lender/loan").status_code == 404
        assert owner.http.post("/v1/prefixes/loan/share", json={"tenants": ["friend"]}).status_code == 200
        assert tokens(friend, "lender/loan") == own
        assert stranger.generate(PROMPT, "lender/loan").status_code == 404
        assert "lender/loan" in [each["id"] for each in friend.http.get("/v1/models").json()["data"]]
        for path in ("lender%2Floan/versions/1/file", "loan/versions/1/file"):
            assert friend.http.get(f"/v1/prefixes/{path}").status_code == 404
        assert owner.http.post("/v1/prefixes/loan/share", json={"tenants": ["*"]}).status_code == 403
        assert owner.http.post("/v1/prefixes/loan/share", json={"tenants": []}).status_code == 200
        assert friend.generate(PROMPT, "lender/loan").status_code == 404

    def test_a_deleted_tenant_leaves_nothing(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "leaving")
        assert tenant.put("t", native(6)).status_code == 201
        assert keyed.http.delete("/v1/tenants/leaving").status_code == 204
        assert tenant.http.get("/v1/prefixes").status_code == 401
        again = make_tenant(keyed, "leaving")
        assert again.http.get("/v1/prefixes").json()["prefixes"] == []
        assert again.generate(PROMPT, "t").status_code == 404


class TestLimits:
    def test_requests_a_minute(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "slow", requests_per_minute=3)
        answers = [tenant.generate(PROMPT, max_new_tokens=1) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers] == [2, 1, 0, 0]
        assert answers[-1].headers["x-ratelimit-limit-requests"] == "3"
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 20
        assert answers[-1].json()["error_type"] == "overloaded"
        chat = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        refused = tenant.http.post("/v1/chat/completions", json=chat)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")

    def test_tokens_a_minute_are_settled_by_what_was_used(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "thrifty", tokens_per_minute=200)
        # A byte is a token here: the estimate of 110 leaves 90, the 190 that are used leave 10; 80 are asked for next.
        assert tenant.generate("x" * 120, max_new_tokens=70, ignore_eos=True).status_code == 200
        time.sleep(1)
        assert tenant.generate("x" * 120, max_new_tokens=40).status_code == 429
        beyond = tenant.generate(PROMPT, max_new_tokens=220)  # never: nobody should try again
        assert (beyond.status_code, beyond.headers["x-should-retry"]) == (429, "false")
        assert "Retry-After" not in beyond.headers
        assert "more than this tenant's 200 a minute" in beyond.json()["error"]

    def test_uploads_a_minute_prefixes_and_bytes(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "hoarder", uploads_per_minute=3, max_prefixes=2)
        codes = [tenant.put(f"t{i}", native(20 + i)).status_code for i in range(4)]
        assert codes == [201, 201, 507, 429]
        small = make_tenant(keyed, "small", max_stored_bytes=10)
        refused = small.put("t", native(1))
        assert refused.status_code == 507
        assert "10" in refused.json()["detail"]
        short = make_tenant(keyed, "short", max_virtual_tokens=4, max_new_tokens=2)
        assert short.put("t", native(1)).status_code == 413
        assert short.generate(PROMPT, max_new_tokens=3).status_code == 422
        assert short.generate(PROMPT, details=True, ignore_eos=True).json()["details"]["generated_tokens"] == 2

    def test_versions_of_a_task_have_a_bound_that_an_operator_sets(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "many")
        assert keyed.http.get("/v1/tenants/many").json()["limits"]["max_versions"] == 256
        for bound in (2, 3):
            assert keyed.http.put("/v1/tenants/many", json={"limits": {"max_versions": bound}}).status_code == 200
            while (made := tenant.put("t", native(40 + len(versions(tenant, "t"))))).status_code == 201:
                pass
            assert made.status_code == 507
            for words in (
                f"max_versions of this tenant is {bound}",
                "`prefixserve rm t@V`",
                "/v1/prefixes/t/versions/V",
            ):
                assert words in made.json()["detail"]
            assert len(versions(tenant, "t")) == bound
        assert tenant.put("t", native(40)).json()["unchanged"] is True
        assert tenant.http.delete("/v1/prefixes/t/versions/1").status_code == 204
        assert tenant.put("t", native(50)).json()["version"] == 4
        assert keyed.http.put("/v1/tenants/many", json={"limits": {"max_versions": 0}}).status_code == 422

    def test_pinned_bytes_are_none_until_granted(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "pinning")
        assert tenant.put("t", native(7)).status_code == 201
        assert tenant.http.post("/v1/prefixes/t/pin").status_code == 507
        assert keyed.http.put("/v1/tenants/pinning", json={"limits": {"max_pinned_bytes": 2**20}}).status_code == 200
        assert tenant.http.post("/v1/prefixes/t/pin").status_code == 200
        assert tenant.http.delete("/v1/prefixes/t").status_code == 204

    def test_who_waits_for_its_own_rows_gets_429_and_for_all_rows_503(self, model_path: Path, tmp_path: Path) -> None:
        write_key(tmp_path / "key", OPERATOR_KEY)
        settings = settings_for(tmp_path, operator_key_file=tmp_path / "key", max_rows=2, max_queue_s=0.3)
        for served in serve_in_thread(make_state(settings, ModelFiles(model_path, NAME))):
            operator = served.as_key(OPERATOR_KEY)
            for name, limits, refused in (("own", {"max_rows": 1}, 429), ("other", {}, 503)):
                tenant = make_tenant(operator, name, **limits)
                eventually(lambda: policy_of(served, name).max_rows == limits.get("max_rows"))  # noqa: B023
                with ThreadPoolExecutor(8) as pool:
                    ask = partial(tenant.generate, max_new_tokens=200, ignore_eos=True)
                    answers = list(pool.map(ask, [PROMPT] * 8))
                assert {answer.status_code for answer in answers} == {200, refused}
                for answer in answers:
                    if answer.status_code != 200:
                        assert int(answer.headers["Retry-After"]) >= 1
                        assert answer.json()["error_type"] == "overloaded"

    def test_a_shared_tasks_owner_keeps_its_figures_to_itself(self, keyed: Served) -> None:
        owner, friend = make_tenant(keyed, "cramped", max_resident_bytes=4097), make_tenant(keyed, "visitor")
        assert owner.put("t", native(8, 60)).status_code == 201
        assert owner.http.post("/v1/prefixes/t/share", json={"tenants": ["visitor"]}).status_code == 200
        eventually(lambda: policy_of(keyed, "cramped").max_resident_bytes == 4097)
        refused = friend.generate(PROMPT, "cramped/t")
        assert refused.status_code == 422
        assert "more than their tenant may have" in refused.json()["error"]
        assert "4097" not in refused.text


class TestVersions:
    def test_weights_are_sticky_and_counted(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "canary")
        for seed in (1, 2):
            assert tenant.put("t", native(seed)).status_code == 201
        body = {"weights": {"1": 1, "2": 1}}
        assert tenant.http.post("/v1/prefixes/t/activate", json=body).json()["weights"] == body["weights"]
        seen = set()
        for session in range(12):
            versions = {
                tenant.http.post(
                    "/generate",
                    params={"task": "t"},
                    json={"inputs": PROMPT, "parameters": {"max_new_tokens": 1}},
                    headers={"X-Session-Id": f"s{session}"},
                ).headers["X-Prefix-Version"]
                for _ in range(2)
            }
            assert len(versions) == 1
            seen |= versions
        assert seen == {"1", "2"}
        stored = tenant.put("t", native(3))
        assert (stored.status_code, stored.json()["version"]) == (201, 3)
        assert tenant.http.get("/v1/prefixes/t").json()["weights"] == body["weights"]
        for weights in ({"1": 0}, {"9": 1}, {}, {"1": -3}, {str(i): 1 for i in range(1, 6)}):
            refused = tenant.http.post("/v1/prefixes/t/activate", json={"weights": weights})
            assert refused.status_code in (404, 422), weights
        rows = tenant.http.get("/v1/usage").json()["usage"]
        assert sum(row["num_requests"] for row in rows if row["version"] in (1, 2)) == 24
        assert tenant.http.post("/v1/prefixes/t/activate", json={"version": 2}).json()["weights"] is None

    def test_a_disabled_task_is_423(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "closing")
        assert tenant.put("t", native(1)).status_code == 201
        assert tenant.http.post("/v1/prefixes/t/disable").json()["enabled"] is False
        assert tenant.generate(PROMPT, "t").status_code == 423
        assert tenant.http.post("/v1/prefixes/t/enable").json()["enabled"] is True
        assert tokens(tenant, "t")

    def test_a_version_that_fails_three_times_goes_out_of_service(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "faulty")
        for seed in (1, 2):
            assert tenant.put("t", native(seed)).status_code == 201
        digest = tenant.http.get("/v1/prefixes/t").json()["versions"][1]["digest"]
        (blob,) = keyed.state.settings.data_dir.rglob(f"faulty/**/{digest}*")
        blob.write_bytes(blob.read_bytes()[:-1] + b"x")
        assert [tenant.generate(PROMPT, "t").status_code for _ in range(3)] == [424, 424, 424]
        eventually(lambda: tenant.generate(PROMPT, "t", max_new_tokens=1).status_code == 200)
        found = tenant.http.get("/v1/prefixes/t").json()
        assert (found["active"], found["quarantined"]) == (1, [2])
        (entry,) = [e for e in tenant.http.get("/v1/audit").json()["entries"] if e["action"] == "quarantine"]
        assert (entry["actor"], entry["subject"]) == ("server", "t@2")
        assert "prefixserve_version_quarantined_total 1.0" in keyed.http.get("/metrics").text


class TestRecords:
    def test_the_audit_says_who_did_what(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "audited")
        assert tenant.put("t", native(1)).status_code == 201
        assert tenant.put("t", native(2)).status_code == 201
        tenant.http.post("/v1/prefixes/t/activate", json={"version": "previous"})
        tenant.http.delete("/v1/prefixes/t", headers={"X-Request-Id": "the-last"})
        entries = tenant.http.get("/v1/audit").json()["entries"]
        actions = [(entry["action"], entry["subject"]) for entry in entries]
        assert actions == [
            ("delete", "t"),
            ("activate", "t@1"),
            ("publish", "t@2"),
            ("publish", "t@1"),
            ("create-tenant", "audited"),
        ]
        key_id = tenant.http.get("/v1/tenants/audited").json()["keys"][0]["id"]
        assert [entry["actor"] for entry in entries] == [key_id] * 4 + ["operator"]
        assert entries[0]["request_id"] == "the-last"
        page = tenant.http.get("/v1/audit", params={"limit": 2}).json()
        rest = tenant.http.get("/v1/audit", params={"before": page["next"]}).json()
        assert page["entries"] + rest["entries"] == entries

    def test_what_is_pinned_stays_within_the_limit_when_it_changes(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "growing")
        assert tenant.put("t", native(7)).status_code == 201
        assert tenant.http.post("/v1/prefixes/t/preload").status_code == 200
        sizes = keyed.state.engine.resident_sizes()
        (num_bytes,) = (size for key, size in sizes.items() if key.startswith("growing/"))
        assert [each.task for each in keyed.state.labels.values() if each.tenant == "growing"] == ["t"], "it is metered"

        def set_limit(limit: int) -> None:
            assert keyed.http.put("/v1/tenants/growing", json={"limits": {"max_pinned_bytes": limit}}).is_success

        def eventually_pinned(num_more: int) -> None:
            eventually(lambda: keyed.state.engine.stats().num_pinned == before + num_more)

        before = keyed.state.engine.stats().num_pinned
        set_limit(num_bytes)
        assert tenant.http.post("/v1/prefixes/t/pin").status_code == 200
        eventually_pinned(1)
        assert tenant.put("t", native(8, 60)).json()["active"] == 2
        eventually_pinned(0)
        set_limit(100 * num_bytes)
        eventually_pinned(1)
        assert tenant.http.post("/v1/prefixes/t/activate", json={"version": 1}).status_code == 200
        set_limit(num_bytes - 1)
        eventually_pinned(0)

    def test_limits_that_are_not_given_are_a_new_tenants(self, keyed: Served) -> None:
        for name, pinned in (("default", None), ("plain", 0)):
            keyed.http.put(f"/v1/tenants/{name}", json={"limits": {"weight": 2, "max_rows": 3}})
            limits = keyed.http.put(f"/v1/tenants/{name}", json={"limits": {"weight": 3}}).json()["limits"]
            assert (limits["weight"], limits["max_rows"], limits["max_pinned_bytes"]) == (3, None, pinned)
        keyed.http.put("/v1/tenants/default", json={"limits": {}})

    def test_usage_counts_every_request_once(self, keyed: Served) -> None:
        tenant = make_tenant(keyed, "metered")
        assert tenant.put("t", native(1)).status_code == 201
        for _ in range(3):
            tokens(tenant, "t")
        tokens(tenant, None)
        (bare, task) = sorted(
            (row for row in tenant.http.get("/v1/usage").json()["usage"] if row["num_requests"]),
            key=lambda row: row["task"],
        )
        assert (task["num_requests"], task["generated_tokens"], task["virtual_tokens"]) == (3, 24, 15)
        assert (task["version"], task["prompt_tokens"]) == (1, 3 * len(PROMPT))
        assert (bare["task"], bare["num_requests"], bare["virtual_tokens"]) == ("", 1, 0)
        lines = tenant.http.get("/v1/usage", params={"format": "csv"}).text.splitlines()
        assert lines[0].startswith("day,tenant,task,version,num_requests")
        assert all(line.split(",")[1] == "metered" for line in lines[1:])
        accepted = tenant.http.get("/v1/usage", headers={"Accept": "text/csv"})
        assert accepted.headers["Content-Type"].startswith("text/csv")
        asked = tenant.http.get("/v1/usage", params={"format": "json"}, headers={"Accept": "text/csv"})
        assert asked.json()["usage"]


def test_the_first_tenant_may_be_an_operators(served: Served) -> None:
    """`default` is a tenant before it has anything of its own: over HTTP it can be given the first key."""
    tenants = served.http.get("/v1/tenants").json()["tenants"]
    assert [(each["name"], each["keys"]) for each in tenants] == [("default", [])]
    made = served.http.post("/v1/tenants/default/keys", json={"scopes": ["operator"]})
    assert made.status_code == 201, made.text
    operator = served.as_key(made.json()["key"])
    assert served.http.get("/v1/prefixes").status_code == 401
    assert operator.http.put("/v1/tenants/another").status_code == 201
    assert operator.http.delete("/v1/tenants/another").status_code == 204
    assert operator.http.delete(f"/v1/tenants/default/keys/{made.json()['id']}").status_code == 204
    assert served.http.get("/v1/prefixes").status_code == 200


class TestStart:
    def test_a_server_that_others_reach_stays_shut_when_its_last_key_goes(self, tmp_path: Path) -> None:
        registry = SqliteRegistry(tmp_path / "registry.sqlite")
        text, key = new_key(SCOPES, time.time())
        registry.update_tenant("north", lambda _: Tenant("north", keys=(key,)))
        reached, local = (KeyRing(registry, is_local=is_local) for is_local in (False, True))
        for ring in (reached, local):
            assert ring.caller(f"Bearer {text}").tenant.name == "north"
        registry.update_tenant("north", lambda found: found and found.without_key(key.id))
        for ring in (reached, local):
            ring.refresh()
        assert local.caller(None).actor == "local"
        assert not reached.is_open
        with pytest.raises(RequestError, match="expected a key"):
            reached.caller(None)
        registry.close()

    def test_without_keys_only_this_machine_is_served(self, model_path: Path, tmp_path: Path) -> None:
        with pytest.raises(StartError, match=r"loopback address while no keys are configured, got 0\.0\.0\.0"):
            make_state(settings_for(tmp_path, host="0.0.0.0"), ModelFiles(model_path, NAME))

    @pytest.mark.parametrize("text", ["", "short", "with spaces in it, though long enough"])
    def test_an_operator_key_that_cannot_be_one_stops_the_start(
        self, model_path: Path, tmp_path: Path, text: str
    ) -> None:
        write_key(tmp_path / "key", text)
        settings = settings_for(tmp_path, operator_key_file=tmp_path / "key")
        with pytest.raises(StartError, match="operator_key_file"):
            make_state(settings, ModelFiles(model_path, NAME))

    def test_without_keys_authorization_is_ignored(self, served: Served) -> None:
        answer = served.http.get("/v1/prefixes", headers=bearer("whatever"))
        assert answer.status_code == 200
        assert json.loads(served.http.get("/v1/tenants").text)["tenants"][0]["name"] == "default"
