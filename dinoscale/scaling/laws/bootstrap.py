"""Intervals: what a fit gives for measurements drawn again from the fitted law.

A confidence interval is of the law: where it would be if the sweep were repeated without end. A
prediction interval is of one more run, whose own noise comes on top; it is the wider.

A parametric bootstrap (Efron and Tibshirani 1993, section 6.5) with intervals from one percentile
to the other. Noise is normal in log y, of the variance of the residuals over n - p degrees of
freedom. As that variance is itself an estimate, every sample takes its own, (n - p) / chi^2(n - p)
times as large: in a law that is linear in its p parameters this gives Student's interval exactly.

Differs: Besiroglu et al. 2024 (arXiv:2404.10102) draw runs with replacement. A sweep has a tenth of
their 240 runs, of which such a sample often lacks all at one end, and its intervals are too narrow.
Residuals drawn with replacement are too narrow as well: those of a robust fit crowd at 0.
"""

from __future__ import annotations

import math

import numpy as np

from dinoscale.scaling.laws.laws import Band, Interval, Numbers

_SEED = 20240416  # any: the same table gives the same intervals
_LARGEST = 5.0  # of the noise in log y, where one degree of freedom would allow everything


def draw_noise(residuals: Numbers, *, degrees: int, samples: int, runs: int = 0) -> Numbers:
    """Noise in log y for each sample and point, (S, n + runs); none of 0 degrees, (0, n + runs).

    Args:
        residuals: of the fit, (n,).
        degrees: of freedom, points less parameters.
        samples: S.
        runs: points more, that the fit has not seen.
    """
    spread = math.sqrt((residuals**2).sum() / max(degrees, 1))
    noise = spread * draw_units(len(residuals) + runs, degrees=degrees, samples=samples)
    return np.clip(noise, -_LARGEST, _LARGEST)


def draw_units(count: int, *, degrees: int, samples: int) -> Numbers:
    """The same for a spread of 1, (S, count): Student's t that a sample has in common."""
    if degrees <= 0:
        return np.zeros((0, count))
    generator = np.random.default_rng(_SEED)
    own = np.sqrt(degrees / generator.chisquare(degrees, (samples, 1)))
    return np.asarray(own * generator.standard_normal((samples, count)))


def interval(value: float, samples: Numbers, confidence: float) -> Interval:
    """Of samples (S,); infinite without any. The estimate is always inside."""
    low, high = ends(samples[:, None], confidence)
    return Interval(value, min(value, float(low[0])), max(value, float(high[0])))


def band(value: Numbers, samples: Numbers, confidence: float) -> Band:
    """Of a curve (n,) and its samples (S, n)."""
    low, high = ends(samples, confidence)
    return Band(value, np.minimum(low, value), np.maximum(high, value))


def ends(samples: Numbers, confidence: float) -> tuple[Numbers, Numbers]:
    """Lower and upper ends (n,) of samples (S, n), which may be infinite."""
    if not len(samples):
        infinite = np.full(samples.shape[1:], math.inf)
        return -infinite, infinite
    # No value between two samples: one of them may be infinite.
    low = np.quantile(samples, (1 - confidence) / 2, axis=0, method="lower")
    high = np.quantile(samples, (1 + confidence) / 2, axis=0, method="higher")
    return low, high
