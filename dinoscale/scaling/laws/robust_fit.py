"""Robust fits of y = E + A_1 / x_1^a_1 + ... + A_K / x_K^a_K with E, A >= 0, many at once.

The objective is the sum over points of Huber(log y - log of the law), as in approach 3 of Hoffmann
et al. 2022 (arXiv:2203.15556). Besiroglu et al. 2024 (arXiv:2404.10102) could not reproduce its
numbers: the loss was averaged over the points, so the optimiser met its tolerance too early, and
the intervals were far too narrow. Here a fit stops only when both loss and step have converged, and
starts on a grid over all exponents; for given exponents, E and A follow by linear least squares.

Shape letters: S fits, n points, K quantities, P = 1 + 2 K parameters in the order E, log A, a.
Every x_k is first divided by its smallest value, so that A_k is the term at the smallest x.
"""

from __future__ import annotations

import itertools

import numpy as np

from dinoscale.scaling.laws.laws import Numbers

EXPONENTS = (0.01, 3.0)  # allowed
DELTA = 1e-3  # width of Huber's loss in Hoffmann et al. 2022
_EFFICIENT = 1.345  # standard deviations: 95 % efficiency of least squares for normal noise
_NORMAL_MEDIAN = 0.6745  # median absolute value over standard deviation, normal distribution
_GRID = np.geomspace(0.02, 2.5, 9)
_STARTS = 16
_SMALLEST = 1e-9  # lower bound of A over the largest y
_CURVATURE = 0.3  # times delta / |residual| beyond delta, where the loss is linear: longer steps
_MAX_ITERATIONS = 400
_TOLERANCE = 1e-11  # relative change of the loss; its root bounds the change of the parameters
_PATIENCE = 3  # consecutive iterations within the tolerance


def scaled_delta(residuals: Numbers, *, num_parameters: int) -> float:
    """Width of Huber's loss adapted to the noise, from residuals (n,) of a fit with `DELTA`.

    Differs: Hoffmann et al. use 1e-3. DINO runs scatter ten times as much; a loss that is linear
    for nearly all of them amounts to a median regression, which needs half again as many runs.
    Huber 1981, "Robust Statistics": 1.345 standard deviations, estimated from the median of the
    absolute residuals without the P smallest, which the fit makes vanish.
    """
    rest = np.sort(np.abs(residuals))[num_parameters:]
    median = float(np.median(rest)) if len(rest) else 0.0
    return max(DELTA, _EFFICIENT * median / _NORMAL_MEDIAN)


def log_law(theta: Numbers, log_x: Numbers) -> Numbers:
    """Log of the law of each fit, (S, n), from (S, P) and (n, K), or (S, n, K)."""
    return np.log(_parts(theta, log_x)[1])


def law_slopes(theta: Numbers, log_x: Numbers) -> Numbers:
    """Derivatives of `log_law` by the parameters, (S, n, P)."""
    return _slopes(*_parts(theta, log_x), log_x)


def _slopes(terms: Numbers, total: Numbers, log_x: Numbers) -> Numbers:
    shares = terms / total[..., None]
    return np.concatenate((1 / total[..., None], shares, -shares * log_x), -1)


def fit_power_law(log_x: Numbers, log_y: Numbers, *, delta: float) -> Numbers:
    """The best fit to one set of points, polished from the best points of the grid.

    Args:
        log_x: log of x over its smallest value, (n, K).
        log_y: (n,).
        delta: width of Huber's loss.

    Returns:
        Parameters of the fit, (P,).
    """
    starts = _grid_starts(log_x, log_y[None])[:, 0]
    targets = np.broadcast_to(log_y, (len(starts), len(log_y)))
    losses = _loss(starts, log_x, targets, delta)
    starts = starts[np.argsort(losses, kind="stable")[:_STARTS]]
    targets = np.broadcast_to(log_y, (len(starts), len(log_y)))
    theta, loss = polish(starts, log_x, targets, delta=delta)
    best: Numbers = theta[np.argmin(loss)]
    return best


def refit_power_law(theta: Numbers, log_x: Numbers, log_y: Numbers, *, delta: float) -> Numbers:
    """Fits to many sets of points at the same x, each from two starts.

    Args:
        theta: one start, the fit to the original points, (P,).
        log_x: as in `fit_power_law`, (n, K).
        log_y: bootstrap samples, (S, n).
        delta: width of Huber's loss.

    Returns:
        Parameters of the fits, (S, P).
    """
    samples = len(log_y)
    starts = _grid_starts(log_x, log_y)  # (G, S, P)
    losses = np.stack([_loss(start, log_x, log_y, delta) for start in starts])  # (G, S)
    nearest = starts[np.argmin(losses, axis=0), np.arange(samples)]
    given = np.broadcast_to(theta, nearest.shape)
    closer = _loss(given, log_x, log_y, delta) < losses.min(0)
    return polish(np.where(closer[:, None], given, nearest), log_x, log_y, delta=delta)[0]


def polish(
    theta: Numbers, log_x: Numbers, log_y: Numbers, *, delta: float
) -> tuple[Numbers, Numbers]:
    """Levenberg-Marquardt within bounds, all fits at once.

    Args:
        theta: starts, (S, P).
        log_x: (n, K).
        log_y: (S, n).
        delta: width of Huber's loss; larger residuals are weighted by delta / |residual|.

    Returns:
        The fits (S, P), and their losses (S,).
    """
    low, high = _bounds(log_y, log_x.shape[1])
    theta = np.clip(theta, low, high)
    loss = _loss(theta, log_x, log_y, delta)
    damping, still = np.full(len(theta), 1e-3), np.zeros(len(theta), dtype=int)
    for _ in range(_MAX_ITERATIONS):
        (rows,) = np.nonzero(still < _PATIENCE)
        if not len(rows):
            break
        ends = low[rows], high[rows]
        step = _step(theta[rows], log_x, log_y[rows], delta, damping[rows], ends)
        moved = np.clip(theta[rows] + step, *ends)
        after = _loss(moved, log_x, log_y[rows], delta)
        better = after <= loss[rows]
        # A rejected step says nothing about convergence unless even the shortest is rejected.
        change = np.where(better, loss[rows] - after, 0) <= _TOLERANCE * loss[rows] + 1e-300
        short = np.abs(moved - theta[rows]).max(1) <= _TOLERANCE**0.5
        still[rows] = np.where(change & short, still[rows] + 1, 0)
        theta[rows] = np.where(better[:, None], moved, theta[rows])
        loss[rows] = np.where(better, after, loss[rows])
        damping[rows] = np.clip(damping[rows] * np.where(better, 0.2, 8), 1e-12, 1e12)
    return theta, loss


def _bounds(log_y: Numbers, num_x: int) -> tuple[Numbers, Numbers]:
    """Lower and upper bounds of the parameters, (S, P) each."""
    smallest, largest = log_y.min(1), log_y.max(1)
    fits, ones = len(log_y), np.ones((len(log_y), num_x))
    low = [np.zeros((fits, 1)), ones * (largest[:, None] + np.log(_SMALLEST)), ones * EXPONENTS[0]]
    high = [np.exp(smallest[:, None] + 1), ones * (largest[:, None] + 2), ones * EXPONENTS[1]]
    return np.concatenate(low, 1), np.concatenate(high, 1)


def _parts(theta: Numbers, log_x: Numbers) -> tuple[Numbers, Numbers]:
    """Terms (S, n, K) and their sum with E (S, n)."""
    num_x = log_x.shape[-1]
    coefficients, exponents = theta[:, None, 1 : 1 + num_x], theta[:, None, 1 + num_x :]
    terms = np.exp(coefficients - exponents * log_x)
    return terms, theta[:, :1] + terms.sum(-1)


def _loss(theta: Numbers, log_x: Numbers, log_y: Numbers, delta: float) -> Numbers:
    size = np.abs(log_y - log_law(theta, log_x))
    inside = np.minimum(size, delta)
    total: Numbers = (inside * (size - inside / 2)).sum(-1)
    return total


def _step(
    theta: Numbers,
    log_x: Numbers,
    log_y: Numbers,
    delta: float,
    damping: Numbers,
    ends: tuple[Numbers, Numbers],
) -> Numbers:
    terms, total = _parts(theta, log_x)
    slopes, residual = _slopes(terms, total, log_x), log_y - np.log(total)
    weight = delta / np.maximum(np.abs(residual), delta)
    weighted = slopes * weight[..., None]
    gradient = (weighted * residual[..., None]).sum(1)  # the loss falls in this direction
    curved = slopes * np.where(weight < 1, _CURVATURE * weight, 1)[..., None]
    matrix = np.swapaxes(curved, 1, 2) @ slopes
    held = ((theta <= ends[0]) & (gradient < 0)) | ((theta >= ends[1]) & (gradient > 0))
    matrix[held[:, :, None] | held[:, None, :]] = 0
    index = np.arange(theta.shape[1])
    diagonal = matrix[:, index, index]
    ridge = 1e-12 * diagonal.max(1, keepdims=True) + 1e-300
    matrix[:, index, index] = diagonal + damping[:, None] * np.maximum(diagonal, ridge) + held
    matrix[:, index, index] += ridge
    step = np.linalg.solve(matrix, np.where(held, 0, gradient)[..., None])[..., 0]
    return np.asarray(step, dtype=np.float64)


def _grid_starts(log_x: Numbers, log_y: Numbers) -> Numbers:
    """Least squares, relative to y, at every point of the grid of exponents, (G, S, P)."""
    num_x = log_x.shape[1]
    scale = np.exp(log_y.mean(0))  # of each point: errors are relative
    relative = np.exp(log_y) / scale  # (S, n)
    exponents = np.array(list(itertools.product(_GRID, repeat=num_x)))  # (G, K)
    terms = np.exp(-exponents[:, None] * log_x)  # (G, n, K)
    columns = np.concatenate((np.ones_like(terms[..., :1]), terms), -1) / scale[:, None]
    linear = np.einsum("sn,gpn->gsp", relative, np.linalg.pinv(columns))
    without = np.einsum("sn,gpn->gsp", relative, np.linalg.pinv(columns[..., 1:]))  # E = 0
    coefficients = np.where(linear[..., :1] < 0, without, linear[..., 1:])
    given = np.broadcast_to(exponents[:, None], coefficients.shape)
    starts = (linear[..., :1], np.log(np.maximum(coefficients, 1e-300)), given)
    within: Numbers = np.clip(np.concatenate(starts, -1), *_bounds(log_y, num_x))
    return within
