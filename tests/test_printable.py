"""No text of others moves a terminal: it is refused where it would be stored, and escaped where it is shown."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
import structlog
from typer.testing import CliRunner

from prefix_store.errors import InvalidTenantError
from prefix_store.printable import escaped, first_unprintable
from prefix_store.tenants import new_key
from server.cli import app
from server.logs import set_up_logs
from tests.conftest import NATIVE, Served, native

NASTY = {
    "an escape sequence": "\x1b[31mred\x1b]8;;http://evil\x07",
    "a carriage return": "good\rbad",
    "a line's end": "one\ntwo",
    "C1": "\x9b31m",
    "a direction override": "\u202egnp.exe",
    "an isolate": "\u2066x\u2069",
    "a line separator": "one\u2028two",
    "nothing to see": "a\u200bb",
    "a tag": "a\U000e0041b",
}
GOOD = "Filme über Käse, 映画\u3000と 🎬, [red]not red[/red] [link=http://x]y[/link] \u0645\u06cc\u200c\u062e"


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_what_is_not_printable_is_found_and_escaped(text: str) -> None:
    found = first_unprintable(text)
    assert found is not None
    assert found.startswith("U+")
    assert first_unprintable(escaped(text)) is None


def test_texts_of_all_languages_stay_as_they_are() -> None:
    assert first_unprintable(GOOD) is None
    assert escaped(GOOD) == GOOD


def test_a_lone_surrogate_can_be_shown() -> None:
    assert escaped("a\ud800b") == "a\\ud800b"
    assert first_unprintable("a\ud800b") == "U+D800 at character 2"


class TestStored:
    @pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
    def test_a_note_is_refused_by_field_and_character(self, served: Served, text: str) -> None:
        refused = served.http.put(
            f"/v1/prefixes/noted?note={quote(text)}", content=native(1), headers={"Content-Type": NATIVE}
        )
        assert refused.status_code == 422, refused.text
        assert refused.json()["detail"] == (f"note must be printable text on one line, got {first_unprintable(text)}")
        assert served.http.get("/v1/prefixes/noted").status_code == 404

    def test_a_note_in_any_language_is_kept(self, served: Served) -> None:
        assert served.put("noted", native(1), note=GOOD).status_code == 201
        assert served.http.get("/v1/prefixes/noted").json()["versions"][0]["note"] == GOOD
        shown = CliRunner().invoke(app, ["show", "noted", "--url", served.url]).stdout
        assert "[red]not red[/red] [link=http://x]y[/link]" in shown
        assert served.http.delete("/v1/prefixes/noted").status_code == 204

    @pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
    def test_a_pattern_of_a_key_is_refused(self, text: str) -> None:
        with pytest.raises(InvalidTenantError, match="tasks must be patterns of printable characters, got U\\+"):
            new_key(["generate"], 1.5, tasks=[text])

    @pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
    def test_a_base_that_a_file_names_is_refused(self, served: Served, text: str) -> None:
        refused = served.put("based", native(1, base_model=text))
        assert (refused.status_code, "__metadata__.base_model" in refused.text) == (422, True)
        config = json.dumps({"peft_type": "PROMPT_TUNING", "base_model_name_or_path": text})
        parts = {"adapter_config.json": config.encode(), "adapter_model.safetensors": b"x"}
        refused = served.http.put("/v1/prefixes/based", files=parts)
        assert refused.status_code == 422
        assert first_unprintable(text) in refused.json()["detail"]  # type: ignore[operator]


class TestShown:
    @pytest.fixture
    def stored(self, served: Served) -> str:
        """A task whose note was stored before notes were checked."""
        assert served.put("old", native(1)).status_code in (200, 201)

        def spoil(draft: object) -> None:
            task = draft.present("old")  # type: ignore[attr-defined]
            note = "".join(NASTY.values()) + "[red]x[/red]"
            draft.put(replace(task, versions=(replace(task.versions[0], note=note),)))  # type: ignore[attr-defined]

        served.state.registry.change("default", spoil)
        return "old"

    @pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
    @pytest.mark.parametrize("command", [["show", "old"], ["show", "old@1"], ["list"]])
    def test_what_was_stored_before_is_escaped(
        self, served: Served, stored: str, command: list[str], more: list[str]
    ) -> None:
        shown = CliRunner().invoke(app, [*command, *more, "--url", served.url])
        assert shown.exit_code == 0, shown.output
        for line in shown.stdout.splitlines():
            assert first_unprintable(line) is None, line
        if command[0] == "show":
            assert "[red]x[/red]" in shown.stdout
            assert "u202e" in shown.stdout
        if more and command == ["show", "old@1"]:
            assert json.loads(shown.stdout)["note"].startswith(NASTY["an escape sequence"])

    def test_a_refusal_of_a_server_is_escaped(self, served: Served, tmp_path: Path) -> None:
        file = tmp_path / "\x1b[31m.safetensors"
        file.write_bytes(native(1))
        for arguments in (["show", "\x1b[31m"], ["push", "x", f"{file}x"], ["push", "UP\u202e", str(file)]):
            command = [sys.executable, "-m", "server", *arguments, "--url", served.url]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert [first_unprintable(line) for line in done.stderr.splitlines()] == [None], done.stderr

    def test_error_bodies_are_escaped(self, served: Served) -> None:
        for body in (
            {"inputs": "x", "parameters": {"\x1b[31m\u202e": 1}},
            {"inputs": "x", "parameters": {"truncate": "\x9b\u202e"}},
        ):
            refused = served.http.post("/generate", json=body)
            assert refused.status_code == 422
            assert first_unprintable(refused.json()["error"]) is None

    def test_logs_are_escaped(self, capsys: pytest.CaptureFixture[str]) -> None:
        before = structlog.get_config()
        try:
            set_up_logs(log_json=False)
            try:
                raise ValueError("\x1b[2J")
            except ValueError:
                structlog.get_logger().error("failed", reason="".join(NASTY.values()), exc_info=True)
        finally:
            structlog.configure(**before)
        lines = capsys.readouterr().err.splitlines()
        coloured = "".join(lines)
        assert "\x1b]8" not in coloured
        assert "\x1b[2J" not in coloured
        assert "\u202e" not in coloured
        assert any("Traceback" in line for line in lines), "a traceback keeps its lines"
