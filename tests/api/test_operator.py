"""An operator sees tenants' tasks and acts on them, on every route, as OWNER/TASK."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import NAME, OPERATOR_KEY, Served, make_tenant, native

PROMPT = "A fine film."


@pytest.fixture(scope="module")
def owner(keyed: Served) -> Served:
    return make_tenant(keyed, "north")


@pytest.fixture
def films(owner: Served) -> Served:
    """The owner, with a task `films` of two versions, the second active."""
    owner.http.delete("/v1/prefixes/films")
    assert [owner.put("films", native(seed)).status_code for seed in (1, 2)] == [201, 201]
    return owner


def names(served: Served, **query: object) -> list[str]:
    found, after = [], ""
    while after is not None:
        page = served.http.get("/v1/prefixes", params={**query, "after": after}).json()
        found += [task["task"] for task in page["prefixes"]]
        after = page["next"]
    return found


def cli(served: Served, *arguments: str, key: str = OPERATOR_KEY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments, "--url", served.url, "--api-key", key]
    return subprocess.run(command, capture_output=True, text=True, check=False)


class TestActing:
    def test_it_generates_with_a_tenants_task(self, keyed: Served, films: Served) -> None:
        own = films.generate(PROMPT, "films", max_new_tokens=8, details=True).json()
        for name in ("north/films", "north/films@2"):
            theirs = keyed.generate(PROMPT, name, max_new_tokens=8, details=True).json()
            assert theirs["details"]["tokens"] == own["details"]["tokens"]
        both = keyed.generate(PROMPT, "north/films@1,north/films@2", max_new_tokens=4)
        assert both.status_code == 200, both.text
        for path, body in (
            ("completions", {"prompt": PROMPT}),
            ("chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
        ):
            answer = keyed.http.post(f"/v1/{path}", json={"model": "north/films", "max_tokens": 2, **body})
            assert answer.status_code in (200, 422), answer.text  # this model has no chat template
            assert answer.status_code == 200 or "template" in answer.text
        assert keyed.http.get("/v1/models/north/films").json()["id"] == "north/films"

    @pytest.mark.parametrize("slash", ["/", "%2F"])
    def test_every_route_takes_the_owners_name(self, keyed: Served, films: Served, slash: str) -> None:
        base = f"/v1/prefixes/north{slash}films"
        shown = keyed.http.get(base)
        assert (shown.json()["task"], shown.json()["owner"], shown.json()["shared"]) == ("north/films", "north", False)
        assert keyed.http.get(f"{base}@1").json()["version"] == 1
        assert keyed.http.get(f"{base}/versions/1").json()["version"] == 1
        assert (
            keyed.http.get(f"{base}/versions/1/file").content
            == films.http.get("/v1/prefixes/films/versions/1/file").content
        )
        assert keyed.http.post(f"{base}/activate", json={"version": 1}).json()["active"] == 1
        assert keyed.http.post(f"{base}/activate", json={"version": "previous"}).json()["active"] == 2
        assert keyed.http.post(f"{base}/activate", json={"weights": {"1": 1, "2": 1}}).json()["weights"]
        assert keyed.http.post(f"{base}/activate", json={"version": 2}).json()["weights"] is None
        assert keyed.http.post(f"{base}/preload").json()["residency"] == "resident"
        assert keyed.http.post(f"{base}/pin").status_code == 507, "what its owner may pin"
        assert keyed.http.post(f"{base}/unpin").json()["pinned"] is False
        assert keyed.http.post(f"{base}/disable").json()["enabled"] is False
        assert films.generate(PROMPT, "films").status_code == 423
        assert keyed.http.post(f"{base}/enable").json()["enabled"] is True
        assert keyed.http.post(f"{base}/share", json={"tenants": ["default"]}).json()["shared_with"] == ["default"]
        put = keyed.http.put(base, content=native(3), headers={"Content-Type": "application/octet-stream"})
        assert (put.status_code, put.json()["task"], put.json()["version"]) == (201, "north/films", 3)
        assert put.headers["Location"] == "/v1/prefixes/north/films/versions/3"
        assert keyed.http.delete(f"{base}@1").status_code == 204
        assert keyed.http.delete(f"{base}/versions/2").status_code == 204
        stale = keyed.http.delete(base, headers={"If-Match": '"0"'})
        assert (stale.status_code, keyed.http.delete(base).status_code) == (412, 204)
        assert films.http.get("/v1/prefixes/films").status_code == 404

    def test_an_ensemble_of_the_owners_versions(self, keyed: Served, films: Served) -> None:
        for members in (["films@1", "films@2"], ["north/films@1", "films@2"]):
            body = {"kind": "ensemble", "members": members, "rule": "vote"}
            made = keyed.http.put("/v1/prefixes/north/both", json=body)
            assert made.status_code in (200, 201), made.text
        assert films.http.get("/v1/prefixes/both").json()["versions"][0]["members"] == ["films@1", "films@2"]
        assert films.http.delete("/v1/prefixes/both").status_code == 204

    @pytest.mark.parametrize("task", ["versions", "file", "activate", "pin"])
    def test_a_task_may_be_named_as_a_part_of_a_path(self, keyed: Served, owner: Served, task: str) -> None:
        for name, asked in ((f"north/{task}", keyed), (task, owner)):
            assert asked.put(name, native(1)).status_code == 201
            assert asked.http.get(f"/v1/prefixes/{name}").json()["task"] == name
            assert asked.http.get(f"/v1/prefixes/{name}/versions/1").json()["version"] == 1
            assert asked.http.get(f"/v1/prefixes/{name}/versions/1/file").status_code == 200
            assert asked.http.post(f"/v1/prefixes/{name}/disable").json()["enabled"] is False
            assert asked.http.delete(f"/v1/prefixes/{name}").status_code == 204

    def test_nobody_else_takes_anothers_name(self, keyed: Served, films: Served) -> None:
        stranger = make_tenant(keyed, "stranger-to-north")
        asked = [("GET", ""), ("GET", "@1"), ("GET", "/versions/1"), ("GET", "/versions/1/file"), ("DELETE", "")]
        asked += [("POST", f"/{act}") for act in ("pin", "unpin", "preload", "disable", "enable")]
        asked += [("DELETE", "/versions/1"), ("PUT", "")]
        for method, rest in asked:
            answers = [
                stranger.http.request(method, f"/v1/prefixes/north/{task}{rest}") for task in ("films", "absent")
            ]
            assert [answer.status_code for answer in answers] == [404, 404], (method, rest)
            assert answers[0].text.replace("films", "absent") == answers[1].text
        assert stranger.http.get("/v1/prefixes", params={"tenant": "north"}).status_code == 403
        assert stranger.http.get("/v1/prefixes", params={"tenant": "*"}).status_code == 403

    def test_a_tenant_names_its_own_tasks_in_full(self, films: Served) -> None:
        assert films.http.get("/v1/prefixes/north/films").json()["task"] == "films"
        assert films.http.post("/v1/prefixes/north/films/activate", json={"version": 1}).json()["active"] == 1

    def test_what_is_not_there_is_404(self, keyed: Served, owner: Served) -> None:
        for name in ("north/absent", "nobody/films", "UP/films", "north/a/b", "north//films", "/films", "north/"):
            assert keyed.http.get(f"/v1/prefixes/{name}").status_code == 404, name
            assert keyed.generate(PROMPT, name).status_code == 404, name
        assert keyed.put("nobody/films", native(1)).status_code == 404


class TestRecords:
    def test_the_owners_audit_has_the_entry_and_the_callers_usage_the_tokens(
        self, keyed: Served, films: Served
    ) -> None:
        made = keyed.http.post("/v1/tenants/default/keys", json={"scopes": ["operator"]}).json()
        operator = keyed.as_key(made["key"])
        for one in (keyed, operator):
            assert one.http.post("/v1/prefixes/north/films/disable").status_code == 200
            assert one.http.post("/v1/prefixes/north/films/enable").status_code == 200
        shown = films.http.get("/v1/audit", params={"limit": 4}).json()["entries"]
        assert [(entry["action"], entry["actor"]) for entry in shown] == [
            ("enable", "operator"),
            ("disable", "operator"),
        ] * 2, "another tenant's key is not named"
        seen = keyed.http.get("/v1/audit", params={"tenant": "north", "limit": 4}).json()["entries"]
        assert [entry["actor"] for entry in seen] == [made["id"]] * 2 + ["operator"] * 2
        before = films.http.get("/v1/usage").json()["usage"]
        assert operator.generate(PROMPT, "north/films", max_new_tokens=1).status_code == 200
        rows = [row for row in operator.http.get("/v1/usage").json()["usage"] if row["task"] == "north/films"]
        assert {row["tenant"] for row in rows} == {"default"}
        after = films.http.get("/v1/usage").json()["usage"]
        assert sum(row["num_requests"] for row in before) == sum(row["num_requests"] for row in after)
        assert keyed.http.delete(f"/v1/tenants/default/keys/{made['id']}").status_code == 204


class TestListing:
    def test_one_tenants_tasks_or_all_of_them_by_pages(self, keyed: Served, films: Served) -> None:
        other = make_tenant(keyed, "south")
        for served, tasks in ((films, ("a", "b")), (other, ("a", "films")), (keyed, ("own",))):
            assert [served.put(task, native(1)).status_code for task in tasks] == [201] * len(tasks)
        north = ["north/a", "north/b", "north/films"]
        assert names(keyed, tenant="north") == names(keyed, tenant="north", limit=1) == north
        everything = names(keyed, tenant="*")
        assert [name for name in everything if name.partition("/")[0] in ("north", "south", "default")] == [
            "default/own",
            *north,
            "south/a",
            "south/films",
        ]
        assert names(keyed, tenant="*", limit=1) == names(keyed, tenant="*", limit=3) == everything
        assert names(keyed) == ["own"]
        assert keyed.http.get("/v1/prefixes", params={"tenant": "nobody"}).status_code == 404
        assert films.http.get("/v1/prefixes", params={"tenant": "north"}).status_code == 200

    def test_the_command_line_follows(self, keyed: Served, films: Served, tmp_path: Path) -> None:
        (tmp_path / "films.safetensors").write_bytes(native(5))
        pushed = cli(keyed, "push", "north/films", str(tmp_path / "films.safetensors"), "--json")
        assert (pushed.returncode, json.loads(pushed.stdout)["task"]) == (0, "north/films"), pushed.stderr
        assert json.loads(cli(keyed, "show", "north/films", "--json").stdout)["active"] == 3
        assert "north/films" in cli(keyed, "list", "--tenant", "north").stdout
        listed = json.loads(cli(keyed, "list", "--tenant", "*", "--json").stdout)
        assert ("north/films", "north") in [(task["task"], task["owner"]) for task in listed]
        assert cli(keyed, "rollback", "north/films").returncode == 0
        assert cli(keyed, "generate", "north/films", PROMPT, "--max-new-tokens", "2").returncode == 0
        assert cli(keyed, "rm", "north/films").returncode == 0
        assert films.http.get("/v1/prefixes/films").status_code == 404


class TestSharing:
    def test_who_may_use_a_task_sees_it_and_nothing_else_of_its_owner(self, keyed: Served, films: Served) -> None:
        friend = make_tenant(keyed, "friend-of-north")
        assert films.put("films", native(9), note="for us alone").status_code == 201
        for body in ({"tenants": ["friend-of-north", "default"]}, {"tenants": ["friend-of-north", "default"]}):
            assert films.http.post("/v1/prefixes/films/share", json=body).status_code == 200
        assert friend.put("own", native(1)).status_code == 201
        listed = friend.http.get("/v1/prefixes").json()["prefixes"]
        assert [(task["task"], task["owner"], task["shared"]) for task in listed] == [
            ("own", "friend-of-north", False),
            ("north/films", "north", True),
        ]
        assert names(friend, limit=1) == ["own", "north/films"]
        for path in ("north/films", "north/films@3", "north/films/versions/3", "north%2Ffilms"):
            shown = friend.http.get(f"/v1/prefixes/{path}")
            assert shown.status_code == 200, path
            assert "ETag" not in shown.headers
            for hidden in ("for us alone", "default", "revision", "note", "pinned", "quarantined"):
                assert hidden not in shown.text, (path, hidden)
        assert [version["version"] for version in friend.http.get("/v1/prefixes/north/films").json()["versions"]] == [
            1,
            2,
            3,
        ]
        assert friend.http.get("/v1/prefixes/north/films/versions/3/file").status_code == 404
        for act, body in (("pin", None), ("preload", None), ("disable", None), ("activate", {"version": 1})):
            assert friend.http.post(f"/v1/prefixes/north/films/{act}", json=body).status_code == 404
        assert friend.http.post("/v1/prefixes/north/films/share", json={"tenants": []}).status_code == 404
        assert films.http.get("/v1/prefixes/films").json()["shared_with"] == ["default", "friend-of-north"]

    def test_the_command_line_shows_what_is_shared(self, keyed: Served, films: Served) -> None:
        key = keyed.http.put("/v1/tenants/reader").json()["key"]
        assert films.http.post("/v1/prefixes/films/share", json={"tenants": ["reader"]}).status_code == 200
        listed = cli(keyed, "list", key=key)
        assert listed.returncode == 0, listed.stderr
        (line,) = (line for line in listed.stdout.splitlines() if "north/films" in line)
        assert line.count("north") == 2, "the owner stands beside"
        shown = cli(keyed, "show", "north/films", key=key)
        assert (shown.returncode, "owner: north" in shown.stdout) == (0, True), shown.stderr
        assert cli(keyed, "show", "north/films@2", key=key).returncode == 0
        assert cli(keyed, "show", "north/absent", key=key).returncode == 1

    def test_a_task_is_not_shared_with_a_tenant_that_is_not_there(self, films: Served) -> None:
        refused = films.http.post("/v1/prefixes/films/share", json={"tenants": ["nobody-there"]})
        assert (refused.status_code, refused.json()["detail"]) == (
            422,
            "a task is shared with tenants that are there, got 'nobody-there'",
        )
        assert films.http.get("/v1/prefixes/films").json()["shared_with"] == []
        assert films.http.post("/v1/prefixes/films/share", json={"tenants": ["default"]}).status_code == 200


def test_a_served_names_prefix_is_no_owner(keyed: Served) -> None:
    assert keyed.generate(PROMPT, NAME, max_new_tokens=1).status_code == 200
