"""Runs that do not belong to a fit: collapsed, diverged, or measured wrongly.

The generalised extreme Studentized deviate test (Rosner 1983, Technometrics 25), with the
Studentized residuals of a regression in place of deviations from a mean (Paul and Fung 1991,
Technometrics 33). Runs are taken away one after the other, always the one farthest out, and all up
to the last that is significant are outliers: several together do not hide each other, as they would
if the test ended at the first that is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from dinoscale.scaling.laws.laws import Numbers

LEVEL = 0.01  # of sweeps without an outlier lose a run
_MOST = 5  # one run of so many may be an outlier, at most
_FREE = 1e-6  # share of its own value that a fit leaves a run, where it leaves any


def outlying(basis: Numbers, y: Numbers, *, groups: Sequence[int], least: int) -> list[int]:
    """Indices of the outliers of a linear model, the farthest first.

    Args:
        basis: what y is linear in, (n, P).
        y: (n,).
        groups: of each observation; coefficients of one group tell nothing about another.
        least: observations that stay in every group: one more than its coefficients, as with
            fewer nothing says which is the outlier.
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
