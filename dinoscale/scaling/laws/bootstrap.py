"""Confidence and prediction intervals by a parametric bootstrap.

A confidence interval is about the law: where its value would lie if the sweep were repeated. A
prediction interval is about one further run and includes its noise; it is wider.

The bootstrap (Efron and Tibshirani 1993, section 6.5) refits measurements drawn from the fitted law
and takes percentiles of the results. The noise is normal in log y, with the variance of the
residuals over n - p degrees of freedom. As that variance is itself an estimate, every sample scales
it by its own (n - p) / chi^2(n - p): for a law linear in its p parameters this gives exactly
Student's interval.

Differs: Besiroglu et al. 2024 (arXiv:2404.10102) resample runs with replacement. A sweep has a
tenth of their 240 runs: such a sample often lacks all runs at one end, and the intervals become too
narrow. Resampled residuals are too narrow as well: those of a robust fit cluster at 0.
"""

from __future__ import annotations

import math

import numpy as np

from dinoscale.scaling.laws.laws import Band, Interval, Numbers

_SEED = 20240416  # fixed: the same table gives the same intervals
_MAX_NOISE = 5.0  # in log y: with one degree of freedom, Student's t has no mean


def draw_noise(residuals: Numbers, *, degrees: int, samples: int, runs: int = 0) -> Numbers:
    """Noise in log y for each sample and point, (S, n + runs); empty for 0 degrees of freedom.

    Args:
        residuals: residuals of the fit, (n,).
        degrees: degrees of freedom, points minus parameters.
        samples: S.
        runs: number of further points, which the fit has not seen.
    """
    spread = math.sqrt((residuals**2).sum() / max(degrees, 1))
    noise = spread * draw_student_t(len(residuals) + runs, degrees=degrees, samples=samples)
    return np.clip(noise, -_MAX_NOISE, _MAX_NOISE)


def draw_student_t(count: int, *, degrees: int, samples: int) -> Numbers:
    """Noise of unit scale, (S, count): multivariate Student's t, one chi^2 per sample."""
    if degrees <= 0:
        return np.zeros((0, count))
    generator = np.random.default_rng(_SEED)
    own = np.sqrt(degrees / generator.chisquare(degrees, (samples, 1)))
    return np.asarray(own * generator.standard_normal((samples, count)))


def interval(value: float, samples: Numbers, confidence: float) -> Interval:
    """Interval of samples (S,), infinite if there are none; it always contains the estimate."""
    low, high = ends(samples[:, None], confidence)
    return Interval(value, min(value, float(low[0])), max(value, float(high[0])))


def band(value: Numbers, samples: Numbers, confidence: float) -> Band:
    """Pointwise interval of a curve (n,) from its samples (S, n)."""
    low, high = ends(samples, confidence)
    return Band(value, np.minimum(low, value), np.maximum(high, value))


def ends(samples: Numbers, confidence: float) -> tuple[Numbers, Numbers]:
    """Lower and upper percentiles (n,) of samples (S, n), which may be infinite."""
    if not len(samples):
        infinite = np.full(samples.shape[1:], math.inf)
        return -infinite, infinite
    # No interpolation between two samples: one of them may be infinite.
    low = np.quantile(samples, (1 - confidence) / 2, axis=0, method="lower")
    high = np.quantile(samples, (1 + confidence) / 2, axis=0, method="higher")
    return low, high
