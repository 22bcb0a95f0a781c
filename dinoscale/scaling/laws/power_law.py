"""Laws y = E + A / x^a along one quantity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinoscale.scaling.laws.bootstrap import band, draw_noise, interval
from dinoscale.scaling.laws.laws import Band, Interval, Numbers, PowerLaw
from dinoscale.scaling.laws.robust_fit import (
    DELTA,
    fit_powers,
    law_slopes,
    log_law,
    refit_powers,
    scaled_delta,
)
from dinoscale.scaling.laws.selection import Point, best_along, size_of

NUM_PARAMETERS = 3


@dataclass(frozen=True)
class Powers:
    """A fit of E + sum of A_k / x_k^a_k, and its bootstrap.

    Attributes:
        theta: E, log A and a, where x is divided by `smallest`, (1, P).
        samples: the same of every sample, (S, P).
        smallest: x, (K,).
        residuals: log y - log of the law, (n,).
        run_noise: of one more run in log y, as every sample has it, (S,).
    """

    theta: Numbers
    samples: Numbers
    smallest: Numbers
    residuals: Numbers
    run_noise: Numbers

    def at(self, x: Numbers, theta: Numbers) -> Numbers:
        """The law (S, n) of parameters (S, P) at x (n, K)."""
        return np.exp(log_law(theta, np.log(x / self.smallest)))

    def slopes(self, x: Numbers) -> Numbers:
        """Derivatives of the log of the fitted law by its parameters at x (n, K), (n, P)."""
        slopes: Numbers = law_slopes(self.theta, np.log(x / self.smallest))[0]
        return slopes

    def band(self, x: Numbers, confidence: float) -> Band:
        """The law and its interval at x, (n, K)."""
        return band(self.at(x, self.theta)[0], self.at(x, self.samples), confidence)

    def run_at(self, x: Numbers, confidence: float) -> Interval:
        """What one run at x (K,) may give: its prediction interval."""
        drawn = self.at(x[None], self.samples)[:, 0] * np.exp(self.run_noise)
        return interval(float(self.at(x[None], self.theta)[0, 0]), drawn, confidence)

    def in_units(self, theta: Numbers) -> Numbers:
        """E, log A and a of x in its own units, (S, P)."""
        count = len(self.smallest)
        moved = theta.copy()
        moved[:, 1 : 1 + count] += theta[:, 1 + count :] * np.log(self.smallest)
        return moved


def fit(x: Numbers, log_y: Numbers, *, samples: int, seed_variance: float = 0.0) -> Powers:
    """Fit and bootstrap.

    The width of Huber's loss is that of Hoffmann et al. at the least, and grows with the noise.

    Args:
        x: (n, K).
        log_y: (n,), n >= 1 + 2 K.
        samples: S; 0 for the fit alone.
        seed_variance: how much further one run scatters in log y than a point, which is the mean
            over seeds.
    """
    smallest = x.min(0)
    log_x = np.log(x / smallest)
    scale = log_y.mean()  # y of any size is fitted alike
    log_y = log_y - scale
    theta = fit_powers(log_x, log_y, delta=DELTA)
    delta = scaled_delta(log_y - log_law(theta[None], log_x)[0], num_parameters=len(theta))
    theta = fit_powers(log_x, log_y, delta=delta)
    law = log_law(theta[None], log_x)[0]
    residuals = log_y - law
    degrees = len(log_y) - len(theta) if samples else 0
    # The last column is one more run, as uncertain of its noise as the sample is.
    noise = draw_noise(residuals, degrees=degrees, samples=samples, runs=1)
    noise, run_noise = noise[:, :-1], noise[:, -1]
    spread = float((residuals**2).sum()) / max(degrees, 1)
    run_noise = run_noise * np.sqrt(1 + seed_variance / spread) if spread else run_noise
    again = refit_powers(theta, log_x, law + noise, delta=delta) if len(noise) else noise
    both = np.concatenate((theta[None], again.reshape(-1, len(theta))))
    both[:, 0] *= np.exp(scale)
    both[:, 1 : 1 + x.shape[1]] += scale
    return Powers(both[:1], both[1:], smallest, residuals, run_noise)


def fit_law(
    points: Sequence[Point], quantity: str, *, confidence: float, samples: int
) -> PowerLaw | None:
    """The law over the best settings along a quantity.

    Returns:
        None with fewer than three values, or where y does not fall.
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
    """Whether log y falls with each log x while the others stay, by least squares, (K,)."""
    log_x = np.log(x)
    slopes = np.linalg.lstsq(log_x - log_x.mean(0), log_y - log_y.mean(), rcond=None)[0]
    return [bool(slope < -1e-9) for slope in slopes]


def explained(residuals: Numbers, log_y: Numbers) -> float:
    """Share of the variance of log y."""
    return float(1 - (residuals**2).sum() / ((log_y - log_y.mean()) ** 2).sum())


def _left_out_error(x: Numbers, log_y: Numbers) -> float | None:
    if len(x) <= NUM_PARAMETERS:
        return None
    fitted = fit(x[:-1], log_y[:-1], samples=0)
    return float(fitted.at(x[-1:], fitted.theta)[0, 0] / np.exp(log_y[-1]) - 1)
