"""Best sizes of models at equal budgets: Hoffmann et al. 2022 (arXiv:2203.15556), approach 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinoscale.scaling.laws.bootstrap import band, interval
from dinoscale.scaling.laws.isoflop_minima import fit_minima
from dinoscale.scaling.laws.laws import Band, Frontier, IsoFlop, Numbers, Optimum
from dinoscale.scaling.laws.parabola import Parabola
from dinoscale.scaling.laws.parametric_law import ImageCost, images_for
from dinoscale.scaling.laws.selection import Point, best_along, close_groups

NUM_SIZES = 3  # model sizes that a budget needs
NUM_BUDGETS = 3  # that an interval of the line through their minima needs


@dataclass(frozen=True)
class Line:
    """log N = intercept + slope (log C - centre) through the minima of the budgets.

    Attributes:
        centre: centre of log C.
        value: slope and intercept, (1, 2).
        samples: bootstrap samples of both, (S, 2).
    """

    centre: float
    value: Numbers
    samples: Numbers

    def at(self, flops: Numbers, coefficients: Numbers) -> Numbers:
        """N (S, n) at budgets (n,) by slopes and intercepts (S, 2)."""
        return np.exp(coefficients[:, :1] * (np.log(flops) - self.centre) + coefficients[:, 1:])


def fit_isoflops(
    points: Sequence[Point], *, confidence: float, samples: int
) -> tuple[list[IsoFlop], list[Parabola]]:
    """A curve for every budget with at least three sizes, by ascending budget."""
    found = budgets_of(points)
    xy = [sizes_and_values(budget) for budget in found]
    parabolas = fit_minima(xy, confidence=confidence, samples=samples) if xy else []
    isoflops = [
        IsoFlop(_mean_budget(budget), x, y, parabola.curve, parabola.optimum)
        for budget, (x, y), parabola in zip(found, xy, parabolas, strict=True)
    ]
    return isoflops, parabolas


def sizes_and_values(budget: Sequence[Point]) -> tuple[Numbers, Numbers]:
    """N and y of the runs, (n,); every seed is a point."""
    sizes = [np.full(len(point.y), float(point.row.parameters)) for point in budget]
    return np.concatenate(sizes), np.concatenate([point.y for point in budget])


def budgets_of(points: Sequence[Point]) -> list[list[Point]]:
    """The best setting of each size, for every budget with enough sizes."""
    groups: dict[int, list[Point]] = {}
    numbers = close_groups([point.row.flops for point in points])
    for point, number in zip(points, numbers, strict=True):
        groups.setdefault(number, []).append(point)
    best = [best_along(groups[number], "parameters") for number in sorted(groups)]
    return [budget for budget in best if len(budget) >= NUM_SIZES]


def _mean_budget(points: Sequence[Point]) -> float:
    return float(np.exp(np.log([float(point.row.flops) for point in points]).mean()))


def fit_line(isoflops: Sequence[IsoFlop], parabolas: Sequence[Parabola]) -> Line | None:
    """The line through the minima that lie between the models; None with fewer than two.

    Minima are weighted by their precision. Two of them give no interval.
    """
    pairs = [(iso, par) for iso, par in zip(isoflops, parabolas, strict=True) if iso.optimum]
    if len(pairs) < 2:
        return None
    log_flops = np.log([iso.flops for iso, _ in pairs])
    log_n = np.array([par.log_optimum for _, par in pairs])
    drawn = np.stack([par.samples for _, par in pairs], -1)  # (S, budgets)
    known = len(pairs) >= NUM_BUDGETS and len(drawn) > 0
    spread = np.subtract(*np.quantile(drawn, [0.84, 0.16], axis=0)) if known else np.ones(1)
    weights = 1 / np.maximum(spread, 1e-6 * spread.max() + 1e-12)
    centre = float(np.average(log_flops, weights=np.broadcast_to(weights**2, log_flops.shape)))
    basis = np.stack((log_flops - centre, np.ones(len(pairs))), -1)
    solve = np.linalg.pinv(basis * weights[..., None]) * weights  # (2, budgets)
    return Line(centre, (solve @ log_n)[None], (drawn if known else drawn[:0]) @ solve.T)


def isoflop_frontier(line: Line, cost: ImageCost, *, confidence: float) -> Frontier:
    """N ~ C^p by the line, and the D that the budget then pays for."""

    def optimum(flops: Numbers) -> Band:
        at = np.asarray(flops, dtype=np.float64)
        return band(line.at(at, line.value)[0], line.at(at, line.samples), confidence)

    value, drawn = line.value[0, 0], line.samples[:, 0]
    return Frontier(
        "isoflop",
        interval(float(value), drawn, confidence),
        interval(float(1 - cost.exponent * value), 1 - cost.exponent * drawn, confidence),
        optimum,
    )


def isoflop_optimum(
    line: Line, cost: ImageCost, *, flops: float, largest: float, confidence: float
) -> Optimum:
    """What to train with a budget; `largest` is the FLOPs of the largest run."""
    value, drawn = (line.at(np.array([flops]), c)[:, 0] for c in (line.value, line.samples))
    return Optimum(
        "isoflop",
        flops,
        interval(float(value[0]), drawn, confidence),
        interval(
            float(images_for(value, cost, flops)[0]), images_for(drawn, cost, flops), confidence
        ),
        None,
        flops / largest,
    )
