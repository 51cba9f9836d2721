"""`prefixserve tenant …` on the registry of a server that runs: it sees every change within a second."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from prefix_store.sqlite_registry import SqliteRegistry
from prefix_store.tenants import is_key
from server.cli import app
from server.data_folder import serving
from tests.conftest import Served, native
from tests.prefix_store.redis_process import RedisProcess
from tests.waiting import eventually


@dataclass(frozen=True)
class Commands:
    data_dir: str

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["tenant", *arguments], env={"PREFIXSERVE_DATA_DIR": self.data_dir})

    def json(self, *arguments: str) -> Any:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def refused(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        return result.stderr


@pytest.fixture
def commands(keyed: Served) -> Commands:
    return Commands(str(keyed.state.settings.data_dir))


def status(served: Served) -> int:
    return served.http.get("/v1/prefixes").status_code


def test_a_new_tenants_key_stands_alone_on_the_last_line_and_works(keyed: Served, commands: Commands) -> None:
    made = commands.run("create", "by-hand", "--limit", "weight=2", "--limit", "max_pinned_bytes=none")
    assert made.exit_code == 0, made.output
    tenant = keyed.as_key(made.stdout.splitlines()[-1])
    eventually(lambda: status(tenant) == 200)
    shown = keyed.http.get("/v1/tenants/by-hand").json()
    assert (shown["limits"]["weight"], shown["limits"]["max_pinned_bytes"]) == (2, None)
    assert shown["keys"][0]["scopes"] == ["generate", "upload", "publish", "admin"]
    again = commands.run("create", "by-hand", "--limit", "weight=7")
    assert (again.exit_code, again.stdout) == (0, "")
    assert keyed.http.get("/v1/tenants/by-hand").json()["limits"]["weight"] == 2
    assert status(tenant) == 200


def test_limits_suspension_rotation_and_removal_are_seen(keyed: Served, commands: Commands) -> None:
    first = commands.json("create", "turned")["key"]
    tenant = keyed.as_key(first)
    eventually(lambda: status(tenant) == 200)
    assert commands.json("limits", "turned", "--limit", "requests_per_minute=1")["requests_per_minute"] == 1
    eventually(lambda: tenant.generate("x", max_new_tokens=1).status_code == 429)
    assert commands.json("suspend", "turned")["suspended"] is True
    eventually(lambda: status(tenant) == 403)
    assert commands.json("suspend", "turned", "--undo")["suspended"] is False
    eventually(lambda: status(tenant) == 200)
    second = keyed.as_key(commands.json("rotate", "turned", "--overlap-s", "0")["key"])
    eventually(lambda: (status(tenant), status(second)) == (401, 200))
    assert "turned" in [each["name"] for each in commands.json("list")]
    assert commands.json("rm", "turned") == {"name": "turned", "num_versions": 0}
    eventually(lambda: status(second) == 401)
    actions = [e["action"] for e in keyed.http.get("/v1/audit", params={"tenant": "turned"}).json()["entries"]]
    assert actions == ["delete-tenant", "rotate-keys", "resume", "suspend", "set-limits", "create-tenant"]


def test_every_option_is_a_variable_too_and_default_is_a_tenant(keyed: Served, commands: Commands) -> None:
    env = {"PREFIXSERVE_DATA_DIR": commands.data_dir, "PREFIXSERVE_JSON": "1"}
    limit = env | {"PREFIXSERVE_LIMIT": "weight=2 max_rows=5"}
    shown = json.loads(CliRunner().invoke(app, ["tenant", "limits", "default"], env=limit).stdout)
    assert (shown["weight"], shown["max_rows"], shown["max_pinned_bytes"]) == (2, 5, None)
    for undo, is_suspended in (("0", True), ("1", False)):
        done = CliRunner().invoke(app, ["tenant", "suspend", "default"], env=env | {"PREFIXSERVE_UNDO": undo})
        assert json.loads(done.stdout)["suspended"] is is_suspended
    refused = CliRunner().invoke(app, ["tenant", "rotate", "default"], env=env | {"PREFIXSERVE_OVERLAP_S": "-1"})
    assert refused.exit_code == 2
    assert commands.run("limits", "default", "--limit", "weight=1", "--limit", "max_rows=none").exit_code == 0


def test_usage_is_shown_with_the_servers_key(keyed: Served, commands: Commands) -> None:
    key = commands.json("create", "used")["key"]
    tenant = keyed.as_key(key)
    eventually(lambda: tenant.generate("x", max_new_tokens=1).status_code == 200)
    options = ["usage", "--url", keyed.url, "--api-key", key]
    (row,) = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert (row["tenant"], row["num_requests"]) == ("used", 1)
    table = CliRunner().invoke(app, options).stdout
    assert "resident_byte_s" in table
    assert "used" in table


def test_a_registry_is_copied_with_its_tenants_and_tasks(keyed: Served, commands: Commands, tmp_path: Path) -> None:
    key = commands.json("create", "moving")["key"]
    tenant = keyed.as_key(key)
    eventually(lambda: tenant.put("t", native(1)).status_code == 201)
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    shutil.copytree(commands.data_dir, source)  # nobody writes it while it is copied
    copied = CliRunner().invoke(app, ["registry", "copy", source, target, "--json"])
    assert copied.exit_code == 0, copied.output
    assert json.loads(copied.stdout)["tasks"] >= 1
    registry = SqliteRegistry(Path(target) / "registry.sqlite")
    moved = registry.get_tenant("moving")
    assert moved is not None
    assert is_key(key, moved.keys[0].digest)
    assert registry.get_task("moving", "t") is not None
    registry.close()
    again = CliRunner().invoke(app, ["registry", "copy", source, source])
    assert (again.exit_code, "expected two places" in again.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("create", "No Name"), "a tenant is"),
        (("create", "x", "--limit", "weight=0"), "weight"),
        (("create", "x", "--limit", "speed=3"), "NAME=NUMBER"),
        (("create", "x", "--limit", "max_rows=many"), "max_rows must be a number or none"),
        (("rotate", "nobody"), "no tenant 'nobody'"),
        (("limits", "nobody"), "no tenant 'nobody'"),
        (("suspend", "nobody"), "no tenant 'nobody'"),
        (("rm", "nobody"), "no tenant 'nobody'"),
        (("rm", "default"), "default"),
    ],
)
def test_what_cannot_be_is_one_line(commands: Commands, arguments: tuple[str, ...], reason: str) -> None:
    error = commands.refused(*arguments)
    assert reason in error
    assert error.count("\n") == 1


def run_on(place: str, *arguments: str) -> Result:
    """On a Redis or a data folder."""
    option = "REDIS_URL" if "://" in place else "DATA_DIR"
    return CliRunner().invoke(app, ["tenant", *arguments], env={f"PREFIXSERVE_{option}": place})


@pytest.fixture(params=["folder", "redis"])
def empty_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where no registry is yet."""
    if request.param == "folder":
        yield str(tmp_path / "mistyped")
        return
    process = RedisProcess(tmp_path / "redis")
    process.start()
    yield process.url
    process.kill()


@pytest.mark.parametrize(
    "arguments", ["create x", "list", "limits default", "rotate default", "suspend default", "rm x"]
)
def test_what_is_no_registry_is_refused_and_left_as_it_is(empty_place: str, arguments: str) -> None:
    for _ in range(2):
        result = run_on(empty_place, *arguments.split())
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
        assert "no registry at" in result.stderr
        assert ("--create" in result.stderr) == (arguments not in ("list", "rm x"))  # which have no such option
    copied = CliRunner().invoke(app, ["registry", "copy", empty_place, empty_place + "2"])
    assert (copied.exit_code, "no registry at" in copied.stderr) == (1, True)
    if "://" not in empty_place:
        assert not Path(empty_place).exists()
        assert not Path(empty_place + "2").exists()


def test_create_makes_a_registry_and_says_which(empty_place: str) -> None:
    made = run_on(empty_place, "create", "north", "--create")
    assert made.exit_code == 0, made.output
    assert made.stdout.count("\n") == 1
    assert made.stdout.startswith("ps_")
    name = empty_place if "://" in empty_place else f"{empty_place}/registry.sqlite"
    assert f"registry {name}" in made.stderr
    listed = run_on(empty_place, "list", "--json")
    assert [each["name"] for each in json.loads(listed.stdout)] == ["north"]
    assert f"registry {name}" in listed.stderr
    assert f"(registry {name})" in run_on(empty_place, "rotate", "south").stderr


@pytest.mark.parametrize("content", [b"", b"not SQLite at all, but long enough to be looked at", "other tables"])
def test_a_file_that_is_no_registry_is_refused_unchanged(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "registry.sqlite"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    result = run_on(str(tmp_path), "create", "x")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
    assert str(path) in result.stderr
    assert path.read_bytes() == before


def test_a_redis_url_is_named_without_its_password() -> None:
    result = run_on("redis://user:secret@127.0.0.1:1/3", "list")
    assert result.exit_code == 1
    assert "redis://127.0.0.1:1/3" in result.stderr
    assert "secret" not in result.stderr


def test_it_is_said_whether_a_server_runs_on_the_registry(tmp_path: Path) -> None:
    place = str(tmp_path)
    assert "no server runs on it" in run_on(place, "create", "north", "--create").stderr
    with serving(tmp_path):
        assert ", a server runs on it" in run_on(place, "rotate", "north").stderr
    assert "no server runs on it" in run_on(place, "list").stderr
