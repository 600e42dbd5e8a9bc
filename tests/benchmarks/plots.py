"""A picture per family: medians as bars, least and most as whiskers, bars to reach as dashed lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from tests.benchmarks.figures import Figure
from tests.benchmarks.report import number

INCHES_PER_BAR = 0.28
COLOURS = {None: "#4c78a8", True: "#54a24b", False: "#e45756"}  # no bar, reached, not reached


def plot(family: str, figures: Sequence[Figure], out: Path) -> None:
    """Writes a PNG; figures of one unit share a scale."""
    units = list(dict.fromkeys(figure.unit for figure in figures))
    groups = [[figure for figure in figures if figure.unit == unit] for unit in units]
    heights = [len(group) + 2 for group in groups]
    canvas = Canvas(figsize=(11, INCHES_PER_BAR * sum(heights) + 1), layout="constrained")
    canvas.suptitle(family.replace("_", " "))
    axes = canvas.subplots(len(groups), 1, height_ratios=heights, squeeze=False)
    for (axis,), unit, group in zip(axes, units, groups, strict=True):
        _draw(axis, unit, group)
    canvas.savefig(out, dpi=110)


def _draw(axis: Axes, unit: str, figures: Sequence[Figure]) -> None:
    medians = [figure.median for figure in figures]
    whiskers = [
        [figure.median - min(figure.values) for figure in figures],
        [max(figure.values) - figure.median for figure in figures],
    ]
    places = range(len(figures))
    colours = [COLOURS[figure.is_reached] for figure in figures]
    axis.barh(places, medians, xerr=whiskers, color=colours, ecolor="#444444", capsize=2, height=0.7)
    axis.set_yticks(places, [figure.name for figure in figures], fontsize=8)
    axis.set_ylim(len(figures) - 0.4, -0.6)
    axis.set_xlabel(unit, fontsize=8)
    axis.margins(x=0.12)
    for place, figure in enumerate(figures):
        axis.annotate(
            f" {number(figure.median)}",
            (max(figure.values), place),
            va="center",
            fontsize=7,
        )
        if figure.bar is not None:
            axis.vlines(figure.bar.limit, place - 0.45, place + 0.45, colors="black", linestyles="dashed")
