"""What to train next, how much to trust that, and which runs would tell more.

The marks below are ours, set for people who decide on a training: up to the first of a pair a
result supports the decision, beyond the second it should not be relied on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from dinoscale.scaling.laws.laws import Interval, MetricFit, Optimum
from dinoscale.scaling.laws.selection import spoiled_by
from dinoscale.scaling.number_text import number
from dinoscale.scaling.report.labels import flops, percent
from dinoscale.scaling.sweep.table import Row

MANY_RUNS, FEW_RUNS = 10, 6  # a joint law has five coefficients
GOOD_R2, LOW_R2 = 0.95, 0.8
LEFT_OUT_ERROR = (0.05, 0.15)  # of the largest runs, predicted from the others
WIDTH = (2.0, 5.0)  # upper over lower end of the interval of the best size
EXTRAPOLATION = (3.0, 10.0)  # budget over the largest that was run
DISAGREEMENT = 2.0  # best sizes of the two approaches, one over the other


class Trust(IntEnum):
    """How far to rely on something."""

    GOOD = 0
    LIMITED = 1
    LOW = 2


@dataclass(frozen=True)
class Reason:
    """A sentence, and how much trust it leaves."""

    trust: Trust
    sentence: str


@dataclass(frozen=True)
class Answer:
    """The best use of one budget.

    Attributes:
        optimum: of the approach with the narrower interval of N; of equal ones the joint law.
        expected: metric there; None where no law says it. Of one run, a prediction interval, if
            `optimum.run` is known; else of the law, a confidence interval.
        reasons: for and against trusting it, without those about the whole fit.
        trust: the lowest of them and of the fit's.
    """

    optimum: Optimum
    expected: Interval | None
    reasons: tuple[Reason, ...]
    trust: Trust


def measured(rows: Iterable[Row], metric: str) -> list[Row]:
    """Runs that ended well and have the metric."""
    return [row for row in rows if row.status == "done" and row.metrics.get(metric) is not None]


def best_run(rows: Iterable[Row], metric: str) -> Row | None:
    """The run with the lowest metric, of a sound training; None where none has it."""
    sound = [row for row in measured(rows, metric) if not spoiled_by(row)]
    return min(sound, key=lambda row: value_of(row, metric), default=None)


def value_of(row: Row, metric: str) -> float:
    """Metric of a run that has it."""
    value = row.metrics[metric]
    assert value is not None
    return value


def answers(fit: MetricFit) -> list[Answer]:
    """An answer for every budget that has a supported optimum, in the order of the budgets."""
    budgets: dict[float, list[Optimum]] = {}
    for optimum in fit.optima:
        if _is_supported(optimum):
            budgets.setdefault(optimum.flops, []).append(optimum)
    return [_answer(fit, optima) for optima in budgets.values()]


def _is_supported(optimum: Optimum) -> bool:
    """Whether its intervals have both ends."""
    return all(
        0 < found.low < math.inf and 0 < found.value < math.inf and 0 < found.high < math.inf
        for found in (optimum.parameters, optimum.images)
    )


def _answer(fit: MetricFit, optima: Sequence[Optimum]) -> Answer:
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
            "The upper end of the interval of the best size is"
            f" {number(_width(best.parameters))} times the lower.",
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
    return Answer(best, expected, tuple(reasons), trust)


def _width(found: Interval) -> float:
    return found.high / found.low


def _extrapolation(factor: float) -> str:
    if factor <= 1:
        return "The budget is not above those that were run."
    return f"The budget is {number(factor)} times the largest that was run."


def _graded(value: float, marks: tuple[float, float], sentence: str) -> Reason:
    trust = Trust.GOOD if value <= marks[0] else Trust.LIMITED if value <= marks[1] else Trust.LOW
    return Reason(trust, sentence)


def fit_reasons(fit: MetricFit) -> list[Reason]:
    """What speaks for and against the whole fit: runs, fit, prediction, cautions."""
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
                f"{what} explains {percent(law.r2)} of the differences among runs (r2).",
            )
        )
        reasons.append(_left_out(law.left_out_error))
    else:
        reasons.append(Reason(Trust.LIMITED, "No law could be fitted over all runs."))
    reasons += [Reason(Trust.LIMITED, f"{sentence.rstrip('. ')}.") for sentence in fit.cautions]
    return reasons


def _left_out(error: float | None) -> Reason:
    if error is None or not math.isfinite(error):
        return Reason(
            Trust.LIMITED, "Too few runs to test whether the fit predicts runs larger than its own."
        )
    return _graded(
        abs(error),
        LEFT_OUT_ERROR,
        f"Fitted without its largest runs, it misses them by {percent(abs(error))}.",
    )


def best_answers(fits: Sequence[MetricFit]) -> tuple[MetricFit, Answer] | None:
    """The answer that the preset is written for: of the first budget of the first metric.

    The loss has a target that moves and counts only where nothing else was measured.
    """
    for fit in [fit for fit in fits if fit.metric != "loss"] or fits:
        for answer in answers(fit):
            return fit, answer
    return None


def runs_to_add(rows: Sequence[Row], fit: MetricFit) -> list[str]:
    """Runs that would support the fit most, a sentence each."""
    used = [row for row in measured(rows, fit.metric) if row.name not in fit.left_out]
    said = []
    failed = sum(row.status == "failed" for row in rows)
    if failed:
        said.append(f"Find out why {failed} failed (see the table), then run with --retry-failed.")
    sizes = {row.parameters for row in used}
    lengths = {row.images for row in used}
    if len(sizes) < 3:
        said.append(f"Run at least 3 sizes of the model, 10 times apart; there are {len(sizes)}.")
    if len(lengths) < 3:
        said.append(f"Run at least 3 numbers of images, 10 times apart; there are {len(lengths)}.")
    said += _beyond_edges(fit)
    if used and len({_all_but_seed(row) for row in used}) == len(used):
        said.append("Repeat a cheap run with other seeds: so far nothing says how far runs differ.")
    found = answers(fit)
    if found and found[0].optimum.extrapolation > EXTRAPOLATION[0]:
        said.append("Add a budget between the largest run and the one asked for.")
    return said


def _all_but_seed(row: Row) -> tuple[object, ...]:
    """What makes runs repetitions of each other: all but the seed."""
    axes = {name: value for name, value in row.axes.items() if name != "seed"}
    return (row.parameters, row.images, row.batch_size, row.lr, repr(sorted(axes.items())))


def _beyond_edges(fit: MetricFit) -> Iterable[str]:
    for curve in fit.isoflops:
        if curve.optimum is None:
            best = curve.parameters[int(np.argmin(curve.y))]
            edge = {curve.parameters.max(): "larger", curve.parameters.min(): "smaller"}
            if best in edge:
                yield (
                    f"Add {edge[best]} models at {flops(curve.flops)}: the best of that"
                    f" budget, {number(best)}, is the last one."
                )
    for rate in fit.best_rates:
        if rate.optimum is None:
            best = rate.lr[int(np.argmin(rate.y))]
            edge = {rate.lr.max(): "higher", rate.lr.min(): "lower"}
            if best in edge:
                yield (
                    f"Try {edge[best]} learning rates for {rate.label}: the best of them,"
                    f" {number(best)}, is the last one."
                )
