"""The robust fit finds the true law where a single start with a loose tolerance does not."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber

from dinoscale.scaling.laws.robust_fit import (
    _TOLERANCE,
    DELTA,
    fit_power_law,
    log_law,
    polish,
    refit_power_law,
    scaled_delta,
)
from tests.unit.scaling.synthetic import Truth, draw, grid

TRUTH = Truth()
STEP = _TOLERANCE**0.5  # at most, of the last ones; steps more than halve, so less is left


def _table(noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log of N and D, the same over the smallest (n, 2) each, and log y (n,)."""
    rows = draw(TRUTH, grid(), noise=noise, seed=seed)
    log_x = np.log([(row.parameters, row.images) for row in rows])
    return log_x, log_x - log_x.min(0), np.log([row.metrics["knn"] for row in rows])


def test_without_noise_the_law_is_found_to_many_digits() -> None:
    log_x, relative, log_y = _table(0)
    theta = fit_power_law(relative, log_y, delta=DELTA)
    assert theta[0] == pytest.approx(TRUTH.irreducible, rel=0, abs=STEP)
    assert theta[3:] == pytest.approx([0.35, 0.4], rel=0, abs=STEP)
    in_units = np.exp(theta[1:3] + theta[3:] * log_x.min(0))
    true = [TRUTH.parameters_coefficient, TRUTH.images_coefficient]
    assert in_units == pytest.approx(true, rel=STEP * (1 + log_x.min(0).max()))


@pytest.mark.parametrize("seed", range(3))
def test_one_start_and_a_loose_tolerance_end_early_and_wrong_and_ours_does_not(seed: int) -> None:
    """The failure that Besiroglu et al. 2024 found: the mean of the losses meets the tolerance."""
    log_x, relative, log_y = _table(0.002, seed)

    def total(theta: np.ndarray) -> float:
        terms = [theta[1] - theta[3] * log_x[:, 0], theta[2] - theta[4] * log_x[:, 1]]
        law = np.logaddexp.reduce([np.full(len(log_y), theta[0]), *terms])
        return float(huber(DELTA, log_y - law).sum())

    start = [-1, 5, 5, 0.5, 0.5]
    careless = minimize(lambda theta: total(theta) / len(log_y), start, method="L-BFGS-B")
    assert careless.success  # it says so
    ours = fit_power_law(relative, log_y, delta=DELTA)
    coefficients = ours[1:3] + ours[3:] * log_x.min(0)
    assert total(careless.x) > 5 * total(np.array([np.log(ours[0]), *coefficients, *ours[3:]]))
    assert abs(careless.x[3] - 0.35) > 0.05
    assert ours[3:] == pytest.approx([0.35, 0.4], abs=0.02)


def test_no_small_change_of_the_fit_lowers_its_loss() -> None:
    _, relative, log_y = _table(0.02)
    theta = fit_power_law(relative, log_y, delta=DELTA)

    def loss(at: np.ndarray) -> float:
        return float(huber(DELTA, log_y - log_law(at[None], relative)[0]).sum())

    generator = np.random.default_rng(0)
    for size in (1e-2, 1e-3, 1e-4):
        for direction in generator.standard_normal((200, 5)):
            assert loss(theta + size * direction) >= loss(theta) * (1 - 1e-9)


def test_many_at_once_are_the_same_as_one_by_one() -> None:
    _, relative, log_y = _table(0.02)
    theta = fit_power_law(relative, log_y, delta=0.02)
    drawn = log_y + 0.01 * np.random.default_rng(0).standard_normal((6, len(log_y)))
    together = refit_power_law(theta, relative, drawn, delta=0.02)
    alone = np.stack([fit_power_law(relative, one, delta=0.02) for one in drawn])
    np.testing.assert_allclose(together, alone, rtol=0, atol=2 * STEP)


def test_a_start_far_off_is_brought_within_the_bounds_and_to_the_same_fit() -> None:
    _, relative, log_y = _table(0.01)
    far = np.array([[99.0, -50.0, 50.0, 9.0, -9.0], [0.0, 0.0, 0.0, 0.3, 0.3]])
    found, losses = polish(far, relative, np.stack((log_y, log_y)), delta=0.02)
    assert np.isfinite(found).all()
    assert losses[1] == pytest.approx(losses.min())
    best = fit_power_law(relative, log_y, delta=0.02)
    np.testing.assert_allclose(found[1], best, rtol=0, atol=2 * STEP)


def test_three_gross_outliers_of_25_hardly_move_the_exponents() -> None:
    _, relative, log_y = _table(0.005)
    log_y[[3, 11, 20]] += 0.5
    delta = scaled_delta(
        log_y - log_law(fit_power_law(relative, log_y, delta=DELTA)[None], relative)[0],
        num_parameters=5,
    )
    theta = fit_power_law(relative, log_y, delta=delta)
    assert theta[3:] == pytest.approx([0.35, 0.4], abs=0.08)


def test_the_width_of_the_loss_follows_the_noise_and_never_falls_below_that_of_the_source() -> None:
    residuals = np.random.default_rng(0).standard_normal(10_000)
    assert scaled_delta(0.02 * residuals, num_parameters=5) == pytest.approx(0.0269, rel=0.03)
    assert scaled_delta(1e-6 * residuals, num_parameters=5) == DELTA
    assert scaled_delta(np.zeros(3), num_parameters=5) == DELTA


def test_no_other_start_finds_a_better_fit() -> None:
    rows = draw(TRUTH, grid(sizes=4), noise=0.05, seed=93)  # the best point of the grid misleads
    log_x = np.log([(row.parameters, row.images) for row in rows])
    relative, log_y = log_x - log_x.min(0), np.log([row.metrics["knn"] for row in rows])
    ours = fit_power_law(relative, log_y, delta=DELTA)
    generator = np.random.default_rng(0)
    starts = generator.uniform([0, -3, -3, 0.05, 0.05], [0.5, 0.5, 0.5, 2, 2], (300, 5))
    targets = np.broadcast_to(log_y, (300, len(log_y)))
    _, losses = polish(starts, relative, targets, delta=DELTA)
    loss = huber(DELTA, log_y - log_law(ours[None], relative)[0]).sum()
    assert loss <= losses.min() * 1.001
