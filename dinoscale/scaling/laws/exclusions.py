"""Exclude outliers from all fits, each with a reason.

First by the joint law, or by the law along the one size that varies; then by the curves at equal
budgets. An excluded run is excluded from every fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dinoscale.scaling.laws.isoflop import budgets_of, sizes_and_values
from dinoscale.scaling.laws.outliers import outlying
from dinoscale.scaling.laws.parabola import outlying_runs
from dinoscale.scaling.laws.parametric_law import why_no_joint
from dinoscale.scaling.laws.power_law import fit
from dinoscale.scaling.laws.selection import Point, best_along, group_by_setting, size_of, tuned
from dinoscale.scaling.sweep.table import Row

TEST_NAME = "generalised ESD test"
MIN_DEVIATION = 0.1  # in log y; closer runs are kept, however significant the test finds them


def without_outliers(rows: Sequence[Row], metric: str) -> tuple[list[Row], dict[str, str]]:
    """The runs that a fit may use, and the reasons for excluding the others: name -> reason."""
    kept, reasons = list(rows), dict[str, str]()
    for find_outliers in (_by_law, _by_budgets):
        found = find_outliers(group_by_setting(kept, metric))
        reasons |= {
            row.name: f"outlier ({TEST_NAME}): {metric} is {row.metrics[metric]:.4g}, but the law"
            f" fitted to the other runs predicts {law:.4g}"
            for row, law in found
        }
        kept = [row for row in kept if row.name not in reasons]
    return kept, reasons


def _by_law(points: Sequence[Point]) -> list[tuple[Row, float]]:
    """Outliers of the law that the settings support, each with the prediction of the law.

    A setting is tested by the mean over its seeds, as it is fitted; of an outlying setting, only
    the seeds that cause it are excluded.
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
    found = [index for index in found if abs(fitted.residuals[index]) > MIN_DEVIATION]
    return [(row, float(law[index])) for index in found for row in _far(chosen[index], law[index])]


def _far(point: Point, law: float) -> list[Row]:
    """The runs at least half as far from the law as the one farthest from it."""
    away = np.abs(np.log(point.y / law))
    return [row for row, far in zip(point.rows, away >= away.max() / 2, strict=True) if far]


def _supported(points: Sequence[Point]) -> tuple[list[Point], tuple[str, ...]]:
    """Settings and sizes of the joint law, or else of the law along the size with most values."""
    if not why_no_joint(points):
        return tuned(points), ("parameters", "images")
    if not points:
        return [], ()
    along = {name: best_along(points, name) for name in ("parameters", "images")}
    name = max(along, key=lambda name: len({size_of(name)(point) for point in along[name]}))
    return along[name], (name,)


def _by_budgets(points: Sequence[Point]) -> list[tuple[Row, float]]:
    """Outliers of the curves at equal budgets."""
    budgets = budgets_of(points)
    rows = [row for budget in budgets for point in budget for row in point.rows]
    found = outlying_runs([sizes_and_values(budget) for budget in budgets])
    y = np.concatenate([point.y for budget in budgets for point in budget] or [np.zeros(0)])
    return [
        (rows[index], law)
        for index, law in found
        if law <= 0 or abs(np.log(y[index] / law)) > MIN_DEVIATION
    ]
