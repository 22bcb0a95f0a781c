"""Whether two classifiers differ by more than chance, tested on the images that both answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIGNIFICANT = 0.05  # of the corrected probability


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same images.

    Attributes:
        only_first: images that the first alone answers rightly.
        only_second: those of the second.
        p: of McNemar's exact test, two-sided: how likely so unequal numbers are, if each of these
            images were as likely to be answered rightly by either.
    """

    only_first: int
    only_second: int
    p: float


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
    """Compare which answers of two classifiers are right, (M,) each of the same images.

    Source: McNemar 1947; the exact test is binomial with probability one half.
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    p = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return Paired(only_first, only_second, p)


def holm(ps: Sequence[float]) -> list[float]:
    """Correct probabilities of several tests for their number (Holm 1979), in their order."""
    corrected, least = [0.0] * len(ps), 0.0
    for place, test in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - place) * ps[test]))
        corrected[test] = least
    return corrected
