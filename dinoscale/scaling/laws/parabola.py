"""Parabolas of y over log x and their minima, such as best learning rates.

Parabolas fitted together, such as those of several budgets, share one noise level: each alone
leaves few degrees of freedom or none. Every run is a point, so that seeds measure the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinoscale.scaling.laws.bootstrap import draw_noise, interval
from dinoscale.scaling.laws.laws import Interval, Numbers
from dinoscale.scaling.laws.outliers import outlying

NUM_PARAMETERS = 3
_BEYOND = math.log(10)  # samples are clipped here: far outside the runs a parabola says nothing


@dataclass(frozen=True)
class Parabola:
    """A parabola in ln x and its minimum.

    Attributes:
        curve: coefficients in ln x, highest power first, (3,).
        optimum: x at the minimum; None unless it lies between the smallest and the largest x.
        log_optimum: ln x at the minimum.
        samples: bootstrap samples of `log_optimum`, clipped a factor of ten outside the runs, (S,).
    """

    curve: Numbers
    optimum: Interval | None
    log_optimum: float
    samples: Numbers


def fit_parabolas(
    groups: Sequence[tuple[Numbers, Numbers]],
    *,
    reaches: Sequence[tuple[float, float]],
    confidence: float,
    samples: int,
) -> list[Parabola]:
    """Fit each group by least squares, with a common bootstrap.

    Args:
        groups: x and y of each group, (n,), with at least three different x.
        reaches: range of x in which the minimum of each group counts: the smallest and the largest
            x run, including diverged runs.
        confidence: level of the intervals.
        samples: S.
    """
    centres = [float(np.log(x).mean()) for x, _ in groups]
    bases = [np.vander(np.log(x) - at, 3) for (x, _), at in zip(groups, centres, strict=True)]
    curves: list[Numbers] = [
        np.linalg.pinv(basis) @ y for basis, (_, y) in zip(bases, groups, strict=True)
    ]
    # Noise is relative to y, as in the laws.
    residuals = [(y - b @ c) / y.mean() for b, c, (_, y) in zip(bases, curves, groups, strict=True)]
    sizes = [len(y) for _, y in groups]
    noise = draw_noise(
        np.concatenate(residuals),
        degrees=sum(sizes) - NUM_PARAMETERS * len(groups),
        samples=samples,
    )
    parts = np.split(noise, np.cumsum(sizes)[:-1], axis=1)
    made = []
    for (x, y), reach, centre, basis, curve, part in zip(
        groups, reaches, centres, bases, curves, parts, strict=True
    ):
        drawn = (basis @ curve + y.mean() * part) @ np.linalg.pinv(basis).T  # (S, 3)
        lowest = float(centre + _lowest(curve[None])[0])
        made.append(parabola_at(x, y, reach, lowest, centre + _lowest(drawn), confidence))
    return made


def outlying_runs(groups: Sequence[tuple[Numbers, Numbers]]) -> list[tuple[int, float]]:
    """Outliers of the parabolas of all groups, with the prediction of the other runs.

    Args:
        groups: as in `fit_parabolas`.

    Returns:
        Indices into the concatenated groups, each with y by the parabola without outliers.
    """
    if not groups:
        return []
    sizes = [len(y) for _, y in groups]
    labels = np.repeat(np.arange(len(groups)), sizes)
    scales = np.repeat([float(np.median(y)) for _, y in groups], sizes)
    basis = np.zeros((len(labels), NUM_PARAMETERS * len(groups)))
    for place, (x, _) in enumerate(groups):
        log_x = np.log(x)
        columns = slice(NUM_PARAMETERS * place, NUM_PARAMETERS * (place + 1))
        basis[labels == place, columns] = np.vander(log_x - log_x.mean(), 3)
    y = np.concatenate([y for _, y in groups]) / scales
    found = outlying(basis, y, groups=labels.tolist(), least=NUM_PARAMETERS + 1)
    rest = np.setdiff1d(np.arange(len(y)), found)
    others = basis @ (np.linalg.pinv(basis[rest]) @ y[rest]) * scales
    return [(index, float(others[index])) for index in found]


def parabola_at(
    x: Numbers,
    y: Numbers,
    reach: tuple[float, float],
    log_optimum: float,
    samples: Numbers,
    confidence: float,
) -> Parabola:
    """The best parabola with a given minimum, for plots; without a minimum, the best of all.

    Args:
        x: x of the runs, (n,).
        y: y of the runs, (n,).
        reach: range of x in which a minimum counts.
        log_optimum: ln x at the minimum; infinite without one.
        samples: bootstrap samples of `log_optimum`, (S,).
        confidence: level of the interval.
    """
    low, high = np.log(reach)
    optimum = None
    if low < log_optimum < high:
        inside = interval(log_optimum, samples, confidence)
        ends = [math.exp(end) if math.isfinite(end) else end for end in (inside.low, inside.high)]
        optimum = Interval(math.exp(log_optimum), *ends)
    centre = log_optimum if optimum else float(np.log(x).mean())
    basis = np.vander(np.log(x) - centre, 3)[:, [0, 2] if optimum else [0, 1, 2]]
    found = np.linalg.pinv(basis) @ y
    square, slope, constant = (found[0], 0.0, found[1]) if optimum else found
    moved = [square, slope - 2 * square * centre, constant - slope * centre + square * centre**2]
    clipped = np.clip(samples, low - _BEYOND, high + _BEYOND)
    return Parabola(np.array(moved), optimum, log_optimum, clipped)


def _lowest(curves: Numbers) -> Numbers:
    """Position of the minimum of each parabola (S, 3); infinite, on its lower side, without one."""
    square, slope, _ = curves.T
    opens = square > 0
    lowest: Numbers = np.where(
        opens, -slope / np.where(opens, 2 * square, 1), np.copysign(np.inf, -slope)
    )
    return lowest
