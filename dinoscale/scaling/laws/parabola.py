"""Parabolas of y over log x with a minimum: best learning rates.

Parabolas that belong together, such as those of several budgets, share their noise: each alone
leaves few degrees of freedom or none. Every run is a point, so that seeds tell the noise.
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
_BEYOND = math.log(10)  # outside of the runs a parabola says nothing


@dataclass(frozen=True)
class Parabola:
    """One of them.

    Attributes:
        curve: coefficients in ln x, highest power first, (3,).
        optimum: x at the minimum; None where it has none between the smallest and the largest x.
        log_optimum: ln x at the minimum.
        samples: of `log_optimum`, at most ten times outside of the runs, (S,).
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
    """Least squares for each, a common bootstrap.

    Args:
        groups: x and y of each, (n,), at least three different x.
        reaches: between which x of each a minimum counts: the smallest and largest that were run,
            those too that have diverged.
        confidence: of the intervals.
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
        made.append(made_of(x, y, reach, lowest, centre + _lowest(drawn), confidence))
    return made


def outlying_runs(groups: Sequence[tuple[Numbers, Numbers]]) -> list[tuple[int, float]]:
    """Runs that are outliers of the parabolas of all groups, and what the others have there.

    Args:
        groups: as of `fit_parabolas`.

    Returns:
        Indices into all runs, one group after the other, with y of the parabola without outliers.
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


def made_of(
    x: Numbers,
    y: Numbers,
    reach: tuple[float, float],
    log_optimum: float,
    samples: Numbers,
    confidence: float,
) -> Parabola:
    """A minimum and the parabola that has it there, for plots; without one the best of all.

    Args:
        x: of the runs, (n,).
        y: of the runs, (n,).
        reach: between which x a minimum counts.
        log_optimum: ln x at the minimum; infinite without one.
        samples: of that, (S,).
        confidence: of the interval.
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
    held = np.clip(samples, low - _BEYOND, high + _BEYOND)
    return Parabola(np.array(moved), optimum, log_optimum, held)


def _lowest(curves: Numbers) -> Numbers:
    """Where each (S, 3) is lowest; infinite on the lower side where it opens downwards."""
    square, slope, _ = curves.T
    opens = square > 0
    lowest: Numbers = np.where(
        opens, -slope / np.where(opens, 2 * square, 1), np.copysign(np.inf, -slope)
    )
    return lowest
