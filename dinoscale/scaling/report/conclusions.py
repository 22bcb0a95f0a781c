"""What to train next, how far to trust it, and which runs would tell more.

The thresholds below are our own, set for deciding on a training: up to the first of a pair a result
supports the decision; beyond the second it should not be relied on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from dinoscale.cluster.doctor.report import count_text
from dinoscale.scaling.laws.laws import Interval, MetricFit, Optimum
from dinoscale.scaling.laws.selection import disqualifying_events
from dinoscale.scaling.number_text import number
from dinoscale.scaling.report.labels import flops, percent
from dinoscale.scaling.sweep.table import Row

MANY_RUNS, FEW_RUNS = 10, 6  # the joint law has five coefficients
GOOD_R2, LOW_R2 = 0.95, 0.8
LEFT_OUT_ERROR = (0.05, 0.15)  # relative error of the largest runs, predicted from the others
WIDTH = (2.0, 5.0)  # upper over lower end of the interval of the best size
EXTRAPOLATION = (3.0, 10.0)  # budget over the largest that was run
DISAGREEMENT = 2.0  # ratio of the best sizes by the two approaches


class Trust(IntEnum):
    """How far to rely on a result."""

    GOOD = 0
    LIMITED = 1
    LOW = 2


@dataclass(frozen=True)
class Reason:
    """A sentence for or against a result, and the trust that it leaves."""

    trust: Trust
    sentence: str


@dataclass(frozen=True)
class Conclusion:
    """The best use of one budget.

    Attributes:
        optimum: by the approach with the narrower interval of N; if equal, by the joint law.
        expected: expected metric; None where no law predicts it. A prediction interval for one run
            where `optimum.run` is known, else a confidence interval of the law.
        reasons: for and against trusting it, without those about the whole fit.
        trust: the lowest of these reasons and of those about the fit.
    """

    optimum: Optimum
    expected: Interval | None
    reasons: tuple[Reason, ...]
    trust: Trust


def measured(rows: Iterable[Row], metric: str) -> list[Row]:
    """Completed runs that have the metric."""
    return [row for row in rows if row.status == "done" and row.metrics.get(metric) is not None]


def best_run(rows: Iterable[Row], metric: str) -> Row | None:
    """The run with the lowest metric and no disqualifying event; None if there is none."""
    eligible = [row for row in measured(rows, metric) if not disqualifying_events(row)]
    return min(eligible, key=lambda row: value_of(row, metric), default=None)


def value_of(row: Row, metric: str) -> float:
    """The metric of a run that has it."""
    value = row.metrics[metric]
    assert value is not None
    return value


def conclusions(fit: MetricFit) -> list[Conclusion]:
    """One conclusion for every budget with a supported optimum, in the order of the budgets."""
    budgets: dict[float, list[Optimum]] = {}
    for optimum in fit.optima:
        if _is_supported(optimum):
            budgets.setdefault(optimum.flops, []).append(optimum)
    return [_conclude(fit, optima) for optima in budgets.values()]


def _is_supported(optimum: Optimum) -> bool:
    """Whether its intervals are bounded at both ends."""
    return all(
        0 < found.low < math.inf and 0 < found.value < math.inf and 0 < found.high < math.inf
        for found in (optimum.parameters, optimum.images)
    )


def _conclude(fit: MetricFit, optima: Sequence[Optimum]) -> Conclusion:
    best = min(optima, key=lambda found: (_width(found.parameters), found.approach != "joint"))
    expected = best.run or best.metric
    if expected is None and fit.joint is not None:
        band = fit.joint.band(
            np.array([best.parameters.value]), np.array([best.images.value])
        )  # (1,)
        expected = Interval(float(band.value[0]), float(band.low[0]), float(band.high[0]))
    reasons = [
        _graded(
            _width(best.parameters),
            WIDTH,
            "The upper end of the best size's interval is"
            f" {number(_width(best.parameters))} times the lower end.",
        ),
        _graded(best.extrapolation, EXTRAPOLATION, _extrapolation(best.extrapolation)),
    ]
    if len(optima) > 1:
        sizes = [found.parameters.value for found in optima]
        apart = max(sizes) / min(sizes)
        reasons.append(
            Reason(
                Trust.GOOD if apart <= DISAGREEMENT else Trust.LIMITED,
                f"The two approaches agree on the best size within a factor of {apart:.2f}.",
            )
        )
    trust = max(reason.trust for reason in [*reasons, *fit_reasons(fit)])
    return Conclusion(best, expected, tuple(reasons), trust)


def _width(found: Interval) -> float:
    return found.high / found.low


def _extrapolation(factor: float) -> str:
    if factor <= 1:
        return "The budget is not above the largest that was run."
    return f"The budget is {number(factor)} times the largest that was run."


def _graded(value: float, limits: tuple[float, float], sentence: str) -> Reason:
    trust = Trust.GOOD if value <= limits[0] else Trust.LIMITED if value <= limits[1] else Trust.LOW
    return Reason(trust, sentence)


def fit_reasons(fit: MetricFit) -> list[Reason]:
    """Reasons for and against trusting the whole fit: runs, r2, prediction, warnings."""
    runs = f"{fit.num_runs} runs were used"
    many = fit.num_runs >= MANY_RUNS
    reasons = [
        Reason(
            Trust.GOOD if many else Trust.LIMITED if fit.num_runs >= FEW_RUNS else Trust.LOW,
            f"{runs}." if many else f"{runs}, fewer than {MANY_RUNS}.",
        )
    ]
    law = fit.joint or fit.laws.get("flops")
    if law is not None:
        what = "The joint law" if fit.joint else "The law in FLOPs"
        reasons.append(
            Reason(
                Trust.GOOD
                if law.r2 >= GOOD_R2
                else Trust.LIMITED
                if law.r2 >= LOW_R2
                else Trust.LOW,
                f"{what} explains {percent(law.r2)} of the variance between runs (r2).",
            )
        )
        reasons.append(_left_out(law.left_out_error))
    else:
        reasons.append(Reason(Trust.LIMITED, "No law could be fitted to all runs."))
    reasons += [Reason(Trust.LIMITED, f"{sentence.rstrip('. ')}.") for sentence in fit.cautions]
    return reasons


def _left_out(error: float | None) -> Reason:
    if error is None or not math.isfinite(error):
        return Reason(
            Trust.LIMITED, "Too few runs to test whether the fit predicts larger runs than its own."
        )
    return _graded(
        abs(error),
        LEFT_OUT_ERROR,
        f"Fitted without the largest runs, it misses them by {percent(abs(error))}.",
    )


def first_conclusion(fits: Sequence[MetricFit]) -> tuple[MetricFit, Conclusion] | None:
    """The conclusion that the preset is written for: the first budget of the first metric.

    The loss counts only where nothing else was measured, as its target moves.
    """
    for fit in [fit for fit in fits if fit.metric != "loss"] or fits:
        for conclusion in conclusions(fit):
            return fit, conclusion
    return None


def runs_to_add(rows: Sequence[Row], fit: MetricFit) -> list[str]:
    """The runs that would support the fit most, one sentence each."""
    used = [row for row in measured(rows, fit.metric) if row.name not in fit.left_out]
    suggestions = []
    failed = sum(row.status == "failed" for row in rows)
    if failed:
        suggestions.append(
            f"Find out why {count_text(failed, 'run')} failed (see the table), then run again with"
            " --retry-failed."
        )
    sizes = {row.parameters for row in used}
    lengths = {row.images for row in used}
    if len(sizes) < 3:
        suggestions.append(
            f"Run at least 3 model sizes, a factor of 10 apart; there are {len(sizes)}."
        )
    if len(lengths) < 3:
        suggestions.append(
            f"Run at least 3 numbers of images, a factor of 10 apart; there are {len(lengths)}."
        )
    suggestions += _beyond_edges(fit)
    if used and len({_all_but_seed(row) for row in used}) == len(used):
        suggestions.append(
            "Repeat a cheap run with other seeds: so far the noise of a run is unknown."
        )
    found = conclusions(fit)
    if found and found[0].optimum.extrapolation > EXTRAPOLATION[0]:
        suggestions.append("Add a budget between the largest run and the requested budget.")
    return suggestions


def _all_but_seed(row: Row) -> tuple[object, ...]:
    """Equal for runs that differ only in the seed."""
    axes = {name: value for name, value in row.axes.items() if name != "seed"}
    return (row.parameters, row.images, row.batch_size, row.lr, repr(sorted(axes.items())))


def _beyond_edges(fit: MetricFit) -> Iterable[str]:
    for curve in fit.isoflops:
        if curve.optimum is None:
            best = curve.parameters[int(np.argmin(curve.y))]
            edge = {curve.parameters.max(): "larger", curve.parameters.min(): "smaller"}
            if best in edge:
                yield (
                    f"Add {edge[best]} models at {flops(curve.flops)}: the best of that budget,"
                    f" {number(best)} parameters, is at the edge."
                )
    for rate in fit.best_rates:
        if rate.optimum is None:
            best = rate.lr[int(np.argmin(rate.y))]
            edge = {rate.lr.max(): "higher", rate.lr.min(): "lower"}
            if best in edge:
                yield (
                    f"Try {edge[best]} learning rates for {rate.label}: the best,"
                    f" {number(best)}, is at the edge."
                )
