"""Axes, legends and colors for plots of sweeps; logarithmic axes have plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dinoscale.reports.html import Plot, finish_plot, printable
from dinoscale.scaling.laws.laws import Band, Interval, Numbers
from dinoscale.scaling.number_text import number

WIDTH, HEIGHT = 5.0, 3.2  # inches, the height without its legend: two plots fit side by side
LEGEND_LINE, LEGEND_COLUMNS = 0.2, 4
LABELS = 8  # most entries of one kind in a legend; evenly chosen if there are more
TICKS = (3, 7)  # fewest and most ticks on an axis
MARGIN = 0.15  # fraction of the range of the points by which a law may leave it
_ROUND = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))  # per decade
_SIZES = (
    matplotlib.colormaps["viridis"],
    0.0,
    0.85,
)  # without the end that is too light for a white page
_OTHERS = matplotlib.colormaps["plasma"], 0.1, 0.85
LAW: dict[str, Any] = {"color": "#333333", "linewidth": 1.3, "linestyle": "--"}
POINT: dict[str, Any] = {
    "marker": "o",
    "markersize": 4.5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.5,
}
STAR: dict[str, Any] = {
    **{"marker": "*", "markersize": 11, "linestyle": "", "zorder": 4},
    **{"markeredgecolor": "black", "markeredgewidth": 0.6},
}
HOLLOW: dict[str, Any] = {
    "marker": "o",
    "markersize": 4.5,
    "markerfacecolor": "white",
    "linestyle": "",
}


def size_colors(sizes: Iterable[float]) -> dict[float, Any]:
    """A color for each number of parameters, from dark to light."""
    return _colors(sizes, *_SIZES)


def group_colors(groups: Iterable[float]) -> dict[float, Any]:
    """A color for each number of images or budget, from another colormap."""
    return _colors(groups, *_OTHERS)


def _colors(values: Iterable[float], colormap: Any, first: float, last: float) -> dict[float, Any]:
    ordered = sorted(set(values))
    places = np.linspace(first, last, max(len(ordered), 2))
    return {value: colormap(place) for value, place in zip(ordered, places, strict=False)}


def labelled(values: Iterable[float]) -> set[float]:
    """The values that a legend names."""
    ordered = sorted(set(values))
    places = np.linspace(0, len(ordered) - 1, min(len(ordered), LABELS)).round().astype(int)
    return {ordered[place] for place in places}


def start(x: str, y: str, *, positive: Sequence[float]) -> tuple[Figure, Axes]:
    """A figure with one plot; y is logarithmic if all its values are positive."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    if positive and min(positive) > 0:
        axes.set_yscale("log")
    axes.set_xlabel(printable(x))
    axes.set_ylabel(printable(y)[:50])
    axes.grid(linewidth=0.3, color="#cccccc")
    axes.set_axisbelow(True)
    return figure, axes


def draw_band(axes: Axes, x: Numbers, band: Band, label: str, **style: Any) -> None:
    """Draw a law, with its interval where both ends are finite.

    Call it after drawing all points: it extends their range only a little.

    Args:
        axes: axes of the plot.
        x: grid, (n,).
        band: the law on the grid.
        label: label in the legend.
        style: style of the line.
    """
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        reach = (high / low) ** MARGIN
        lowest, highest = low / reach, high * reach
    else:
        reach = (high - low) * MARGIN
        lowest, highest = low - reach, high + reach
    inside = (band.value >= lowest) & (band.value <= highest)
    values = np.where(inside, band.value, np.nan)
    bounded = np.isfinite(band.low) & np.isfinite(band.high)
    lows, highs = (np.clip(ends, lowest, highest) for ends in (band.low, band.high))
    axes.plot(x, values, label=label, zorder=1.5, **{**LAW, **style})
    color = style.get("color", LAW["color"])
    axes.fill_between(x, lows, highs, where=bounded, color=color, alpha=0.13, linewidth=0, zorder=1)
    drawn = [float(value) for value in values[inside]]
    axes.set_ylim(min([low, *drawn]), max([high, *drawn]))


def draw_minima(
    axes: Axes, curves: Sequence[tuple[Numbers, Interval | None]], colors: Sequence[Any]
) -> None:
    """Draw stars at the minima of parabolas over ln x.

    Args:
        axes: axes of the plot.
        curves: coefficients, highest power first, and the minimum, if there is one.
        colors: colors of the stars.
    """
    label = "minimum"
    for (curve, optimum), color in zip(curves, colors, strict=True):
        if optimum is None:
            continue
        lowest = float(np.polyval(curve, np.log(optimum.value)))
        axes.plot([optimum.value], [lowest], color=color, label=label, **STAR)
        label = "_"  # only once in the legend


def finish(figure: Figure, caption: str, *, legend: str = "") -> Plot:
    """Set ticks, put the legend below, and save."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                ticks = log_ticks(*sorted(axis.get_view_interval()))
                axis.set_ticks(ticks, tick_labels(ticks))
                axis.set_ticks([], minor=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        lines = math.ceil(len(handles) / LEGEND_COLUMNS) + bool(legend)
        figure.set_figheight(HEIGHT + LEGEND_LINE * lines)
        made = figure.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=LEGEND_COLUMNS,
            frameon=False,
            fontsize=8,
            title=legend or None,
            title_fontsize=8,
            alignment="left",
            columnspacing=1.2,
            handlelength=1.6,
        )
        made.set_in_layout(True)
    return finish_plot(figure, caption)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis between two ends."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for within in _ROUND:
        ticks = [part * 10.0**decade for decade in decades for part in within]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= TICKS[0]:
            return ticks[:: math.ceil(len(ticks) / TICKS[1])]
    for bins in range(TICKS[0] + 1, 4 * TICKS[0]):
        even = MaxNLocator(bins, steps=[1, 2, 5, 10]).tick_values(low, high)
        ticks = [float(tick) for tick in even if low <= tick <= high]
        if len(ticks) >= TICKS[0]:
            break
    return ticks


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels with the fewest digits that are exact and distinct."""
    for digits in range(2, 8):
        labels = [number(tick, digits=digits) for tick in ticks]
        exact = all(math.isclose(float(f"{tick:.{digits}g}"), tick, rel_tol=1e-9) for tick in ticks)
        if exact and len(set(labels)) == len(labels):
            break
    return labels
