"""Plots of parts: bars of what was measured together, lines of what grows. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from figures import Experiment, Part
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANEL = (4.2, 3.2)  # inches


def draw_bars(part: Part, path: Path) -> None:
    """A panel an experiment, a bar a series, with its range."""
    shown = [each for each in part.experiments.values() if any(series.values for series in each.series.values())]
    figure, panels = _panels(len(shown))
    for panel, experiment in zip(panels, shown, strict=True):
        _bars(panel, experiment)
    figure.savefig(path, dpi=110)


def draw_growth(part: Part, path: Path) -> None:
    """A panel an experiment, whose series are named by their place on the x axis: a line with its range."""
    figure, panels = _panels(len(part.experiments))
    for panel, experiment in zip(panels, part.experiments.values(), strict=True):
        places = [float(name.replace(",", "")) for name in experiment.series]
        every = list(experiment.series.values())
        panel.plot(places, [series.median for series in every], marker="o")
        lows, highs = [min(series.values) for series in every], [max(series.values) for series in every]
        panel.fill_between(places, lows, highs, alpha=0.2)
        panel.set_xscale("log")
        panel.set_xticks(places, list(experiment.series))
        panel.minorticks_off()
        panel.set_ylim(0, 1.1 * max(highs))
        panel.set_xlabel(experiment.title, fontsize=8)
        _label(panel, experiment)
    figure.savefig(path, dpi=110)


def _bars(panel: Axes, experiment: Experiment) -> None:
    measured = {name: series for name, series in experiment.series.items() if series.values}
    medians = [series.median for series in measured.values()]
    below = [series.median - min(series.values) for series in measured.values()]
    above = [max(series.values) - series.median for series in measured.values()]
    panel.barh(list(measured), medians, xerr=(below, above), color=[f"C{i}" for i in range(len(measured))])
    panel.invert_yaxis()
    _label(panel, experiment)


def _label(panel: Axes, experiment: Experiment) -> None:
    panel.set_title(f"{experiment.name} ({experiment.unit})", fontsize=9)
    panel.tick_params(labelsize=7)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, list(panels[:count])
