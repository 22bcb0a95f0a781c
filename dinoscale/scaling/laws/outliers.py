"""Detect outliers of a fit: runs that collapsed, diverged, or were measured wrongly.

The generalised extreme Studentized deviate test (Rosner 1983, Technometrics 25), with the
Studentized residuals of a regression in place of deviations from a mean (Paul and Fung 1991,
Technometrics 33). It removes one run after another, always the most extreme; all runs up to the
last significant one are outliers. So several outliers cannot mask each other, as they would if the
test stopped at the first run that is not significant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from dinoscale.scaling.laws.laws import Numbers

LEVEL = 0.01  # significance level: the fraction of clean sweeps that lose a run
_MOST = 5  # at most one run in five may be an outlier
_FREE = 1e-6  # 1 - leverage, below which a run determines its own fitted value


def outlying(basis: Numbers, y: Numbers, *, groups: Sequence[int], least: int) -> list[int]:
    """Indices of the outliers of a linear model, most extreme first.

    Args:
        basis: design matrix, (n, P).
        y: observations, (n,).
        groups: group of each observation; no coefficient is shared between groups.
        least: observations to keep in every group: one more than its coefficients, as with fewer
            the outlier cannot be identified.
    """
    kept, taken, found = np.arange(len(y)), list[int](), 0
    labels = np.asarray(groups)
    for _ in range(len(y) // _MOST):
        degrees = len(kept) - basis.shape[1]
        sizes = np.bincount(labels[kept], minlength=labels.max() + 1)
        candidates = sizes[labels[kept]] > least
        if degrees < 2 or not candidates.any():
            break
        axes = np.linalg.qr(basis[kept])[0]
        residuals = y[kept] - axes @ (axes.T @ y[kept])
        free = 1 - (axes**2).sum(1)
        squares = np.where(candidates & (free > _FREE), residuals**2 / np.maximum(free, _FREE), 0)
        farthest = int(np.argmax(squares))
        rest = max((residuals**2).sum() - squares[farthest], 0) / (degrees - 1)  # without it
        limit = stdtrit(degrees - 1, 1 - LEVEL / 2 / len(kept))
        taken.append(int(kept[farthest]))
        kept = np.delete(kept, farthest)
        if squares[farthest] > limit**2 * max(rest, 1e-24 * float((y**2).mean())):
            found = len(taken)
    return taken[:found]
