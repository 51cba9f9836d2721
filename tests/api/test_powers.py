"""Nobody gives, ends or sees more than their key has."""

from __future__ import annotations

import re
import time

import pytest

from prefix_store.task_patterns import covers
from tests.conftest import Served, make_tenant, native

PROMPT = "A fine film."


@pytest.fixture(scope="module")
def house(keyed: Served) -> Served:
    """A tenant with tasks of two kinds, as its first key asks."""
    tenant = make_tenant(keyed, "house")
    for task in ("films-a", "films-b", "books-a"):
        assert tenant.put(task, native(11)).status_code == 201
    return tenant


def key_of(house: Served, **body: object) -> tuple[Served, str]:
    made = house.http.post("/v1/tenants/house/keys", json=body)
    assert made.status_code == 201, made.text
    return house.as_key(made.json()["key"]), made.json()["id"]


def status_of(served: Served, **body: object) -> int:
    return served.http.post("/v1/tenants/house/keys", json=body).status_code


@pytest.mark.parametrize(
    ("pattern", "other", "expected"),
    [
        ("*", "*", True),
        ("*", "films-[ab]", False),
        ("films-*", "films-*", True),
        ("films-*", "films-a*", True),
        ("films-*", "films-?", True),
        ("films-*", "films-a", True),
        ("films-?", "films-a", True),
        ("films-[ab]", "films-a", True),
        ("films-[ab]", "films-[ab]", True),
        ("films-?", "films-*", False),
        ("films-[*]", "films-*", False),
        ("films-*", "*", False),
        ("films-*", "film*", False),
        ("*a*", "[ab]x", False),
        ("films-a", "films-*", False),
    ],
)
def test_a_pattern_covers_what_surely_lies_in_it(pattern: str, other: str, expected: bool) -> None:
    assert covers(pattern, other) is expected


class TestGiving:
    def test_a_key_makes_keys_with_some_of_its_scopes(self, house: Served) -> None:
        admin, _ = key_of(house, scopes=["admin", "generate"])
        for scopes, status in (
            (["generate"], 201),
            (["admin", "generate"], 201),
            (["publish"], 403),
            (["generate", "upload"], 403),
            (["metrics"], 403),
            (["operator"], 403),
        ):
            assert status_of(admin, scopes=scopes) == status, scopes
        made = admin.http.post("/v1/tenants/house/keys", json={}).json()
        assert made["scopes"] == ["generate", "admin"]

    def test_a_key_makes_keys_for_some_of_its_tasks(self, house: Served) -> None:
        films, _ = key_of(house, tasks=["films-*"])
        for tasks, status in (
            (["films-*"], 201),
            (["films-a"], 201),
            (["films-a*", "films-b"], 201),
            ([], 403),
            (["*"], 403),
            (["films-a", "books-a"], 403),
            (["film*"], 403),
        ):
            assert status_of(films, tasks=tasks) == status, tasks
        assert films.http.post("/v1/tenants/house/keys", json={}).json()["tasks"] == ["films-*"]

    def test_a_key_makes_no_key_that_outlives_it(self, house: Served) -> None:
        short, key_id = key_of(house, expires_in_s=600)
        ends_s = next(
            key["expires_at_s"] for key in house.http.get("/v1/tenants/house").json()["keys"] if key["id"] == key_id
        )
        assert status_of(short, expires_in_s=601) == 403
        assert status_of(short, expires_in_s=10**8) == 403
        assert status_of(short, expires_in_s=60) == 201
        assert short.http.post("/v1/tenants/house/keys", json={}).json()["expires_at_s"] == ends_s
        rotated = short.http.post("/v1/tenants/house/keys", json={"replaces": key_id, "overlap_s": 600})
        assert (rotated.status_code, rotated.json()["expires_at_s"]) == (201, ends_s)

    def test_an_operators_key_gives_no_more_than_it_has(self, keyed: Served, house: Served) -> None:
        body = {"scopes": ["operator"], "tasks": ["house/films-*"], "expires_in_s": 600}
        made = keyed.http.post("/v1/tenants/default/keys", json=body).json()
        one = keyed.as_key(made["key"])
        assert one.generate(PROMPT, "house/films-a", max_new_tokens=1).status_code == 200
        assert one.generate(PROMPT, "house/books-a", max_new_tokens=1).status_code == 403
        assert [task["task"] for task in one.http.get("/v1/prefixes", params={"tenant": "*"}).json()["prefixes"]] == [
            "house/films-a",
            "house/films-b",
        ]
        assert {entry["subject"].partition("@")[0] for entry in one.http.get("/v1/audit").json()["entries"]} == {
            "films-a",
            "films-b",
        }
        for scopes, tasks, name, status in (
            (["operator"], [], "default", 403),
            (["operator"], ["*"], "default", 403),
            (["operator"], ["house/films-a"], "default", 201),
            (["admin"], [], "house", 403),
            (["admin"], ["films-*"], "house", 201),
        ):
            answer = one.http.post(
                f"/v1/tenants/{name}/keys", json={"scopes": scopes, "tasks": tasks, "expires_in_s": 60}
            )
            assert answer.status_code == status, (scopes, tasks, name, answer.text)
        for method, path in (
            ("PUT", "house"),
            ("PUT", "another-house"),
            ("POST", "house/suspend"),
            ("POST", "house/resume"),
            ("DELETE", "house"),
        ):
            assert one.http.request(method, f"/v1/tenants/{path}").status_code == 403, (method, path)
        keys = one.http.get("/v1/tenants/house").json()["keys"]
        assert all(key["tasks"] and all(task.startswith("films") for task in key["tasks"]) for key in keys)
        assert keyed.http.get("/v1/tenants/house").json()["suspended"] is False


class TestEnding:
    def test_a_key_ends_and_rotates_keys_that_may_no_more(self, house: Served) -> None:
        films, films_id = key_of(house, tasks=["films-*"])
        admin, admin_id = key_of(house, scopes=["admin"])
        _, whole = key_of(house)
        _, publishing = key_of(house, scopes=["publish"], tasks=["films-a"])
        _, books = key_of(house, tasks=["books-*"])
        for one, key_id, status in (
            (films, whole, 403),
            (films, books, 403),
            (admin, whole, 403),
            (admin, publishing, 403),
            (admin, films_id, 403),
            (films, admin_id, 403),
        ):
            assert status_of(one, replaces=key_id, scopes=["admin"], tasks=["films-a"]) == status
            assert one.http.delete(f"/v1/tenants/house/keys/{key_id}").status_code == status, key_id
        assert films.http.delete(f"/v1/tenants/house/keys/{publishing}").status_code == 204
        for each in (whole, books, admin_id):
            assert house.http.delete(f"/v1/tenants/house/keys/{each}").status_code == 204

    def test_a_key_may_end_itself(self, keyed: Served, house: Served) -> None:
        for scopes in (["generate"], ["upload"], ["admin"]):
            one, key_id = key_of(house, scopes=scopes, tasks=["films-*"])
            other, other_id = key_of(house, scopes=["generate"])
            if scopes != ["admin"]:
                assert one.http.delete(f"/v1/tenants/house/keys/{other_id}").status_code == 403
                assert one.http.delete(f"/v1/tenants/default/keys/{key_id}").status_code == 403
                assert one.http.get(f"/v1/tenants/house/keys/{key_id}").status_code in (403, 404, 405)
            assert one.http.delete(f"/v1/tenants/house/keys/{key_id}").status_code == 204
            assert one.http.get("/v1/models").status_code == 401
            assert other.http.get("/v1/models").status_code == 200


class TestSeeing:
    def test_audit_and_usage_of_some_tasks_are_of_these_alone(self, keyed: Served, house: Served) -> None:
        films, _ = key_of(house, tasks=["films-*"])
        key_of(house, tasks=["films-a"])
        for task in ("films-a", "books-a", None):
            assert house.generate(PROMPT, task, max_new_tokens=1).status_code == 200
        house.http.post("/v1/prefixes/books-a/disable")
        house.http.post("/v1/prefixes/books-a/enable")
        house.http.post("/v1/prefixes/films-b/share", json={"tenants": ["default"]})
        found = films.http.get("/v1/audit", params={"limit": 1000}).json()["entries"]
        assert [(entry["action"], entry["subject"]) for entry in found] == [
            ("share", "films-b with default"),
            ("publish", "films-b@1"),
            ("publish", "films-a@1"),
        ]
        paged, before = [], None
        while True:
            page = films.http.get("/v1/audit", params={"limit": 1} | ({"before": before} if before else {})).json()
            paged += page["entries"]
            before = page["next"]
            if before is None:
                break
        assert paged == found
        tasks = {row["task"] for row in films.http.get("/v1/usage").json()["usage"]}
        assert tasks == {"films-a"}
        csv = films.http.get("/v1/usage", params={"format": "csv"}).text
        assert "books" not in csv
        assert {row["task"] for row in house.http.get("/v1/usage").json()["usage"]} >= {"films-a", "books-a", ""}

    def test_keys_for_other_tasks_are_not_shown(self, house: Served) -> None:
        films, films_id = key_of(house, tasks=["films-*"])
        _, narrow = key_of(house, tasks=["films-a"])
        _, books = key_of(house, tasks=["books-*"])
        shown = [key["id"] for key in films.http.get("/v1/tenants/house").json()["keys"]]
        assert {films_id, narrow} <= set(shown)
        assert books not in shown
        assert "books" not in films.http.get("/v1/tenants/house").text
        assert {books, narrow, films_id} <= {key["id"] for key in house.http.get("/v1/tenants/house").json()["keys"]}

    def test_members_of_other_tasks_are_not_named(self, house: Served) -> None:
        films, _ = key_of(house, tasks=["films-*"])
        body = {"kind": "ensemble", "members": ["films-a@1", "books-a@1"], "rule": "vote"}
        assert house.http.put("/v1/prefixes/films-both", json=body).status_code in (200, 201)
        (version,) = films.http.get("/v1/prefixes/films-both").json()["versions"]
        assert version["members"] == ["films-a@1", None]
        assert "books" not in films.http.get("/v1/prefixes").text
        body["members"] = ["films-a@1", "films-b@1"]
        assert house.http.put("/v1/prefixes/books-both", json=body).status_code in (200, 201)
        for one, names in ((house, ["books-both@1", "films-both@1"]), (films, ["films-both@1"])):
            refused = one.http.delete("/v1/prefixes/films-a")
            assert refused.status_code == 409
            assert re.findall(r"[a-z-]+@[0-9]+", refused.text) == names
        refused = films.http.delete("/v1/prefixes/films-b")
        assert (refused.status_code, "books" in refused.text) == (409, False)
        assert house.http.delete("/v1/prefixes/books-both").status_code == 204
        assert house.http.delete("/v1/prefixes/films-both").status_code == 204


class TestOthersPace:
    def test_nothing_that_a_tenant_is_shown_counts_what_others_do(self, keyed: Served) -> None:
        def counts(served: Served, name: str) -> list[object]:
            assert served.put("t", native(int(time.monotonic_ns() % 2**31))).status_code == 201
            task = served.http.get("/v1/prefixes/t")
            audit = served.http.get("/v1/audit", params={"limit": 1}).json()
            return [
                task.json()["revision"],
                task.headers["ETag"],
                audit["entries"][0]["number"],
                audit["next"],
                served.http.get(f"/v1/tenants/{name}").json()["revision"],
            ]

        quiet, busy = make_tenant(keyed, "quiet"), make_tenant(keyed, "busy")
        assert counts(quiet, "quiet") == [1, '"1"', 2, 2, 1]
        for i in range(5):
            assert counts(busy, "busy")[:2] == [1 + i, f'"{1 + i}"']
            assert keyed.http.put("/v1/tenants/busy", json={"limits": {"weight": 1 + i}}).is_success
        assert counts(quiet, "quiet") == [2, '"2"', 3, 3, 1]

    def test_an_operator_pages_over_all_tenants(self, keyed: Served) -> None:
        everything = keyed.http.get("/v1/audit", params={"limit": 1000}).json()["entries"]
        numbers = [entry["number"] for entry in everything]
        assert numbers == sorted(set(numbers), reverse=True)
        paged, before = [], None
        while True:
            page = keyed.http.get("/v1/audit", params={"limit": 7} | ({"before": before} if before else {})).json()
            paged += page["entries"]
            before = page["next"]
            if before is None:
                break
            assert before == page["entries"][-1]["number"]
        assert paged == everything
        assert len({entry["tenant"] for entry in everything}) > 1
