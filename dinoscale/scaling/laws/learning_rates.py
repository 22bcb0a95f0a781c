"""The best learning rate of each group of runs that differ in nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dinoscale.scaling.laws.laws import BestRate, Numbers
from dinoscale.scaling.laws.parabola import Parabola, fit_parabolas, outlying_runs
from dinoscale.scaling.laws.selection import setting_key
from dinoscale.scaling.sweep.table import Row

NUM_RATES = 3  # that a parabola needs
_DIVERGED = 1.5  # times the best y of a group; beyond it a parabola does not hold either


def fit_rates(
    rows: Sequence[Row], metric: str, *, confidence: float, samples: int
) -> list[BestRate]:
    """A parabola in ln lr for every group with at least three rates, smallest models first.

    Diverged runs and outliers (`parabola.outlying_runs`) are kept for plots only.
    """
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.parameters, row.images, row.batch_size, row.lr)):
        if 0 < row.lr < math.inf:
            groups.setdefault(setting_key(row, any_rate=True), []).append(row)
    enough = [group for group in groups.values() if len({row.lr for row in group}) >= NUM_RATES]
    xy = [
        (
            np.array([row.lr for row in group]),
            np.array([row.metrics[metric] for row in group], dtype=np.float64),
        )
        for group in enough
    ]
    near = _near(xy)
    usable = [(lr, y, mask) for (lr, y), mask in zip(xy, near, strict=True) if mask.any()]
    fitted = iter(
        fit_parabolas(
            [(lr[mask], y[mask]) for lr, y, mask in usable],
            reaches=[(float(lr.min()), float(lr.max())) for lr, _, _ in usable],
            confidence=confidence,
            samples=samples,
        )
        if usable
        else ()
    )
    return [
        _best_rate(group, lr, y, mask, next(fitted) if mask.any() else None)
        for group, (lr, y), mask in zip(enough, xy, near, strict=True)
    ]


def _near(xy: Sequence[tuple[Numbers, Numbers]]) -> list[NDArray[np.bool_]]:
    """Mask of the runs that each parabola is fitted to; empty where too few rates remain."""
    near = [y <= _DIVERGED * y.min() for _, y in xy]
    places = [(group, place) for group, mask in enumerate(near) for place in np.flatnonzero(mask)]
    close = [(lr[mask], y[mask]) for (lr, y), mask in zip(xy, near, strict=True)]
    for index, _ in outlying_runs(close):
        group, place = places[index]
        near[group][place] = False
    enough = [len(set(lr[mask])) >= NUM_RATES for (lr, _), mask in zip(xy, near, strict=True)]
    return [mask & several for mask, several in zip(near, enough, strict=True)]


def _best_rate(
    group: Sequence[Row],
    lr: Numbers,
    y: Numbers,
    near: NDArray[np.bool_],
    parabola: Parabola | None,
) -> BestRate:
    return BestRate(
        _label(group[0]),
        group[0].parameters,
        group[0].batch_size,
        lr,
        y,
        parabola.curve if parabola else np.full(3, np.nan),
        parabola.optimum if parabola else None,
        tuple(row.name for row, kept in zip(group, near, strict=True) if not kept),
        group[0].images,
    )


def _label(row: Row) -> str:
    varied = [
        f"{name} {value}"
        for name, value in row.axes.items()
        if isinstance(value, str | int | float) and name.rsplit(".")[-1] not in ("lr", "seed")
    ]
    sizes = f"{row.parameters:.3g} parameters, {row.images:.3g} images, batch {row.batch_size}"
    return f"{sizes} ({', '.join(varied)})" if varied else sizes
