"""Tables of the report of a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from xml.etree.ElementTree import Element

import numpy as np

from dinoscale.cluster.doctor.report import count_text
from dinoscale.reports import html
from dinoscale.reports.html import element
from dinoscale.scaling.laws.laws import Interval, MetricFit
from dinoscale.scaling.number_text import number
from dinoscale.scaling.report.conclusions import best_run, measured, value_of
from dinoscale.scaling.report.labels import ends, exponential, metric_unit, percent
from dinoscale.scaling.sweep.table import Row

OUTLIER = 3.0  # robust standard deviations of the residuals
ERROR_SHOWN = 300  # characters
_NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal distribution
Cells = Sequence[str | Element]


def runs_table(rows: Sequence[Row]) -> Element:
    """Every run with its size, cost and metrics."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    best = {name: best_run(rows, name) for name in metrics}
    heads = [
        "run",
        "status",
        "parameters",
        "width x depth",
        "images",
        "FLOPs",
        "batch",
        "peak lr",
        "seed",
    ]
    heads += [*(metric_unit(name) for name in metrics), "hours"]
    lines = []
    for row in sorted(rows, key=lambda row: (row.parameters, row.images, row.name)):
        shape = f"{row.embed_dim} x {row.depth}" if row.embed_dim else "-"
        failed = row.status == "failed"
        cells: list[str | Element] = [
            element("td", "failed", class_="error") if failed else "done",
            *(number(row.parameters), shape, number(row.images), number(row.flops)),
            *(number(row.batch_size), number(row.lr), str(row.seed)),
        ]
        for name in metrics:
            bold = {"class_": "best"} if row is best[name] else {}
            cells.append(element("td", _metric(row.metrics.get(name)), **bold))
        cells.append(number(row.seconds / 3600))
        lines.append(_line(row.name, cells))
    return html.table([element("th", head, scope="col") for head in heads], lines)


def _line(name: str, cells: Cells) -> Element:
    made = [cell if isinstance(cell, Element) else element("td", cell) for cell in cells]
    return element("tr", element("th", name, scope="row", class_="name"), *made)


def _table(heads: Sequence[str], rows: Sequence[Cells]) -> Element:
    lines = [_line(str(first), rest) for first, *rest in rows]
    made = [
        element("th", head, scope="col", class_="text" if head.startswith("why") else "")
        for head in heads
    ]
    return html.table(made, lines)


def _metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def failed_table(rows: Sequence[Row]) -> Element | None:
    """The runs that failed, and why."""
    lines: list[Cells] = [
        [row.name, str(row.attempts), element("td", _short(row.error), class_="text")]
        for row in rows
        if row.status == "failed"
    ]
    return _table(["run", "attempts", "why it failed"], lines) if lines else None


def _short(text: str) -> str:
    return text if len(text) <= ERROR_SHOWN else f"{text[:ERROR_SHOWN]} ..."


def laws_table(fit: MetricFit) -> Element | None:
    """The coefficients of all laws."""
    rows: list[Cells] = []
    for law in fit.laws.values():
        symbol = {"parameters": "N", "images": "D", "flops": "C"}.get(law.quantity, "x")
        rows.append(
            [
                f"y = E + A / {symbol}^a, best runs by {law.quantity}",
                _estimate(law.irreducible),
                _estimate(law.coefficient, "A"),
                _estimate(law.exponent, "a"),
                *_goodness(len(law.x), law.r2, law.left_out_error),
            ]
        )
    if fit.joint is not None:
        joint = fit.joint
        rows.append(
            [
                "y = E + A / N^a + B / D^b, all runs",
                _estimate(joint.irreducible),
                _two(joint.parameters_coefficient, joint.images_coefficient, "AB"),
                _two(joint.parameters_exponent, joint.images_exponent, "ab"),
                *_goodness(len(joint.names), joint.r2, joint.left_out_error),
            ]
        )
    rows += [
        [
            f"best N ~ C^p, D ~ C^q, {found.approach}",
            *("", ""),
            _two(found.parameters_exponent, found.images_exponent, "pq"),
            *("", "", ""),
        ]
        for found in fit.frontiers
    ]
    heads = ["law", "E", "coefficients", "exponents", "points", "r2", "held-out error"]
    return _table(heads, rows) if rows else None


def _estimate(found: Interval, symbol: str = "") -> Element:
    """A cell with an estimate and, below it, its interval."""
    return element("td", *_parts(found, symbol))


def _two(first: Interval, second: Interval, symbols: str) -> Element:
    """A cell with two estimates."""
    return element("td", *_parts(first, symbols[0]), *_parts(second, symbols[1]))


def _parts(found: Interval, symbol: str) -> tuple[str, Element]:
    name = f"{symbol} = " if symbol else ""
    return f"{name}{number(found.value, zeros=True)}", element("small", ends(found))


def _goodness(points: int, r2: float, left_out: float | None) -> list[str]:
    return [str(points), f"{r2:.3f}", "-" if left_out is None else percent(left_out, sign=True)]


def optima_table(fit: MetricFit) -> Element | None:
    """The best use of each budget by each approach."""
    rows = [
        [
            f"{number(found.flops)} ({exponential(found.flops)})",
            found.approach,
            _estimate(found.parameters),
            _estimate(found.images),
            _estimate(found.metric) if found.metric else "-",
            number(found.extrapolation),
        ]
        for found in fit.optima
    ]
    heads = ["FLOPs", "approach", "parameters", "images", metric_unit(fit.metric)]
    return _table([*heads, "times the largest run"], rows) if rows else None


def minima_table(fit: MetricFit) -> Element | None:
    """The minimum of each isoFLOP parabola."""
    rows = [
        [
            f"{number(curve.flops)} ({exponential(curve.flops)})",
            str(len(curve.y)),
            _estimate(curve.optimum) if curve.optimum else "none within the sizes run",
        ]
        for curve in fit.isoflops
    ]
    return _table(["FLOPs", "runs", "best number of parameters"], rows) if rows else None


def rates_table(fit: MetricFit) -> Element | None:
    """The best learning rate of each size."""
    rows = [
        [
            rate.label,
            number(rate.parameters),
            number(rate.batch_size),
            str(len(rate.lr)),
            _estimate(rate.optimum) if rate.optimum else "none within the rates run",
        ]
        for rate in fit.best_rates
    ]
    heads = ["runs", "parameters", "batch", "rates", "best peak lr"]
    return _table(heads, rows) if rows else None


def left_out_table(fit: MetricFit) -> Element | None:
    """The runs that were not used, and why."""
    rows: list[Cells] = [
        [name, element("td", why, class_="text")] for name, why in fit.left_out.items()
    ]
    return _table(["run", "why it was left out"], rows) if rows else None


def outliers(fit: MetricFit) -> dict[str, float]:
    """Runs far from the joint law: name -> measured over law, minus 1."""
    if fit.joint is None or not fit.joint.names:
        return {}
    residuals = fit.joint.residuals
    middle = float(np.median(residuals))
    spread = _NORMAL * float(np.median(np.abs(residuals - middle)))
    return {
        name: float(np.expm1(residual))
        for name, residual in zip(fit.joint.names, residuals.tolist(), strict=True)
        if abs(residual - middle) > OUTLIER * spread > 0
    }


def outliers_table(rows: Sequence[Row], fit: MetricFit) -> Element | None:
    """Table of the runs far from the joint law."""
    far = outliers(fit)
    lines = [
        [
            row.name,
            number(row.parameters),
            number(row.images),
            _metric(value_of(row, fit.metric)),
            percent(far[row.name], sign=True),
        ]
        for row in measured(rows, fit.metric)
        if row.name in far
    ]
    heads = [
        "run",
        "status",
        "parameters",
        "images",
        metric_unit(fit.metric),
        "deviation from the law",
    ]
    return _table(heads, lines) if lines else None


def version_differences(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Libraries and code that differ between runs: name -> version -> number of runs."""
    names = dict.fromkeys(name for row in rows for name in row.versions)
    counts = {
        name: dict(Counter(str(row.versions.get(name) or "unknown") for row in rows))
        for name in names
    }
    return {name: versions for name, versions in counts.items() if len(versions) > 1}


def versions_list(rows: Sequence[Row]) -> Element:
    """Versions of libraries and code; differing ones with their numbers of runs."""
    differ = version_differences(rows)
    names = dict.fromkeys(name for row in rows for name in row.versions)
    return html.definitions(
        (
            name,
            "; ".join(
                f"{version} ({count_text(count, 'run')})" for version, count in differ[name].items()
            )
            if name in differ
            else str(next(row.versions.get(name) for row in rows) or "unknown"),
        )
        for name in names
    )


def cost(rows: Sequence[Row]) -> Mapping[str, float]:
    """Number of runs, hours and FLOPs of the sweep."""
    return {
        "runs": len(rows),
        "hours": sum(row.seconds for row in rows) / 3600,
        "rank_hours": sum(row.seconds * row.ranks for row in rows) / 3600,
        "flops": sum(row.flops for row in rows if row.status == "done"),
    }


def sections(rows: Sequence[Row], fit: MetricFit) -> list[tuple[str, Element]]:
    """All non-empty tables of a metric, with their titles."""
    makers: dict[str, Callable[[], Element | None]] = {
        "Laws": lambda: laws_table(fit),
        "Best use of a budget": lambda: optima_table(fit),
        "Minima of the isoFLOP parabolas": lambda: minima_table(fit),
        "Best learning rates": lambda: rates_table(fit),
        "Runs left out of the fit": lambda: left_out_table(fit),
        "Runs far from the joint law": lambda: outliers_table(rows, fit),
    }
    made = {title: make() for title, make in makers.items()}
    return [(title, table) for title, table in made.items() if table is not None]
