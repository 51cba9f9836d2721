"""What was measured: a value a round, experiments of series taken in turn, and parts of experiments as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import Taken

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LOWER_IS_BETTER = ("ms", "s", "bytes", "MiB")


def number(value: float) -> str:
    """Three digits that count, or all before the point."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


@dataclass(frozen=True)
class Series:
    """Values of one thing, one a round, in order."""

    values: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def over(self, other: Series) -> Series:
        """The ratio of each round. Both have the same rounds."""
        return Series(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def best(self, unit: str) -> float:
        return min(self.values) if unit in LOWER_IS_BETTER else max(self.values)

    def __str__(self) -> str:
        """The median with the range."""
        if not self.values:
            return "n/a"
        if len(self.values) == 1:
            return number(self.values[0])
        return f"{number(self.median)} ({number(min(self.values))} to {number(max(self.values))})"


@dataclass(frozen=True)
class Bound:
    """A budget: series `of` over series `over` in each round (without one, `of` itself), its median held to a limit."""

    text: str
    of: str
    over: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def limit(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def is_met(self, median: float) -> bool:
        above = self.at_least is None or median >= self.at_least
        return above and (self.at_most is None or median <= self.at_most)


@dataclass(frozen=True)
class Experiment:
    """Series in `unit` that were measured in turn, round by round."""

    name: str
    title: str
    unit: str
    series: Mapping[str, Series]
    taken: Taken
    bounds: tuple[Bound, ...] = ()

    def bound_figure(self, bound: Bound) -> Series | None:
        """What a budget holds. None: a side of it was not measured."""
        of, over = self.series.get(bound.of), self.series.get(bound.over or bound.of)
        if of is None or over is None or not of.values or not over.values:
            return None
        return of if bound.over is None else of.over(over)

    def times_as_fast(self, ours: str, theirs: str) -> Series | None:
        a, b = self.series.get(ours), self.series.get(theirs)
        if a is None or b is None or not a.values or not b.values:
            return None
        return b.over(a) if self.unit in LOWER_IS_BETTER else a.over(b)


@dataclass
class Part:
    """The experiments of one script. Its JSON keeps what an earlier run measured and this one did not."""

    name: str
    experiments: dict[str, Experiment] = field(default_factory=dict)

    def keep(self, experiment: Experiment, folder: Path) -> None:
        """Add it, in place of one of its name, and write the JSON."""
        self.experiments[experiment.name] = experiment
        folder.mkdir(parents=True, exist_ok=True)
        body = {"experiments": [asdict(each) for each in self.experiments.values()]}
        (folder / f"{self.name}.json").write_text(json.dumps(body, indent=1) + "\n")


def read_part(name: str, folder: Path) -> Part:
    """The part as it was written last; empty if it never was."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return Part(name)
    found = [_experiment(each) for each in json.loads(path.read_text())["experiments"]]
    return Part(name, {each.name: each for each in found})


def in_turn(measures: Mapping[str, Callable[[int], float]], rounds: int, num_warm: int = 1) -> dict[str, Series]:
    """All of them each round, every second round backwards; the first rounds warm up and do not count. A measure is
    told the round, to ask for other texts in each."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(num_warm + rounds):
        names = list(measures) if turn % 2 == 0 else list(reversed(measures))
        for name in names:
            value = measures[name](turn)
            if turn >= num_warm:
                values[name].append(value)
    return {name: Series(tuple(found)) for name, found in values.items()}


def in_ms(seconds: Callable[[], float]) -> Callable[[int], float]:
    return lambda _: seconds() * 1e3


def _experiment(body: dict[str, Any]) -> Experiment:
    series = {name: Series(tuple(each["values"]), each["note"]) for name, each in body["series"].items()}
    bounds = tuple(Bound(**each) for each in body["bounds"])
    return Experiment(body["name"], body["title"], body["unit"], series, Taken(**body["taken"]), bounds)
