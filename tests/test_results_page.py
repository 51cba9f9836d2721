"""The results page: every figure and verdict on it comes from the JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

LOAD_TESTS = Path(__file__).parents[1] / "load_tests"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when one of them is run: their folder is first on the path."""
    monkeypatch.syspath_prepend(str(LOAD_TESTS))


def keep(folder: Path, *, ours: tuple[float, ...], theirs: tuple[float, ...]) -> None:
    from figures import Bound, Experiment, Series, read_part
    from machine import taken_now

    series = {"prefixserve": Series(ours), "PEFT": Series(theirs, "4 of the requests"), "other": Series((), "missing")}
    against = {"PEFT": 12, "other": 1}
    bounds = tuple(Bound(f"against {name}", "prefixserve", name, at_least=limit) for name, limit in against.items())
    part = read_part("peers", folder)
    part.keep(Experiment("zipf", "64 requests", "tokens/s", series, taken_now(False), bounds), folder)


def lines(folder: Path) -> list[str]:
    from figures import read_part
    from results import page

    return list(page([read_part("peers", folder), read_part("limit", folder)], {}, folder.name))


def test_verdicts_follow_the_figures(tmp_path: Path) -> None:
    keep(tmp_path, ours=(1200, 1300, 1400), theirs=(100, 100, 100))
    assert "| against PEFT | 13.0 (12.0 to 14.0)x | >= 12x | met |" in lines(tmp_path)
    keep(tmp_path, ours=(1200, 1100, 1000), theirs=(100, 100, 100))
    assert "| against PEFT | 11.0 (10.0 to 12.0)x | >= 12x | **not met** |" in lines(tmp_path)


def test_ratios_are_of_rounds_not_of_medians(tmp_path: Path) -> None:
    keep(tmp_path, ours=(10, 20, 90), theirs=(1, 4, 30))
    assert "| 64 requests | 5.00 (3.00 to 10.0) | n/a |" in lines(tmp_path)


def test_a_peer_that_is_missing_is_named(tmp_path: Path) -> None:
    keep(tmp_path, ours=(1.0,), theirs=(1.0,))
    found = lines(tmp_path)
    assert "- other: missing (zipf)" in found
    assert "| 64 requests | 1.00 | 1.00 | n/a |" in found


def test_a_part_that_was_run_again_keeps_the_rest(tmp_path: Path) -> None:
    from figures import Experiment, Series, read_part
    from machine import taken_now

    keep(tmp_path, ours=(1.0,), theirs=(1.0,))
    single = Experiment("single", "one request", "tokens/s", {"prefixserve": Series((2.0,))}, taken_now(False))
    read_part("peers", tmp_path).keep(single, tmp_path)
    keep(tmp_path, ours=(3.0,), theirs=(1.0,))
    found = read_part("peers", tmp_path).experiments
    assert found["single"].series["prefixserve"].values == (2.0,)
    assert found["zipf"].series["prefixserve"].values == (3.0,)
