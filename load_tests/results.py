"""The results page and its plots, made from the JSON that the scripts write.

    python load_tests/results.py        # again, from what is there

Every figure and every verdict on `docs/results.md` is computed from `docs/results/*.json`; a machine of another kind
has a folder of its own (`--results docs/results-avx2`).
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from figures import RESULTS, Bound, Experiment, Part, Series, number, read_part
from machine import Taken, taken_now
from rich.console import Console
from rich.table import Table

PEERS, LIMIT, BUDGETS, BUSY, GROWTH, QUALITY = "peers", "limit", "budgets", "busy", "growth", "quality"
OURS, REORDERED = "prefixserve", "reordered"
INTROS = {
    PEERS: (
        "Against peers",
        "The same seeded requests through each, warm, in turn, round by round; greedy, EOS ignored, 32 tokens in and "
        "32 out unless said. Ours go over HTTP from another process. Medians with the range, whose "
        "better end is the best of the rounds; then how many times as fast as each peer we are, round by round.",
    ),
    LIMIT: (
        "The machine's limit",
        "The model's matrix products alone against its step (batch building included, sampling apart), at context 64. "
        "Activations of the int8 products are 8-bit already. Then how many times as fast as each the "
        "reordered products are.",
    ),
    BUDGETS: ("What the budgets are read from", "Each pair in turn, round by round; medians with the range."),
    BUSY: (
        "Beside busy processes",
        "Tokens a second of model steps at context 64, alone and beside processes that compute without end: with the "
        "threads of a step adapted, as the server does, and fixed at all cores. Medians with the range.",
    ),
    GROWTH: ("Growth", "Tokens a second over HTTP, 32 in and 32 out; medians with the range."),
    QUALITY: (
        "Quality in 8 bits",
        "The example prefixes over HTTP, their 200 held-back texts each: the share of good answers.",
    ),
}
REFERENCES = {PEERS: OURS, LIMIT: REORDERED}
SAMPLING = "sampling"  # beside the step, not a form of it
Lines = Iterator[str]


@dataclass
class Run:
    """One run of one script: what it measures is written as it comes."""

    part: Part
    rounds: int
    is_quick: bool
    folder: Path

    @classmethod
    def of(cls, name: str, arguments: argparse.Namespace) -> Run:
        return cls(read_part(name, arguments.results), arguments.rounds, arguments.quick, arguments.results)

    def keep(
        self, name: str, title: str, unit: str, series: Mapping[str, Series], bounds: tuple[Bound, ...] = ()
    ) -> None:
        experiment = Experiment(name, title, unit, series, taken_now(self.is_quick), bounds)
        self.part.keep(experiment, self.folder)
        Console().print(_terminal_table(experiment))

    def finish(self) -> None:
        write_page(self.folder)


def options(parser: argparse.ArgumentParser, rounds: int) -> argparse.Namespace:
    """What every script takes, parsed; `given` is the same for another script."""
    parser.add_argument("--rounds", type=int, help=f"{rounds} unless --quick")
    parser.add_argument("--quick", action="store_true", help="a smoke run of small sizes: its figures mean nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of JSON and plots")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: servers and peers end with us
    rounds_given = ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    quick_given = ["--quick"] if arguments.quick else []
    arguments.given = ["--results", str(arguments.results), *rounds_given, *quick_given]
    arguments.rounds = arguments.rounds or (2 if arguments.quick else rounds)
    return arguments


def write_page(folder: Path) -> None:
    """`folder.md` beside the folder, and the plots in it."""
    parts = [read_part(name, folder) for name in INTROS]
    plots = _draw(parts, folder) if find_spec("matplotlib") else {}
    folder.with_suffix(".md").write_text("\n".join(page(parts, plots, folder.name)) + "\n")


def page(parts: Iterable[Part], plots: Mapping[str, str], folder: str) -> Lines:
    """The lines of the page. `plots` are paths of images by part, `folder` the name of the one that the JSON is in."""
    parts = [part for part in parts if part.experiments]
    experiments = [experiment for part in parts for experiment in part.experiments.values()]
    yield "# Results"
    yield ""
    processors = {_hardware(experiment.taken)[:2] for experiment in experiments}
    yield "; ".join(f"{processor}, native: {native}" for processor, native in sorted(processors)) + "."
    yield ""
    yield (
        f"Made by `load_tests/results.py` from `docs/{folder}/*.json`; `python load_tests/peers.py --all` measures all "
        "of it again. `prefixserve` without options computes in bf16 where that is native, else in fp32."
    )
    if any(experiment.taken.is_quick for experiment in experiments):
        yield ""
        yield "**Parts of this are from a smoke run (`--quick`): their figures mean nothing.**"
    yield from _budgets(experiments)
    for part in parts:
        title, intro = INTROS[part.name]
        yield from ("", f"## {title}", "", intro, "")
        if part.name in plots:
            yield from (f"![{title}]({plots[part.name]})", "")
        yield from _grids(part, REFERENCES[part.name]) if part.name in REFERENCES else _list(part)
        yield from _notes(part)
    yield from _taken(parts)


def _budgets(experiments: Iterable[Experiment]) -> Lines:
    yield from ("", "## Budgets", "", "| budget | figure | held to | |", "|---|---|---|---|")
    for experiment in experiments:
        for bound in experiment.bounds:
            figure = experiment.bound_figure(bound)
            if figure is None:
                yield f"| {bound.text} | not measured | {bound.limit} | |"
                continue
            unit = "x" if bound.over else f" {experiment.unit}"
            verdict = "met" if bound.is_met(figure.median) else "**not met**"
            yield f"| {bound.text} | {figure}{unit} | {bound.limit}{unit} | {verdict} |"


def _grids(part: Part, reference: str) -> Lines:
    """For every unit a line an experiment, a column a series; then the same of ratios to the reference."""
    for unit in dict.fromkeys(each.unit for each in part.experiments.values()):
        those = [each for each in part.experiments.values() if each.unit == unit]
        names = list(dict.fromkeys(name for each in those for name in each.series))
        yield from _grid(unit, names, {each.title: [each.series.get(name) for name in names] for each in those})
        others = [name for name in names if name not in (reference, SAMPLING)]
        if reference in names:
            ratios = {each.title: [each.times_as_fast(reference, name) for name in others] for each in those}
            yield from _grid(f"{reference}, times as fast as", others, ratios)


def _grid(corner: str, columns: list[str], rows: Mapping[str, list[Series | None]]) -> Lines:
    yield f"| {corner} | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for title, cells in rows.items():
        yield f"| {title} | {' | '.join('n/a' if cell is None else str(cell) for cell in cells)} |"
    yield ""


def _list(part: Part) -> Lines:
    yield "| | | median (range) | unit |"
    yield "|---|---|---|---|"
    for experiment in part.experiments.values():
        for i, (name, series) in enumerate(experiment.series.items()):
            yield f"| {'' if i else experiment.title} | {name} | {series} | {experiment.unit} |"
    yield ""


def _notes(part: Part) -> Lines:
    """What was said of series, each once, with the experiments that it was said in."""
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for experiment in part.experiments.values():
        for name, series in experiment.series.items():
            if series.note:
                found[name, series.note].append(experiment.name)
    for (name, note), where in found.items():
        yield f"- {name}: {note} ({', '.join(where)})"


def _taken(parts: Iterable[Part]) -> Lines:
    """A line for all experiments of a part that have the machine and the commit in common."""
    yield from ("", "## Taken on", "")
    yield "| | date | commit | rounds | processor | native | versions |"
    yield "|---|---|---|---|---|---|---|"
    for part in parts:
        found: defaultdict[tuple[str, ...], list[Experiment]] = defaultdict(list)
        for experiment in part.experiments.values():
            taken = experiment.taken
            found[taken.commit, "smoke" if taken.is_quick else "", *_hardware(taken)].append(experiment)
        for (commit, smoke, *hardware), those in found.items():
            names = ", ".join(each.name for each in those)
            dates = sorted({each.taken.date for each in those})
            date = " to ".join(dict.fromkeys((dates[0], dates[-1]))) + (f" ({smoke})" if smoke else "")
            rounds = sorted({len(series.values) for each in those for series in each.series.values()} - {0})
            counts = ", ".join(map(str, rounds))
            yield f"| {part.name}: {names} | {date} | {commit} | {counts} | {' | '.join(hardware)} |"


def _hardware(taken: Taken) -> tuple[str, str, str]:
    return (
        f"{taken.processor}, {taken.num_cores} cores, {taken.memory_gib} GiB",
        ", ".join(taken.native) or "neither bf16 nor VNNI",
        ", ".join(f"{name} {version}" for name, version in taken.versions.items()),
    )


def _terminal_table(experiment: Experiment) -> Table:
    table = Table("", experiment.unit, "best", "note", title=experiment.title, title_justify="left")
    for name, series in experiment.series.items():
        best = number(series.best(experiment.unit)) if series.values else ""
        table.add_row(name, str(series), best, series.note)
    for bound in experiment.bounds:
        figure = experiment.bound_figure(bound)
        if figure is not None:
            verdict = "met" if bound.is_met(figure.median) else "not met"
            table.add_row(bound.text, str(figure), bound.limit, verdict)
    return table


def _draw(parts: Iterable[Part], folder: Path) -> dict[str, str]:
    import matplotlib

    matplotlib.use("Agg")
    from plots import draw_bars, draw_growth

    found = {}
    for part in parts:
        draw = {PEERS: draw_bars, LIMIT: draw_bars, GROWTH: draw_growth}.get(part.name)
        if draw is not None and part.experiments:
            draw(part, folder / f"{part.name}.png")
            found[part.name] = f"{folder.name}/{part.name}.png"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    write_page(parser.parse_args().results)
