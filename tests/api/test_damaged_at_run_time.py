"""A registry whose file is damaged while the server runs, or behind what a start reads first: a line, no traceback."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from prefix_store.sqlite_registry import SqliteRegistry
from server.api import upkeep
from server.cli import app
from tests.conftest import native, serving, settings_for

PAGE = 4096
PROMPT = "A fine film."


def spoil(path: Path, table: str | None = None) -> None:
    """The first page of a table, or all pages but the first, which has the schema."""
    first, num_pages = 2, path.stat().st_size // PAGE - 1
    if table is not None:
        db = sqlite3.connect(path)
        first, num_pages = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0], 1
        db.close()
    with path.open("r+b") as file:
        file.seek((first - 1) * PAGE)
        file.write(b"\xff" * num_pages * PAGE)


def test_damage_while_the_server_runs_is_503_and_one_line(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "FLUSH_S", 0.1)
    settings = settings_for(tmp_path)
    with serving(settings, model_path) as served:
        assert served.put("t", native(1)).status_code == 201
    SqliteRegistry(tmp_path / "registry.sqlite").close()  # what is in the file beside it comes into the file
    with capture_logs() as logs, serving(settings, model_path) as served:
        spoil(tmp_path / "registry.sqlite")
        num_before = len(logs)
        answers = [
            served.http.get("/v1/audit"),
            served.http.get("/v1/usage"),
            served.put("u", native(2)),
            served.http.delete("/v1/prefixes/t"),
        ]
        assert [answer.status_code for answer in answers] == [503] * len(answers), [each.text for each in answers]
        assert all(answer.json()["detail"] == "the registry is damaged" for answer in answers)
        assert served.generate(PROMPT, max_new_tokens=1).status_code == 200
        refused = [line for line in logs[num_before:] if line["event"] == "refused"]
        assert len(refused) == len(answers)
        assert all("registry.sqlite: expected a registry's SQLite file" in line["reason"] for line in refused)
    assert not [line for line in logs if line.get("exc_info")]


@pytest.mark.parametrize("table", ["tenants", "entries", "task_documents", "identities"])
def test_damage_that_a_start_meets_late_is_one_line(table: str, model_path: Path, tmp_path: Path) -> None:
    with serving(settings_for(tmp_path), model_path) as served:
        assert served.put("t", native(1)).status_code == 201
        served.state.store.set_pinned("default", "t", True)
    spoil(tmp_path / "registry.sqlite", table)
    done = CliRunner().invoke(app, ["serve", "--data-dir", str(tmp_path), "--model", str(model_path), "--port", "0"])
    assert (done.exit_code, "Traceback" in done.output) == (1, False), done.output
    assert "registry.sqlite: expected a registry's SQLite file" in done.output.splitlines()[-1]
