"""Another model on a data folder: every place that shows tasks says which of them it cannot serve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from server.cli import app
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, OPERATOR_KEY, Served, make_tenant, native, serve_in_thread, settings_for, write_key

LINE = "tasks_stored_for_another_model_answer_409"


@pytest.fixture(scope="module")
def data_dir(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of the tiny model, two of them live, and one of a tenant's."""
    folder = tmp_path_factory.mktemp("data")
    write_key(folder / "operator.key", OPERATOR_KEY)
    settings = settings_for(folder, operator_key_file=folder / "operator.key")
    with capture_logs() as lines:
        for served in serve_in_thread(make_state(settings, ModelFiles(model_path, NAME))):
            operator = served.as_key(OPERATOR_KEY)
            for task, live in (("a", "auto"), ("b", "auto"), ("c", "false")):
                assert operator.put(task, native(1), activate=live).status_code == 201
            assert make_tenant(operator, "north").put("theirs", native(1)).status_code == 201
            assert gauges(operator) == {"prefixserve_tasks": 4, "prefixserve_tasks_incompatible": 0}
    assert LINE not in [line["event"] for line in lines]
    return folder


def gauges(served: Served) -> dict[str, float]:
    lines = served.http.get("/metrics").text.splitlines()
    found = (line.split(" ") for line in lines if line.startswith("prefixserve_tasks"))
    return {name: float(value) for name, value in found}


@pytest.fixture(scope="module")
def another(data_dir: Path, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Another model of the same sizes on that folder, asked by its operator."""
    path = tmp_path_factory.mktemp("other") / NAME
    shutil.copytree(model_path, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    settings = settings_for(data_dir, operator_key_file=data_dir / "operator.key")
    with capture_logs() as lines:
        for served in serve_in_thread(make_state(settings, ModelFiles(path, NAME))):
            (line,) = [line for line in lines if line["event"] == LINE]
            assert (line["incompatible"], line["tasks"], line["log_level"]) == (3, 4, "warning")
            yield served.as_key(OPERATOR_KEY)


def test_every_place_shows_what_another_model_cannot_serve(another: Served) -> None:
    listed = another.http.get("/v1/prefixes").json()["prefixes"]
    assert {one["task"]: one["status"] for one in listed} == {"a": "incompatible", "b": "incompatible", "c": "ok"}
    assert another.http.get("/v1/prefixes/a").json()["status"] == "incompatible"
    found = another.http.get("/info").json()
    assert (found["tasks"], found["tasks_incompatible"]) == (4, 3)
    assert [one["id"] for one in another.http.get("/v1/models").json()["data"]] == [NAME]
    assert gauges(another) == {"prefixserve_tasks": 4, "prefixserve_tasks_incompatible": 3}
    refused = another.generate("x", "a")
    assert (refused.status_code, "was stored for tiny" in refused.json()["error"]) == (409, True)


def test_a_tenant_sees_the_counts_of_its_own_tasks(another: Served) -> None:
    tenant = make_tenant(another, "south")
    found = tenant.http.get("/info").json()
    assert (found["tasks"], found["tasks_incompatible"]) == (0, 0)


def test_list_says_how_many_answer_409(another: Served) -> None:
    result = CliRunner().invoke(app, ["list", "--url", another.url, "--api-key", OPERATOR_KEY])
    assert "2 of 3 tasks were stored for another model than the served one: they answer 409" in result.stderr
    assert result.stdout.count("incompatible") == 2


def test_counts_follow_uploads_and_deletions(another: Served) -> None:
    assert another.put("b", native(7)).status_code == 201
    assert gauges(another)["prefixserve_tasks_incompatible"] == 2
    assert [one["id"] for one in another.http.get("/v1/models").json()["data"]] == [NAME, "b"]
    another.http.delete("/v1/prefixes/a")
    assert gauges(another) == {"prefixserve_tasks": 3, "prefixserve_tasks_incompatible": 1}
    another.http.post("/v1/prefixes/b/activate", json={"version": "previous"})
    assert gauges(another)["prefixserve_tasks_incompatible"] == 2
