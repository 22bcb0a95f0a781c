"""Power laws y = E + A / x^a along one quantity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinoscale.scaling.laws.bootstrap import band, draw_noise, interval
from dinoscale.scaling.laws.laws import Band, Interval, Numbers, PowerLaw
from dinoscale.scaling.laws.robust_fit import (
    DELTA,
    fit_power_law,
    law_slopes,
    log_law,
    refit_power_law,
    scaled_delta,
)
from dinoscale.scaling.laws.selection import Point, best_along, size_of

NUM_PARAMETERS = 3


@dataclass(frozen=True)
class PowerLawFit:
    """A fit of E + sum of A_k / x_k^a_k, and its bootstrap.

    Attributes:
        theta: E, log A and a, for x divided by `smallest`, (1, P).
        samples: bootstrap samples of theta, (S, P).
        smallest: smallest x, (K,).
        residuals: log y - log of the law, (n,).
        run_noise: noise of one further run in log y, one value per sample, (S,).
    """

    theta: Numbers
    samples: Numbers
    smallest: Numbers
    residuals: Numbers
    run_noise: Numbers

    def at(self, x: Numbers, theta: Numbers) -> Numbers:
        """Values (S, n) of the laws with parameters (S, P) at x (n, K)."""
        return np.exp(log_law(theta, np.log(x / self.smallest)))

    def slopes(self, x: Numbers) -> Numbers:
        """Derivatives of the log of the fitted law by its parameters, (n, P), at x (n, K)."""
        slopes: Numbers = law_slopes(self.theta, np.log(x / self.smallest))[0]
        return slopes

    def band(self, x: Numbers, confidence: float) -> Band:
        """The law and its interval at x, (n, K)."""
        return band(self.at(x, self.theta)[0], self.at(x, self.samples), confidence)

    def run_at(self, x: Numbers, confidence: float) -> Interval:
        """Prediction interval of one run at x (K,)."""
        drawn = self.at(x[None], self.samples)[:, 0] * np.exp(self.run_noise)
        return interval(float(self.at(x[None], self.theta)[0, 0]), drawn, confidence)

    def in_units(self, theta: Numbers) -> Numbers:
        """E, log A and a for x in its original units, (S, P)."""
        count = len(self.smallest)
        moved = theta.copy()
        moved[:, 1 : 1 + count] += theta[:, 1 + count :] * np.log(self.smallest)
        return moved


def fit(x: Numbers, log_y: Numbers, *, samples: int, seed_variance: float = 0.0) -> PowerLawFit:
    """Fit the law and bootstrap it.

    The width of Huber's loss grows with the noise; it is at least that of Hoffmann et al.

    Args:
        x: (n, K).
        log_y: (n,), n >= 1 + 2 K.
        samples: S; 0 for no bootstrap.
        seed_variance: variance in log y of a single run beyond that of a point, which is the mean
            over seeds.
    """
    smallest = x.min(0)
    log_x = np.log(x / smallest)
    scale = log_y.mean()  # so that the fit does not depend on the unit of y
    log_y = log_y - scale
    theta = fit_power_law(log_x, log_y, delta=DELTA)
    delta = scaled_delta(log_y - log_law(theta[None], log_x)[0], num_parameters=len(theta))
    theta = fit_power_law(log_x, log_y, delta=delta)
    law = log_law(theta[None], log_x)[0]
    residuals = log_y - law
    degrees = len(log_y) - len(theta) if samples else 0
    # The last column is one further run, with the noise level of its sample.
    noise = draw_noise(residuals, degrees=degrees, samples=samples, runs=1)
    noise, run_noise = noise[:, :-1], noise[:, -1]
    spread = float((residuals**2).sum()) / max(degrees, 1)
    run_noise = run_noise * np.sqrt(1 + seed_variance / spread) if spread else run_noise
    again = refit_power_law(theta, log_x, law + noise, delta=delta) if len(noise) else noise
    both = np.concatenate((theta[None], again.reshape(-1, len(theta))))
    both[:, 0] *= np.exp(scale)
    both[:, 1 : 1 + x.shape[1]] += scale
    return PowerLawFit(both[:1], both[1:], smallest, residuals, run_noise)


def fit_law(
    points: Sequence[Point], quantity: str, *, confidence: float, samples: int
) -> PowerLaw | None:
    """The law fitted to the best settings along a quantity.

    Returns:
        The law; None with fewer than three values, or where y does not fall.
    """
    best = best_along(points, quantity)
    x = np.array([size_of(quantity)(point) for point in best])
    log_y = np.array([point.log_y for point in best])
    if len(best) < NUM_PARAMETERS or not falls(x[:, None], log_y)[0]:
        return None
    fitted = fit(x[:, None], log_y, samples=samples)
    value, drawn = fitted.in_units(fitted.theta)[0], fitted.in_units(fitted.samples)
    return PowerLaw(
        quantity,
        irreducible=interval(value[0], drawn[:, 0], confidence),
        coefficient=interval(np.exp(value[1]), np.exp(drawn[:, 1]), confidence),
        exponent=interval(value[2], drawn[:, 2], confidence),
        x=x,
        y=np.exp(log_y),
        residuals=fitted.residuals,
        r2=explained(fitted.residuals, log_y),
        left_out_error=_left_out_error(x[:, None], log_y),
        band=lambda at: fitted.band(np.asarray(at, dtype=np.float64)[:, None], confidence),
    )


def falls(x: Numbers, log_y: Numbers) -> list[bool]:
    """Whether log y falls with each log x at constant others, by least squares, (K,)."""
    log_x = np.log(x)
    slopes = np.linalg.lstsq(log_x - log_x.mean(0), log_y - log_y.mean(), rcond=None)[0]
    return [bool(slope < -1e-9) for slope in slopes]


def explained(residuals: Numbers, log_y: Numbers) -> float:
    """Fraction of the variance of log y that a fit with these residuals explains (r2)."""
    return float(1 - (residuals**2).sum() / ((log_y - log_y.mean()) ** 2).sum())


def _left_out_error(x: Numbers, log_y: Numbers) -> float | None:
    if len(x) <= NUM_PARAMETERS:
        return None
    fitted = fit(x[:-1], log_y[:-1], samples=0)
    return float(fitted.at(x[-1:], fitted.theta)[0, 0] / np.exp(log_y[-1]) - 1)
