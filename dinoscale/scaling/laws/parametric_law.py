"""The joint law y = E + A / N^a + B / D^b, and the best N and D that follow from it.

Hoffmann et al. 2022 (arXiv:2203.15556), approach 3 and eq. 4, with k N^g FLOPs per image instead of
6 N: crops, patches and the head make g differ from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinoscale.scaling.laws.bootstrap import band, interval
from dinoscale.scaling.laws.laws import Frontier, JointLaw, Numbers, Optimum
from dinoscale.scaling.laws.power_law import PowerLawFit, explained, falls, fit
from dinoscale.scaling.laws.selection import Point, close_groups, tuned
from dinoscale.scaling.number_text import SAME

NUM_PARAMETERS = 5
NUM_SIZES = 3  # of N, and of D: two do not determine the exponent


@dataclass(frozen=True)
class ImageCost:
    """Training FLOPs per image, k N^g.

    Attributes:
        log_factor: log k.
        exponent: g.
        error: largest relative error over the runs.
    """

    log_factor: float
    exponent: float
    error: float


@dataclass(frozen=True)
class JointFit:
    """The joint law, and what its frontier needs.

    Attributes:
        law: the law with its intervals.
        fit: the fit and its bootstrap samples.
        falls: whether y falls with N, and with D.
    """

    law: JointLaw
    fit: PowerLawFit
    falls: tuple[bool, bool]


def fit_cost(points: Sequence[Point]) -> ImageCost:
    """Fit the cost per image to at least two model sizes."""
    log_n = np.log([float(point.row.parameters) for point in points])
    log_f = np.log([float(point.row.flops_per_image) for point in points])
    exponent, log_factor = np.polyfit(log_n, log_f, 1)
    error = np.abs(np.expm1(log_factor + exponent * log_n - log_f)).max()
    return ImageCost(float(log_factor), float(exponent), float(error))


def why_no_joint(points: Sequence[Point]) -> str:
    """Why the settings do not support the joint law; empty if they do."""
    best = tuned(points)
    sizes = len({point.row.parameters for point in best})
    images = len(set(close_groups([point.row.images for point in best])))
    if len(best) < NUM_PARAMETERS:
        need = f"{NUM_PARAMETERS} settings of model and images; there are {len(best)}"
    elif min(sizes, images) < NUM_SIZES:
        need = (
            f"{NUM_SIZES} model sizes and {NUM_SIZES} numbers of images;"
            f" there are {sizes} and {images}"
        )
    elif len({round(point.log_y, 9) for point in best}) == 1:
        need = "two different results; all are the same"
    else:
        return ""
    return f"The joint law in parameters and images needs at least {need}."


def fit_joint(points: Sequence[Point], *, confidence: float, samples: int) -> JointFit:
    """Fit the best setting of each N and D; requires that `why_no_joint` is empty."""
    best = tuned(points)
    x, log_y = sizes_of(best), np.array([point.log_y for point in best])
    fitted = fit(x, log_y, samples=samples, seed_variance=_seed_variance(best))
    value, drawn = fitted.in_units(fitted.theta)[0], fitted.in_units(fitted.samples)
    value[1:3], drawn[:, 1:3] = np.exp(value[1:3]), np.exp(drawn[:, 1:3])
    of = [interval(float(value[i]), drawn[:, i], confidence) for i in range(NUM_PARAMETERS)]
    law = JointLaw(
        irreducible=of[0],
        parameters_coefficient=of[1],
        parameters_exponent=of[3],
        images_coefficient=of[2],
        images_exponent=of[4],
        names=tuple(point.row.name for point in best),
        residuals=fitted.residuals,
        r2=explained(fitted.residuals, log_y),
        left_out_error=_left_out_error(best),
        band=lambda n, d: fitted.band(_stacked(n, d), confidence),
    )
    first, second = falls(x, log_y)
    return JointFit(law, fitted, (first, second))


def _seed_variance(points: Sequence[Point]) -> float:
    """Variance in log y of one run beyond that of the mean over the seeds of its setting."""
    degrees = sum(len(point.y) - 1 for point in points)
    if degrees == 0:
        return 0.0
    within = sum(len(p.y) * float(np.log(p.y).var()) for p in points) / degrees
    return within * (1 - float(np.mean([1 / len(point.y) for point in points])))


def sizes_of(points: Sequence[Point]) -> Numbers:
    """N and D, (n, 2)."""
    return np.array([(point.row.parameters, point.row.images) for point in points], np.float64)


def _stacked(parameters: Numbers, images: Numbers) -> Numbers:
    return np.stack(np.broadcast_arrays(parameters, images), -1).astype(np.float64)


def _left_out_error(points: Sequence[Point]) -> float | None:
    largest = max(point.row.flops for point in points)
    rest = [point for point in points if point.row.flops * (1 + SAME) < largest]
    if why_no_joint(rest):
        return None
    left = [point for point in points if point not in rest]
    fitted = fit(sizes_of(rest), np.array([point.log_y for point in rest]), samples=0)
    log_law = np.log(fitted.at(sizes_of(left), fitted.theta)[0])
    return float(np.abs(np.expm1(log_law - [point.log_y for point in left])).max())


def joint_frontier(fitted: JointFit, cost: ImageCost, *, confidence: float) -> Frontier:
    """N ~ C^(b / (a + g b)), where the slopes of both terms balance."""
    powers = fitted.fit
    value, drawn = _exponents(powers.theta, cost), _exponents(powers.samples, cost)
    return Frontier(
        "joint",
        parameters_exponent=interval(float(value[0]), drawn, confidence),
        images_exponent=interval(
            float(1 - cost.exponent * value[0]), 1 - cost.exponent * drawn, confidence
        ),
        optimum=lambda flops: band(
            _best_sizes(powers, powers.theta, cost, np.asarray(flops))[0],
            _best_sizes(powers, powers.samples, cost, np.asarray(flops)),
            confidence,
        ),
    )


def joint_optimum(
    fitted: JointFit, cost: ImageCost, *, flops: float, largest: float, confidence: float
) -> Optimum:
    """What to train with a budget; `largest` is the FLOPs of the largest run."""
    powers, found = fitted.fit, []
    for theta in (powers.theta, powers.samples):
        parameters = _best_sizes(powers, theta, cost, np.array([flops]))[:, 0]
        images = images_for(parameters, cost, flops)
        # Every sample at its own optimum: the expected result of the best use of the budget.
        expected = powers.at(_stacked(parameters, images)[:, None], theta)[:, 0]
        found.append((parameters, images, expected))
    best, images_seen, metric = (
        interval(float(value[0]), drawn, confidence) for value, drawn in zip(*found, strict=True)
    )
    return Optimum("joint", flops, best, images_seen, metric, flops / largest)


def images_for(parameters: Numbers, cost: ImageCost, flops: float) -> Numbers:
    """D that a budget pays for at N parameters."""
    log_images = math.log(flops) - cost.log_factor - cost.exponent * np.log(parameters)
    return np.exp(log_images)


def _exponents(theta: Numbers, cost: ImageCost) -> Numbers:
    of_images: Numbers = theta[:, 4] / (theta[:, 3] + cost.exponent * theta[:, 4])
    return of_images


def _best_sizes(powers: PowerLawFit, theta: Numbers, cost: ImageCost, flops: Numbers) -> Numbers:
    """Best N (S, n) of each law at budgets (n,): a A / N^a = g b B / D^b with D = C / (k N^g)."""
    _, log_a, log_b, a, b = powers.in_units(theta).T[..., None]
    balance = np.log(a) + log_a - np.log(b * cost.exponent) - log_b
    log_n = (balance + b * (np.log(flops) - cost.log_factor)) / (a + cost.exponent * b)
    sizes: Numbers = np.exp(np.clip(log_n, -700, 700))
    return sizes
