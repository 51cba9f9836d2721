"""What goes on beside requests outlives the server: what was used, and which prefixes were resident."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.api.upkeep import RESIDENTS_FILE
from server.model_files import ModelFiles
from server.start import make_state
from tests.conftest import NAME, Served, native, serve_in_thread, settings_for
from tests.waiting import eventually

ONE_PREFIX = 4096  # bytes on the device of a prefix in a block of 16 tokens


@contextmanager
def serving(data_dir: Path, model_path: Path, **settings: object) -> Iterator[Served]:
    server = serve_in_thread(make_state(settings_for(data_dir, **settings), ModelFiles(model_path, NAME)))
    try:
        yield next(server)
    finally:
        with pytest.raises(StopIteration):
            next(server)


def residency(served: Served, task: str) -> str:
    found: str = served.http.get(f"/v1/prefixes/{task}").json()["residency"]
    return found


def eventually_resident(served: Served, task: str) -> None:
    eventually(lambda: residency(served, task) == "resident")


def test_what_was_resident_is_loaded_again_the_hottest_first(model_path: Path, tmp_path: Path) -> None:
    with serving(tmp_path, model_path) as first:
        for i, task in enumerate(("cold", "warm", "hot")):
            assert first.put(task, native(70 + i)).status_code == 201
        for task in ("warm", "hot"):
            assert first.generate("x", task, max_new_tokens=1).status_code == 200
    with serving(tmp_path, model_path) as again:
        for task in ("warm", "hot"):
            eventually_resident(again, task)
        assert residency(again, "cold") == "cold"
    with serving(tmp_path, model_path, prefix_bytes=ONE_PREFIX) as small:
        eventually_resident(small, "hot")
        assert residency(small, "warm") == "cold"


@pytest.mark.parametrize("text", ["", "{", '{"residents": [["default", "gone", 1], [1], 7]}', '{"residents": 3}'])
def test_a_damaged_list_of_residents_costs_nothing_else(model_path: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / RESIDENTS_FILE).write_text(text)
    with serving(tmp_path, model_path) as served:
        assert served.generate("x", max_new_tokens=1).status_code == 200


def test_usage_outlives_the_server(model_path: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with serving(tmp_path, model_path) as served:
            assert served.generate("x", max_new_tokens=3, ignore_eos=True).status_code == 200
    with serving(tmp_path, model_path) as served:
        (row,) = served.http.get("/v1/usage").json()["usage"]
        assert (row["num_requests"], row["generated_tokens"]) == (2, 6)
