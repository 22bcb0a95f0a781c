"""Plots of a comparison as SVG: bars of the headline, k-NN over k, other numbers as dots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinoscale.reports.comparison.scores import Comparison, Kind, Row
from dinoscale.reports.html import Plot, drawing, finish_plot, printable

WIDTH = 6.4  # inches
LINE = 0.3  # inches of height for a bar or a line of dots
BORDER = 0.85  # inches above and below the bars
_UNITS = {"rank": "directions"}  # of a score, where it is not percent
FEW = 2  # numbers of a score that need no separate plot; of videos only one
_WEIGHTS = matplotlib.colormaps["tab10"]
_COLORS = {"untrained": "#8c8c8c", "floor": "#b8b8b8"}


@dataclass(frozen=True)
class _Line:
    """A row of the table, with its color."""

    label: str
    kind: Kind
    color: Any
    headline: float
    parts: Mapping[str, float]  # of the score: names -> values


def draw_column(comparison: Comparison, number: int) -> list[Plot]:
    """Draw a column of the table; no plots if it has no numbers."""
    column = comparison.columns[number]
    lines = [
        _line(row, number, place, task=column.task)
        for place, row in enumerate(comparison.rows)
        if number in row.cells and row.cells[number].scores
    ]
    if not lines:
        return []
    unit = _UNITS.get(column.task, "%")
    with drawing():
        plots = [_bars(lines, f"{column.task}: {column.headline}, {unit}")]
        parts = {part: None for line in lines for part in line.parts}
        if column.task == "knn":
            plots.append(_over_k(lines))
        elif len(parts) > (1 if column.task == "video" else FEW):
            what = "by sequence, J&F" if column.task == "video" else "all numbers"
            plots.append(_dots(lines, list(parts), f"{column.task}: {what}, {unit}"))
    return plots


def _line(row: Row, number: int, place: int, *, task: str) -> _Line:
    cell = row.cells[number]
    color = _COLORS.get(row.kind) or _WEIGHTS(place % 10)
    parts: Mapping[str, float] = cell.scores[0]
    if task == "video":
        parts = _sequences(cell.report) if cell.report else {}
    # matplotlib leaves labels that begin with an underscore out of legends.
    return _Line(printable(f" {row.label}")[:60], row.kind, color, cell.headlines[0], parts)


def _sequences(report: Mapping[str, Any]) -> dict[str, float]:
    """J&F of every scored video."""
    found = [sequence for sequence in report.get("sequences", ()) if sequence.get("score")]
    return {
        printable(str(sequence["sequence"]))[:40]: sequence["score"]["J&F"] for sequence in found
    }


def _bars(lines: list[_Line], caption: str) -> Plot:
    figure, axes = _axes(len(lines))
    for place, line in enumerate(lines):
        axes.barh(place, line.headline, color=line.color, height=0.65)
        axes.annotate(
            f"{line.headline:.1f}",
            (line.headline, place),
            (3, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    axes.set_xlim(0, 1.12 * max(1.0, *(line.headline for line in lines)))
    axes.invert_yaxis()
    return finish_plot(figure, caption)


def _over_k(lines: list[_Line]) -> Plot:
    figure, axes = _axes(7)
    shown = set[int]()
    for line in lines:
        points = {
            int(found[1]): value
            for name, value in line.parts.items()
            if (found := re.fullmatch(r"top1_k([1-9]\d{0,8})", name))
        }
        ks = sorted(points)
        shown.update(ks)
        style = {"weights": "-", "untrained": "--", "floor": ":"}[line.kind]
        values = [points[k] for k in ks]
        axes.plot(ks, values, style, marker="o", color=line.color, label=line.label)
    axes.set_xscale("log")
    axes.set_xticks(sorted(shown), [str(k) for k in sorted(shown)])
    axes.minorticks_off()
    axes.set_xlabel("neighbours k")
    axes.grid(axis="y", linewidth=0.4)
    _legend(axes)
    return finish_plot(figure, "knn: top-1 over k, %")


def _dots(lines: list[_Line], parts: list[str], caption: str) -> Plot:
    """A line for each number of the score, with a dot for each row."""
    figure, axes = _axes(len(parts))
    for line in lines:
        places = [place for place, part in enumerate(parts) if part in line.parts]
        values = [line.parts[parts[place]] for place in places]
        marker = {"weights": "o", "untrained": "s", "floor": "|"}[line.kind]
        if values:
            (dots,) = axes.plot(values, places, marker, color=line.color, label=line.label)
            dots.set(alpha=0.85, markersize=8, markeredgewidth=1.5)
    axes.set_yticks(range(len(parts)), [f" {part}" for part in parts])
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.grid(axis="y", linewidth=0.4)
    _legend(axes)
    return finish_plot(figure, caption)


def _axes(lines: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, BORDER + LINE * lines), layout="constrained")
    return figure, figure.add_subplot()


def _legend(axes: Axes) -> None:
    axes.figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
