"""The results of a fit: laws with intervals, ready for plots and JSON.

N parameters of the backbone, D images seen, C training FLOPs, y the metric (lower is better).
Sources: Kaplan et al. 2020 (arXiv:2001.08361); Hoffmann et al. 2022 (arXiv:2203.15556);
Besiroglu et al. 2024 (arXiv:2404.10102).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval; an end is infinite where the runs do not bound it.

    A confidence interval of the law, except where called a prediction interval, of a single run.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Band:
    """A curve with its pointwise interval, arrays of equal shape."""

    value: Numbers
    low: Numbers
    high: Numbers


@dataclass(frozen=True)
class PowerLaw:
    """y = E + A / x^a along one quantity, fitted to the best run at each of its values.

    Attributes:
        quantity: parameters, images or flops.
        irreducible: E.
        coefficient: A.
        exponent: a.
        x: x of the fitted runs, (n,).
        y: metric of the fitted runs, (n,), averaged over seeds.
        residuals: log y - log of the law, (n,).
        r2: fraction of the variance of log y that the law explains.
        left_out_error: predicted over measured, minus 1, for the run with the largest x when the
            law is fitted without it; None where too few runs remain.
        band: the law and its interval at given x.
    """

    quantity: str
    irreducible: Interval
    coefficient: Interval
    exponent: Interval
    x: Numbers
    y: Numbers
    residuals: Numbers
    r2: float
    left_out_error: float | None
    band: Callable[[Numbers], Band] = field(repr=False, compare=False)


@dataclass(frozen=True)
class JointLaw:
    """y = E + A / N^a + B / D^b (Hoffmann et al. 2022, eq. 2 and approach 3).

    Attributes:
        irreducible: E.
        parameters_coefficient: A.
        parameters_exponent: a.
        images_coefficient: B.
        images_exponent: b.
        names: names of the fitted runs; of runs that differ in the seed only, the first.
        residuals: log y - log of the law, (n,).
        r2: fraction of the variance of log y that the law explains.
        left_out_error: largest absolute value of predicted over measured, minus 1, for the runs of
            the largest budget when fitted without them; None where too few runs remain.
        band: the law and its interval at given N and D.
    """

    irreducible: Interval
    parameters_coefficient: Interval
    parameters_exponent: Interval
    images_coefficient: Interval
    images_exponent: Interval
    names: tuple[str, ...]
    residuals: Numbers
    r2: float
    left_out_error: float | None
    band: Callable[[Numbers, Numbers], Band] = field(repr=False, compare=False)


@dataclass(frozen=True)
class IsoFlop:
    """The minimum of y over N among the runs of one budget (Hoffmann et al. 2022, approach 2).

    Attributes:
        flops: C, the budget.
        parameters: N of the runs, (n,).
        y: metric of the runs, (n,).
        curve: a parabola in ln N with this minimum, for plots, highest power first, (3,).
        optimum: N at the minimum; None unless it lies between the smallest and the largest model.
    """

    flops: float
    parameters: Numbers
    y: Numbers
    curve: Numbers
    optimum: Interval | None


@dataclass(frozen=True)
class Frontier:
    """The best N and D as functions of the budget, N ~ C^p and D ~ C^q.

    Attributes:
        approach: "isoflop" or "joint".
        parameters_exponent: p.
        images_exponent: q.
        optimum: the best N at given budgets.
    """

    approach: str
    parameters_exponent: Interval
    images_exponent: Interval
    optimum: Callable[[Numbers], Band] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Optimum:
    """What to train with a budget.

    Attributes:
        approach: "isoflop" or "joint".
        flops: C, the budget.
        parameters: N.
        images: D.
        metric: y by the law; None where the approach predicts none (isoflop).
        extrapolation: the budget over the largest that was run.
        run: prediction interval of y for one run, by the joint law; None without it.
    """

    approach: str
    flops: float
    parameters: Interval
    images: Interval
    metric: Interval | None
    extrapolation: float
    run: Interval | None = None


@dataclass(frozen=True)
class BestRate:
    """The learning rate with the lowest y among runs that otherwise differ only in the seed.

    Attributes:
        label: what the runs have in common, such as their size, as text.
        parameters: N.
        batch_size: images per step.
        lr: peak learning rates of the runs, (n,).
        y: metric of the runs, (n,).
        curve: coefficients of a parabola in ln lr, highest power first, (3,).
        optimum: the rate at its minimum; None unless it lies between the smallest and the largest.
        left_out: names of the runs excluded from the parabola because they diverged; of all runs
            where fewer than three rates remain, and then the curve is NaN.
        images: D of each run.
    """

    label: str
    parameters: int
    batch_size: int
    lr: Numbers
    y: Numbers
    curve: Numbers
    optimum: Interval | None
    left_out: tuple[str, ...] = ()
    images: int = 0


@dataclass(frozen=True)
class MetricFit:
    """Everything fitted to one metric of a sweep.

    Attributes:
        metric: name of the metric.
        confidence: level of all intervals, such as 0.9.
        num_runs: number of runs used.
        left_out: runs not used: name -> reason.
        laws: laws by quantity, where the runs support them.
        joint: the joint law; None where the runs do not support it.
        isoflops: by ascending budget; empty unless a budget has at least three sizes.
        frontiers: those that could be fitted.
        optima: by each approach, for the requested budgets.
        best_rates: empty where the learning rate was not varied.
        cautions: warnings in sentences: what could not be fitted and why, and what not to trust.
    """

    metric: str
    confidence: float
    num_runs: int
    left_out: Mapping[str, str]
    laws: Mapping[str, PowerLaw]
    joint: JointLaw | None
    isoflops: tuple[IsoFlop, ...]
    frontiers: tuple[Frontier, ...]
    optima: tuple[Optimum, ...]
    best_rates: tuple[BestRate, ...]
    cautions: tuple[str, ...]
