"""Plots of one metric of a sweep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dinoscale.reports.html import Plot, drawing
from dinoscale.scaling.laws.laws import Interval, MetricFit
from dinoscale.scaling.number_text import SAME, number
from dinoscale.scaling.report.conclusions import Conclusion, conclusions, measured, value_of
from dinoscale.scaling.report.labels import metric_unit
from dinoscale.scaling.report.plot_axes import (
    HOLLOW,
    POINT,
    draw_band,
    draw_minima,
    finish,
    group_colors,
    labelled,
    size_colors,
    start,
)
from dinoscale.scaling.sweep.table import Row

GRID = 100  # points of a curve
Colors = Mapping[float, Any]
AXES = {
    "parameters": "parameters of the backbone",
    "images": "images seen",
    "flops": "training FLOPs",
}


def draw_metric(rows: Sequence[Row], fit: MetricFit) -> dict[str, Plot]:
    """Draw every plot that a metric has data for: kind -> plot."""
    used = measured(rows, fit.metric)
    colors = size_colors(row.parameters for row in rows)
    with drawing():
        plots = {
            "parameters": _over_parameters(used, fit),
            "images": _over_images(used, fit, colors),
            "flops": _over_flops(used, fit, colors),
            "isoflop": _isoflops(fit),
            "frontier": _frontiers(used, fit),
            "joint": _joint(used, fit, colors),
            "residuals": _residuals(used, fit, colors),
            "rates": _rates(fit, colors),
            "curves": _curves(rows, fit.metric, colors),
        }
    return {name: plot for name, plot in plots.items() if plot is not None}


def _over_parameters(rows: Sequence[Row], fit: MetricFit) -> Plot | None:
    if len({row.parameters for row in rows}) < 2:
        return None
    legend, groups = "images seen", _groups(rows, lambda row: row.images)
    if not any(len({row.parameters for row in group}) > 1 for group in groups.values()):
        if fit.isoflops:  # drawn with their parabolas
            return None
        legend, groups = "FLOPs", _groups(rows, lambda row: row.flops)
    return _lines(rows, fit, "parameters", groups, group_colors(groups), legend)


def _over_images(rows: Sequence[Row], fit: MetricFit, colors: Colors) -> Plot | None:
    if len({row.images for row in rows}) < 2:
        return None
    groups = _groups(rows, lambda row: row.parameters, same=1.0)
    return _lines(rows, fit, "images", groups, colors, "parameters")


def _groups(
    rows: Sequence[Row], value: Callable[[Row], int], *, same: float = 1 + SAME
) -> dict[float, list[Row]]:
    """Runs grouped by ascending value; near-equal values share a group, keyed by the lowest."""
    groups: dict[float, list[Row]] = {}
    for row in sorted(rows, key=value):
        last = next(reversed(groups), None)
        key = last if last is not None and value(row) <= same * last else value(row)
        groups.setdefault(key, []).append(row)
    return groups


def _lines(
    rows: Sequence[Row],
    fit: MetricFit,
    quantity: str,
    groups: Mapping[float, Sequence[Row]],
    colors: Colors,
    legend: str,
) -> Plot:
    """Points of all runs, a line through the lowest of each group, and the law."""
    values = [value_of(row, fit.metric) for row in rows]
    figure, axes = start(AXES[quantity], metric_unit(fit.metric), positive=values)
    named = labelled(groups)
    for key, group in groups.items():
        points = [(getattr(row, quantity), value_of(row, fit.metric)) for row in group]
        line = sorted(
            (getattr(row, quantity), value_of(row, fit.metric)) for row in _not_left_out(group, fit)
        )
        lowest = [next(same) for _, same in itertools.groupby(line, lambda point: point[0])]
        label = f"{number(key)}" if key in named else None
        axes.plot(*_columns(lowest), color=colors[key], linewidth=1, label=label, **POINT)
        axes.plot(*_columns(points), color=colors[key], linestyle="", **POINT)
    _hollow(axes, rows, fit, quantity)
    _law(axes, fit, quantity, [getattr(row, quantity) for row in rows])
    return finish(figure, f"{fit.metric} against {AXES[quantity]}", legend=legend)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _not_left_out(rows: Sequence[Row], fit: MetricFit) -> list[Row]:
    return [row for row in rows if row.name not in fit.left_out]


def _hollow(axes: Axes, rows: Sequence[Row], fit: MetricFit, quantity: str) -> None:
    """Mark the runs that were left out of the fit."""
    points = [
        (getattr(row, quantity), value_of(row, fit.metric))
        for row in rows
        if row.name in fit.left_out
    ]
    if points:
        axes.plot(*_columns(points), markeredgecolor="#a11", label="left out", zorder=3, **HOLLOW)


def _law(axes: Axes, fit: MetricFit, quantity: str, x: Sequence[float]) -> None:
    law = fit.laws.get(quantity)
    if law is not None:
        grid = np.geomspace(min(x), max(x), GRID)
        label = f"law, {100 * fit.confidence:g} % interval"
        draw_band(axes, grid, law.band(grid), label)


def _over_flops(rows: Sequence[Row], fit: MetricFit, colors: Colors) -> Plot | None:
    if len({row.flops for row in rows}) < 2:
        return None
    figure, axes = start(
        AXES["flops"],
        metric_unit(fit.metric),
        positive=[value_of(row, fit.metric) for row in rows],
    )
    groups = _groups(rows, lambda row: row.parameters, same=1.0)
    named = labelled(groups)
    for size, group in groups.items():
        points = [(row.flops, value_of(row, fit.metric)) for row in group]
        label = number(size) if size in named else None
        axes.plot(*_columns(points), color=colors[size], linestyle="", label=label, **POINT)
    best = [
        min((value_of(row, fit.metric), row.flops) for row in group)
        for group in _groups(_not_left_out(rows, fit), lambda row: row.flops).values()
    ]
    lowest = itertools.accumulate((y for y, _ in best), min)
    reached = [(x, y) for (y, x), low in zip(best, lowest, strict=True) if y == low]
    axes.plot(*_columns(reached), color="#888888", linewidth=1, zorder=1.8, label="best so far")
    _hollow(axes, rows, fit, "flops")
    expected = _expected(axes, conclusions(fit))
    _law(axes, fit, "flops", [row.flops for row in rows] + expected)
    return finish(
        figure, f"{fit.metric} against training FLOPs, with the frontier", legend="parameters"
    )


def _expected(axes: Axes, found: Sequence[Conclusion]) -> list[float]:
    """Mark the expected results of the recommended runs, and return their budgets."""
    label = "expected"
    budgets = []
    for conclusion in found:
        if conclusion.expected is not None and conclusion.expected.value > 0:
            _mark(axes, conclusion.optimum.flops, conclusion.expected, label=label)
            budgets.append(conclusion.optimum.flops)
            label = "_"  # only once in the legend
    return budgets


def _mark(axes: Axes, x: float, y: Interval, *, label: str) -> None:
    """Draw a star with the interval of y."""
    ends = [[max(y.value - y.low, 0)], [max(y.high - y.value, 0)]]
    if not np.isfinite(ends).all():
        ends = [[0.0], [0.0]]
    axes.errorbar(
        [x], [y.value], yerr=ends, marker="*", linestyle="", label=label,
        color="#c33", markersize=9, elinewidth=1, zorder=4,
    )  # fmt: skip


def _isoflops(fit: MetricFit) -> Plot | None:
    if not fit.isoflops:
        return None
    values = [float(value) for curve in fit.isoflops for value in curve.y]
    figure, axes = start(AXES["parameters"], metric_unit(fit.metric), positive=values)
    colors = group_colors(curve.flops for curve in fit.isoflops)
    named = labelled(colors)
    for curve in fit.isoflops:
        color = colors[curve.flops]
        name = number(curve.flops) if curve.flops in named else None
        axes.plot(curve.parameters, curve.y, color=color, linestyle="", label=name, **POINT)
        grid = np.geomspace(curve.parameters.min(), curve.parameters.max(), GRID)
        axes.plot(grid, np.polyval(curve.curve, np.log(grid)), color=color, linewidth=1)
    minima = [(curve.curve, curve.optimum) for curve in fit.isoflops]
    draw_minima(axes, minima, [colors[curve.flops] for curve in fit.isoflops])
    return finish(figure, f"{fit.metric} against size at equal cost (isoFLOP)", legend="FLOPs")


def _frontiers(rows: Sequence[Row], fit: MetricFit) -> Plot | None:
    minima = [(curve.flops, curve.optimum) for curve in fit.isoflops if curve.optimum is not None]
    if not fit.frontiers or not rows:
        return None
    flops = [curve.flops for curve in fit.isoflops] + [found.flops for found in fit.optima]
    flops.append(max(row.flops for row in rows))
    if len(set(flops)) < 2:
        return None
    grid = np.geomspace(min(flops), max(flops), GRID)
    bands = [(frontier, frontier.optimum(grid)) for frontier in fit.frontiers]
    shown = [float(n) for _, band in bands for n in band.value if 0 < n < np.inf]
    shown += [found.value for _, found in minima]
    bounds = [conclusion.optimum.parameters for conclusion in conclusions(fit)]
    shown += [end for found in bounds for end in (found.low, found.high)]
    if not shown:
        return None
    figure, axes = start(AXES["flops"], "best number of parameters", positive=shown)
    for flops_of, found in minima:
        axes.plot([flops_of], [found.value], color="#333333", linestyle="", **POINT)
        low, high = max(found.low, found.value / 10), min(found.high, 10 * found.value)
        axes.vlines(flops_of, low, high, color="#333333", linewidth=1)
    label = "recommended"
    for conclusion in conclusions(fit):
        _mark(axes, conclusion.optimum.flops, conclusion.optimum.parameters, label=label)
        label = "_"
    axes.set_ylim(min(shown) / 1.2, max(shown) * 1.2)
    for (frontier, band), color in zip(bands, ("#1f77b4", "#d9730d"), strict=False):
        label = f"{frontier.approach}: exponent {frontier.parameters_exponent.value:.2f}"
        line = "-" if frontier.approach == "isoflop" else "--"
        draw_band(axes, grid, band, label, color=color, linestyle=line)
    return finish(figure, f"{fit.metric}: best size against budget")


def _joint(rows: Sequence[Row], fit: MetricFit, colors: Colors) -> Plot | None:
    points = _residual_points(rows, fit)
    if not points or fit.joint is None:
        return None
    law = fit.joint.band(
        np.array([float(row.parameters) for row, _ in points]),
        np.array([float(row.images) for row, _ in points]),
    ).value
    # The law is fitted to the mean over seeds, which may differ from the value of this run.
    pairs = [
        (row.parameters, float(by_law * np.exp(residual)), float(by_law))
        for (row, residual), by_law in zip(points, law, strict=True)
    ]
    values = [y for _, y, _ in pairs]
    name = metric_unit(fit.metric)
    figure, axes = start(f"measured {name}", f"predicted {name}", positive=values)
    for size in colors:
        xy = [(measured, by_law) for n, measured, by_law in pairs if n == size]
        label = number(size) if xy and size in labelled(colors) else None
        axes.plot(*_columns(xy), color=colors[size], linestyle="", label=label, **POINT)
    ends = [min(values), max(values)]
    axes.plot(ends, ends, color="#888888", linewidth=1, zorder=1, label="equal")
    return finish(figure, f"{fit.metric}: joint law against measurement", legend="parameters")


def _residual_points(rows: Sequence[Row], fit: MetricFit) -> list[tuple[Row, float]]:
    """The runs that the joint law was fitted to, with their residuals."""
    if fit.joint is None:
        return []
    residuals = dict(zip(fit.joint.names, fit.joint.residuals.tolist(), strict=True))
    return [(row, residuals[row.name]) for row in rows if row.name in residuals]


def _residuals(rows: Sequence[Row], fit: MetricFit, colors: Colors) -> Plot | None:
    points = _residual_points(rows, fit)
    if not points:
        return None
    figure, axes = start(AXES["images"], "measured over law, minus 1, %", positive=())
    for size in colors:
        xy = [
            (row.images, 100 * float(np.expm1(residual)))
            for row, residual in points
            if row.parameters == size
        ]
        label = number(size) if xy and size in labelled(colors) else None
        axes.plot(*_columns(xy), color=colors[size], linestyle="", label=label, **POINT)
    axes.axhline(0, color="#888888", linewidth=1, zorder=1)
    return finish(figure, f"{fit.metric}: residuals of the joint law", legend="parameters")


def _rates(fit: MetricFit, colors: Colors) -> Plot | None:
    if not fit.best_rates:
        return None
    values = [float(value) for rate in fit.best_rates for value in rate.y]
    figure, axes = start("peak learning rate", metric_unit(fit.metric), positive=values)
    named: set[str] = set()
    for rate in fit.best_rates:
        color = colors.get(rate.parameters)
        name = f"{number(rate.parameters)}, batch {number(rate.batch_size)}"
        once = None if name in named else name
        named.add(name)
        axes.plot(rate.lr, rate.y, color=color, linestyle="", label=once, **POINT)
        grid = np.geomspace(rate.lr.min(), rate.lr.max(), GRID)
        axes.plot(grid, np.polyval(rate.curve, np.log(grid)), color=color, linewidth=1)
    minima = [(rate.curve, rate.optimum) for rate in fit.best_rates]
    draw_minima(axes, minima, [colors.get(rate.parameters) for rate in fit.best_rates])
    return finish(figure, f"{fit.metric} against peak learning rate", legend="parameters")


def _curves(rows: Sequence[Row], metric: str, colors: Colors) -> Plot | None:
    """The metric during training of every run, including failed ones."""
    lines = []
    for row in sorted(rows, key=lambda row: row.parameters):
        found = [(point.get("images"), point.get(metric)) for point in row.curves]
        points = [(x, y) for x, y in found if x and y is not None and np.isfinite(y)]
        if len(points) > 1:
            lines.append((row.parameters, points))
    if not lines:
        return None
    values = [y for _, points in lines for _, y in points]
    figure, axes = start("images seen", metric_unit(metric), positive=values)
    named = labelled(size for size, _ in lines)
    for size, points in lines:
        label = number(size) if size in named else None
        named.discard(size)
        axes.plot(*_columns(points), color=colors[size], linewidth=1, alpha=0.85, label=label)
    return finish(figure, f"{metric} during training, all runs", legend="parameters")
