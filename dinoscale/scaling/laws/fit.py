"""Fit scaling laws to the results of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dinoscale.errors import ConfigError, DataError
from dinoscale.scaling.laws.exclusions import without_outliers
from dinoscale.scaling.laws.isoflop import (
    Line,
    fit_isoflops,
    fit_line,
    isoflop_frontier,
    isoflop_optimum,
)
from dinoscale.scaling.laws.laws import Frontier, MetricFit, Optimum
from dinoscale.scaling.laws.learning_rates import fit_rates
from dinoscale.scaling.laws.parametric_law import (
    ImageCost,
    JointFit,
    fit_cost,
    fit_joint,
    joint_frontier,
    joint_optimum,
    why_no_joint,
)
from dinoscale.scaling.laws.power_law import fit_law
from dinoscale.scaling.laws.selection import QUANTITIES, Point, group_by_setting, tuned, usable_rows
from dinoscale.scaling.report import fit_warnings
from dinoscale.scaling.report.fit_text import as_json, as_text
from dinoscale.scaling.sweep.table import Row

__all__ = ["CONFIDENCE", "SAMPLES", "as_json", "as_text", "fit_rows"]

CONFIDENCE = 0.9
SAMPLES = 500  # of the bootstrap
_MIN_OUTSIDE = 4  # samples beyond each end of an interval
_MAX_SAMPLES = 20_000  # bounds memory and time, some seconds per law
_BUDGETS = (2.0, 10.0)  # multiples of the largest that was run


def fit_rows(
    rows: Sequence[Row],
    *,
    metrics: Sequence[str] = (),
    budgets: Sequence[float] = (),
    confidence: float = CONFIDENCE,
    samples: int = SAMPLES,
) -> list[MetricFit]:
    """Fit every metric separately.

    Args:
        rows: rows of the table.
        metrics: names of metrics; empty for all in the table, in its order.
        budgets: FLOPs to find the best model and number of images for; empty for 2 and 10 times
            the largest that was run.
        confidence: level of the intervals, such as 0.9.
        samples: number of bootstrap samples.

    Raises:
        DataError: no run has a metric.
        ConfigError: an argument is out of range, or a metric is not in the table.
    """
    _check(budgets, confidence=confidence, samples=samples)
    known = list(dict.fromkeys(name for row in rows for name in row.metrics))
    if not known:
        raise DataError(
            f"No metric to fit: the table has {len(rows)} runs, none with a metric. Run the sweep"
            " first; `dinoscale sweep FILE status` shows what failed."
        )
    for name in metrics:
        if name not in known:
            raise ConfigError(f"metric {name!r} is not in the table, which has {', '.join(known)}")
    return [
        _fit_metric(rows, name, budgets, confidence=confidence, samples=samples)
        for name in dict.fromkeys(metrics or known)
    ]


def _check(budgets: Sequence[float], *, confidence: float, samples: int) -> None:
    for budget in budgets:
        if not (math.isfinite(budget) and budget > 0):
            raise ConfigError(f"budget is {budget:g}, need FLOPs above 0, such as 1e18")
    if not 0 < confidence < 1:
        raise ConfigError(
            f"confidence is {confidence:g}, need a fraction between 0 and 1, such as 0.9"
        )
    least = math.ceil(round(2 * _MIN_OUTSIDE / (1 - confidence), 6))
    if not least <= samples <= _MAX_SAMPLES:
        raise ConfigError(
            f"samples is {samples}, need {least} to {_MAX_SAMPLES} for a confidence of"
            f" {confidence:g}"
        )


def _fit_metric(
    rows: Sequence[Row],
    metric: str,
    budgets: Sequence[float],
    *,
    confidence: float,
    samples: int,
) -> MetricFit:
    used, left_out = usable_rows(rows, metric)
    used, outliers = without_outliers(used, metric)
    left_out |= outliers
    points = group_by_setting(used, metric)
    found = {
        quantity: fit_law(points, quantity, confidence=confidence, samples=samples)
        for quantity in QUANTITIES
    }
    laws = {quantity: law for quantity, law in found.items() if law}
    supported = not why_no_joint(points)
    joint = fit_joint(points, confidence=confidence, samples=samples) if supported else None
    isoflops, parabolas = fit_isoflops(points, confidence=confidence, samples=samples)
    line = fit_line(isoflops, parabolas)
    several = len({point.row.parameters for point in points}) > 1
    cost = fit_cost(tuned(points)) if several else None
    frontiers, optima = _decisions(
        points, joint, line, cost, budgets=budgets, confidence=confidence
    )
    fitted = MetricFit(
        metric=metric,
        confidence=confidence,
        num_runs=len(used),
        left_out=left_out,
        laws=laws,
        joint=joint.law if joint else None,
        isoflops=tuple(isoflops),
        frontiers=tuple(frontiers),
        optima=tuple(optima),
        best_rates=tuple(fit_rates(used, metric, confidence=confidence, samples=samples)),
        cautions=(),
    )
    return fit_warnings.with_warnings(fitted, points, joint_fit=joint, cost=cost)


def _decisions(
    points: Sequence[Point],
    joint: JointFit | None,
    line: Line | None,
    cost: ImageCost | None,
    *,
    budgets: Sequence[float],
    confidence: float,
) -> tuple[list[Frontier], list[Optimum]]:
    """Frontiers and optima of both approaches, where they exist."""
    frontiers: list[Frontier] = []
    optima: list[Optimum] = []
    if cost is None or cost.exponent <= 0:
        return frontiers, optima
    largest = float(max(point.row.flops for point in points))
    wanted = sorted(set(budgets)) or [times * largest for times in _BUDGETS]
    if joint and all(joint.falls):
        frontiers.append(joint_frontier(joint, cost, confidence=confidence))
        optima += [
            joint_optimum(joint, cost, flops=flops, largest=largest, confidence=confidence)
            for flops in wanted
        ]
    if line:
        frontiers.append(isoflop_frontier(line, cost, confidence=confidence))
        optima += [
            isoflop_optimum(line, cost, flops=flops, largest=largest, confidence=confidence)
            for flops in wanted
        ]
    return frontiers, [_with_run(optimum, joint, confidence) for optimum in optima]


def _with_run(optimum: Optimum, joint: JointFit | None, confidence: float) -> Optimum:
    if joint is None:
        return optimum
    there = np.array([optimum.parameters.value, optimum.images.value])
    return replace(optimum, run=joint.fit.run_at(there, confidence))
