"""Intervals of 90 % hold the truth in at least 85 of 100 sweeps, and are not idly wide."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from dinoscale.scaling.laws.isoflop import fit_isoflops, fit_line, isoflop_optimum
from dinoscale.scaling.laws.laws import Interval
from dinoscale.scaling.laws.parametric_law import fit_cost, fit_joint, joint_optimum
from dinoscale.scaling.laws.selection import group_by_setting
from dinoscale.scaling.sweep.table import Row
from tests.unit.scaling.synthetic import Truth, draw, grid, isoflop

TRUTH = Truth()
TRIALS = 100
AS_ASKED = {"confidence": 0.9, "samples": 200}


def _intervals(rows: list[Row], *, flops: float) -> Iterator[tuple[str, Interval, float]]:
    """Name, interval and truth of all that a sweep is for."""
    points = group_by_setting(rows, "knn")
    best = TRUTH.best_parameters(flops)
    cost = fit_cost(points)
    to = {"flops": flops, "largest": flops / 2, "confidence": 0.9}
    joint = fit_joint(points, **AS_ASKED)
    yield "E", joint.law.irreducible, TRUTH.irreducible
    yield "a", joint.law.parameters_exponent, TRUTH.parameters_exponent
    yield "b", joint.law.images_exponent, TRUTH.images_exponent
    yield "best N, joint", _log(joint_optimum(joint, cost, **to).parameters), np.log(best)
    line = fit_line(*fit_isoflops(points, **AS_ASKED))
    if line:
        yield "best N, isoflop", _log(isoflop_optimum(line, cost, **to).parameters), np.log(best)


def _log(interval: Interval) -> Interval:
    return Interval(np.log(interval.value), np.log(interval.low), np.log(interval.high))


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute each of an idle core
@pytest.mark.parametrize(
    ("runs", "noise"), [(grid(), 0.02), (isoflop(TRUTH), 0.01)], ids=["grid", "isoflop"]
)
def test_the_truth_is_inside_in_85_of_100_sweeps(
    runs: list[tuple[float, float]], noise: float
) -> None:
    flops = 2.0 * max(row.flops for row in draw(TRUTH, runs, noise=0))
    found: dict[str, list[tuple[Interval, float]]] = defaultdict(list)
    for trial in range(TRIALS):
        rows = draw(TRUTH, runs, noise=noise, seed=trial)
        for name, interval, true in _intervals(rows, flops=flops):
            found[name].append((interval, true))
    assert len(found) == (5 if len(runs) == 24 else 4)
    for name, results in found.items():
        assert len(results) == TRIALS, name
        inside = sum(interval.low <= true <= interval.high for interval, true in results)
        width = np.median([interval.high - interval.low for interval, _ in results])
        ideal = np.subtract(*np.quantile([interval.value for interval, _ in results], [0.95, 0.05]))
        print(f"{name}: {inside} of {TRIALS} inside, width {width:.3g}, ideal {ideal:.3g}")
        assert inside >= 85, name
        assert width < 2 * ideal, name
