"""Best learning rates, for each group of runs that differ in nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dinoscale.scaling.laws import BestRate
from dinoscale.scaling.parabola import fit_parabolas
from dinoscale.scaling.points import setting_key
from dinoscale.sweep.table import Row

NUM_RATES = 3


def fit_rates(
    rows: Sequence[Row], metric: str, *, confidence: float, samples: int
) -> list[BestRate]:
    """A parabola in ln lr for every group with at least three rates; the smallest models first."""
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
    parabolas = fit_parabolas(xy, confidence=confidence, samples=samples) if xy else []
    return [
        BestRate(
            _label(group[0]),
            group[0].parameters,
            group[0].batch_size,
            lr,
            y,
            parabola.curve,
            parabola.optimum,
        )
        for group, (lr, y), parabola in zip(enough, xy, parabolas, strict=True)
    ]


def _label(row: Row) -> str:
    varied = [
        f"{name} {value}"
        for name, value in row.axes.items()
        if isinstance(value, str | int | float) and name.rsplit(".")[-1] not in ("lr", "seed")
    ]
    sizes = f"{row.parameters:.3g} parameters, {row.images:.3g} images, batch {row.batch_size}"
    return f"{sizes} ({', '.join(varied)})" if varied else sizes
