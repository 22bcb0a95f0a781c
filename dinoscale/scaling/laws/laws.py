"""What a fit gives: laws with intervals, ready for plots and JSON.

N parameters of the backbone, D images seen, C FLOPs of training; y the metric, the smaller the
better. Sources: Kaplan et al. 2020 (arXiv:2001.08361); Hoffmann et al. 2022 (arXiv:2203.15556);
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
    """An estimate between the ends of its interval; infinite ends where the runs set none.

    A confidence interval, of what a law says, except where it is called a prediction interval, of
    what one run gives.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Band:
    """A curve with its interval, arrays of one shape."""

    value: Numbers
    low: Numbers
    high: Numbers


@dataclass(frozen=True)
class PowerLaw:
    """y = E + A / x^a along one quantity, over the best runs at each of its values.

    Attributes:
        quantity: parameters, images or flops.
        irreducible: E.
        coefficient: A.
        exponent: a.
        x: of the runs it was fitted to, (n,).
        y: their metric, (n,); of runs that differ in the seed only, the mean.
        residuals: log y - log of the law, (n,).
        r2: share of the variance of log y that the law explains.
        left_out_error: of the run with the largest x when the law is fitted without it: predicted
            over measured, minus 1; None where too few are left.
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
        names: of the runs it was fitted to; of runs that differ in the seed only, the first.
        residuals: log y - log of the law, (n,).
        r2: share of the variance of log y that the law explains.
        left_out_error: largest absolute error of the runs of the largest budget, predicted by a
            fit without them: predicted over measured, minus 1; None where too few are left.
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
        y: their metric, (n,).
        curve: a parabola in ln N with this minimum, for plots, highest power first, (3,).
        optimum: N at the minimum; None where there is none between the smallest and the largest
            model.
    """

    flops: float
    parameters: Numbers
    y: Numbers
    curve: Numbers
    optimum: Interval | None


@dataclass(frozen=True)
class Frontier:
    """N and D of the lowest y over budgets, N ~ C^p and D ~ C^q.

    Attributes:
        approach: "isoflop" or "joint".
        parameters_exponent: p.
        images_exponent: q.
        optimum: best N at given budgets.
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
        metric: what the law has there; None where the approach does not say (isoflop).
        extrapolation: budget over the largest that was run.
        run: what one run there may give by the joint law, a prediction interval; None without it.
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
    """Learning rate with the lowest y among runs that differ in nothing else but the seed.

    Attributes:
        label: what the runs share, such as their size, for people.
        parameters: N.
        batch_size: images of a step.
        lr: peak learning rates of the runs, (n,).
        y: their metric, (n,).
        curve: coefficients of a parabola in ln lr, highest power first, (3,).
        optimum: the rate at its minimum; None where it has none between the smallest and largest.
        left_out: names of runs that the parabola was not fitted to, as they had diverged; of all
            where fewer than three rates remain, and then the curve is not a number.
        images: D, of each run.
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
    """All that the runs of a sweep say about one metric.

    Attributes:
        metric: its name.
        confidence: of all intervals, such as 0.9.
        num_runs: runs that were used.
        left_out: runs that were not, and why: name -> reason.
        laws: by quantity, as far as the runs support them.
        joint: None where the runs do not support it.
        isoflops: ascending budgets; empty without at least three sizes at one budget.
        frontiers: as far as they could be fitted.
        optima: for the budgets asked for, by each approach.
        best_rates: empty where the learning rate was not varied.
        cautions: sentences: what could not be fitted and why, what not to trust.
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
