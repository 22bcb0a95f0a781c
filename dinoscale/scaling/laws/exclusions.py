"""Runs that no fit may take for ordinary ones, and why.

First by the joint law, or by the law along the one size that varies; then by the curves at equal
budgets. What is left out is left out of everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dinoscale.scaling.laws.isoflop import budgets_of, sizes_and_values
from dinoscale.scaling.laws.outliers import outlying
from dinoscale.scaling.laws.parabola import outlying_runs
from dinoscale.scaling.laws.parametric_law import why_no_joint
from dinoscale.scaling.laws.power_law import fit
from dinoscale.scaling.laws.selection import Point, best_along, settings, size_of, tuned
from dinoscale.scaling.sweep.table import Row

TEST = "generalised ESD test"
LEAST = 0.1  # in log y; a run that is nearer is left in, however sure the test is of so few


def without_outliers(rows: Sequence[Row], metric: str) -> tuple[list[Row], dict[str, str]]:
    """The runs that a fit may use, and of the others why not: name -> reason."""
    kept, reasons = list(rows), dict[str, str]()
    for screen in (_by_law, _by_budgets):
        found = screen(settings(kept, metric))
        reasons |= {
            row.name: f"outlier ({TEST}): {metric} is {row.metrics[metric]:.4g}, and the other"
            f" runs make it {law:.4g}"
            for row, law in found
        }
        kept = [row for row in kept if row.name not in reasons]
    return kept, reasons


def _by_law(points: Sequence[Point]) -> list[tuple[Row, float]]:
    """Outliers of the law that the settings support, each with what the law has there.

    A setting is judged by the mean over its seeds, as it is fitted; of one that is an outlier, the
    seeds that make it one are.
    """
    chosen, columns = _supported(points)
    num_parameters = 1 + 2 * len(columns)
    if len(chosen) <= num_parameters + 1:
        return []
    x = np.array([[float(getattr(point.row, name)) for name in columns] for point in chosen])
    fitted = fit(x, np.array([point.log_y for point in chosen]), samples=0)
    found = outlying(
        fitted.slopes(x), fitted.residuals, groups=[0] * len(chosen), least=num_parameters + 1
    )
    law = fitted.at(x, fitted.theta)[0]
    found = [index for index in found if abs(fitted.residuals[index]) > LEAST]
    return [(row, float(law[index])) for index in found for row in _far(chosen[index], law[index])]


def _far(point: Point, law: float) -> list[Row]:
    """The runs at least half as far from the law as the one farthest from it."""
    away = np.abs(np.log(point.y / law))
    return [row for row, far in zip(point.rows, away >= away.max() / 2, strict=True) if far]


def _supported(points: Sequence[Point]) -> tuple[list[Point], tuple[str, ...]]:
    """Settings and sizes of the joint law, or else of the one with the most values."""
    if not why_no_joint(points):
        return tuned(points), ("parameters", "images")
    if not points:
        return [], ()
    along = {name: best_along(points, name) for name in ("parameters", "images")}
    name = max(along, key=lambda name: len({size_of(name)(point) for point in along[name]}))
    return along[name], (name,)


def _by_budgets(points: Sequence[Point]) -> list[tuple[Row, float]]:
    """The same of the curves at equal budgets."""
    budgets = budgets_of(points)
    rows = [row for budget in budgets for point in budget for row in point.rows]
    found = outlying_runs([sizes_and_values(budget) for budget in budgets])
    y = np.concatenate([point.y for budget in budgets for point in budget] or [np.zeros(0)])
    return [
        (rows[index], law)
        for index, law in found
        if law <= 0 or abs(np.log(y[index] / law)) > LEAST
    ]
