"""Warnings about a fit, in sentences: what it cannot determine, and what not to trust."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dinoscale.cluster.doctor.report import count_text
from dinoscale.scaling.laws import isoflop, parametric_law, power_law
from dinoscale.scaling.laws.exclusions import MIN_DEVIATION, TEST_NAME
from dinoscale.scaling.laws.laws import Interval, JointLaw, MetricFit, Optimum, PowerLaw
from dinoscale.scaling.laws.parametric_law import ImageCost, JointFit, why_no_joint
from dinoscale.scaling.laws.robust_fit import EXPONENTS
from dinoscale.scaling.laws.selection import QUANTITIES, Point, best_along, size_of
from dinoscale.scaling.number_text import SAME, number
from dinoscale.scaling.report.labels import flops

_NAMES = {"parameters": "parameters", "images": "images seen", "flops": "training FLOPs"}
_MAX_PASSES = 4  # over the same data; Muennighoff et al. 2023 (arXiv:2305.16264), for text
_MAX_EXTRAPOLATION = 10.0
_WIDE = 10.0  # upper over lower end of an interval
_SPANS = 0.8  # fraction of the allowed range of exponents
_MIXED = 1.5  # largest over smallest value of the quantity that a law should hold constant
_POOR = 0.5  # r2
_COST_ERROR = 0.1
_FEW = 3  # degrees of freedom


def with_warnings(
    fit: MetricFit, points: Sequence[Point], *, joint_fit: JointFit | None, cost: ImageCost | None
) -> MetricFit:
    """The fit with its warnings; those about everything come first."""
    found = [*_of_runs(fit, points)]
    if points:
        found += [*_of_laws(fit, points), *_of_joint(fit, points, joint_fit)]
        found += [*_of_decisions(fit, points, cost), *_of_rates(fit)]
    return replace(fit, cautions=tuple(found))


def _of_runs(fit: MetricFit, points: Sequence[Point]) -> Iterator[str]:
    metric = fit.metric
    if not points:
        yield f"No run has a usable {metric}: nothing could be fitted."
    outliers = [name for name, why in fit.left_out.items() if why.startswith("outlier")]
    if len(fit.left_out) > len(outliers):
        runs = count_text(len(fit.left_out) - len(outliers), "run")
        yield f"{runs} left out: failed, collapsed, or without a usable {metric}."
    if outliers:
        yield (
            f"{count_text(len(outliers), 'run')} of {fit.num_runs + len(outliers)} left out as"
            f" outliers, more than {np.expm1(MIN_DEVIATION):.0%} from the law of the others"
            f" ({TEST_NAME}): {', '.join(outliers)}. Check their logs: they may have collapsed, or"
            " the law may not hold there."
        )
    if metric == "loss":
        yield (
            "The DINO loss has a moving target and is no measure of quality: a collapsed model can"
            " have a low loss. Decide by a measured error."
        )
    if points and len({round(point.log_y, 9) for point in points}) == 1:
        yield f"All runs have the same {metric}: no law can be fitted."
    setups = {_measured_by(point) for point in points}
    if metric == "knn" and len(setups) > 1:
        yield "The runs differ in the images or settings of eval: their knn is not comparable."
    passes = max(
        (p.row.images / (p.row.distinct_images or p.row.images) for p in points), default=0
    )
    if passes > _MAX_PASSES:
        yield (
            f"Up to {passes:,.0f} passes over the same images: the laws count repeated images as"
            " new ones, so more passes will bring less than predicted."
        )


def _measured_by(point: Point) -> str:
    settings = point.row.config.get("eval")
    names = ("train", "test", "resize", "crop", "k")
    return json.dumps([settings.get(name) for name in names] if isinstance(settings, dict) else [])


def _of_laws(fit: MetricFit, points: Sequence[Point]) -> Iterator[str]:
    for quantity in QUANTITIES:
        name, best = _NAMES[quantity], best_along(points, quantity)
        law = fit.laws.get(quantity)
        if law:
            yield from _of_law(law, name, best)
        elif len(best) < power_law.NUM_PARAMETERS:
            better = " that no cheaper run beats" if quantity == "flops" else ""
            yield (
                f"No law in {name}: it needs at least {power_law.NUM_PARAMETERS} values{better},"
                f" and more for an interval; there {'is' if len(best) == 1 else 'are'} {len(best)}."
            )
        else:
            yield f"No law in {name}: {fit.metric} does not fall as they grow."


def _of_law(law: PowerLaw, name: str, best: Sequence[Point]) -> Iterator[str]:
    yield from _of_exponent(law.exponent, f"the law in {name}")
    yield from _of_fit(law, f"The law in {name}", len(best) - power_law.NUM_PARAMETERS)
    other = {"parameters": "images", "images": "parameters"}.get(law.quantity)
    if other:
        sizes = [size_of(other)(point) for point in best]
        if max(sizes) > _MIXED * min(sizes):
            yield (
                f"The law in {name} mixes runs of {number(min(sizes))} to {number(max(sizes))}"
                f" {_NAMES[other]}, so it does not show the effect of {name} alone."
            )


def _of_exponent(exponent: Interval, where: str) -> Iterator[str]:
    low, high = EXPONENTS
    if not math.isclose(np.clip(exponent.value, low * 1.01, high * 0.99), exponent.value):
        yield f"The exponent of {where} is at the bound of its allowed range, {low:g} to {high:g}."
    if _SPANS * (high - low) < exponent.high - exponent.low < math.inf:
        yield f"The runs do not determine the exponent of {where}: nearly any value is possible."


def _of_fit(law: PowerLaw | JointLaw, where: str, degrees: int) -> Iterator[str]:
    if degrees == 0:
        yield f"{where} has as many parameters as points: it fits exactly and has no interval."
    elif degrees <= _FEW:
        yield (
            f"{where} has only {count_text(degrees, 'point')} more than parameters: its intervals"
            " rest on a rough estimate of the noise."
        )
    if law.irreducible.value <= 0:
        yield f"{where} has E = 0, its lower bound: the runs do not show where it would level off."
    if law.r2 < _POOR:
        yield f"{where} explains only {max(law.r2, 0):.0%} of the variance between runs."


def _of_joint(fit: MetricFit, points: Sequence[Point], fitted: JointFit | None) -> Iterator[str]:
    if fitted is None:
        reason = why_no_joint(points)
        if reason:
            yield reason
        return
    law = fitted.law
    for name, exponent, falls in zip(
        (_NAMES["parameters"], _NAMES["images"]),
        (law.parameters_exponent, law.images_exponent),
        fitted.falls,
        strict=True,
    ):
        if falls:
            yield from _of_exponent(exponent, f"{name} in the joint law")
        else:
            yield (
                f"{fit.metric} does not fall with {name} alone: the joint law says"
                " nothing about the best use of a budget."
            )
    yield from _of_fit(law, "The joint law", len(law.names) - parametric_law.NUM_PARAMETERS)


def _of_decisions(fit: MetricFit, points: Sequence[Point], cost: ImageCost | None) -> Iterator[str]:
    if not fit.isoflops:
        yield (
            f"No budget was run with at least {isoflop.NUM_SIZES} model sizes: there are no isoFLOP"
            " parabolas."
        )
    yield from _of_budgets(points)
    missing = sum(iso.optimum is None for iso in fit.isoflops)
    if missing:
        yield (
            f"{count_text(missing, 'budget')} of {len(fit.isoflops)} without a minimum between the"
            " smallest and the largest model: add models beyond the lowest end."
        )
    with_minimum = len(fit.isoflops) - missing
    if fit.isoflops and with_minimum < isoflop.NUM_BUDGETS:
        yield (
            f"Minima at {count_text(with_minimum, 'budget')}: a trend over budgets needs 2, its"
            f" interval {isoflop.NUM_BUDGETS}."
        )
    if cost and fit.optima and cost.error > _COST_ERROR:
        yield (
            f"FLOPs per image follow a power of the parameters only within {cost.error:.0%}: the"
            " best numbers of images are as uncertain."
        )
    if cost and cost.exponent <= 0:
        yield "FLOPs per image do not grow with the parameters: no best use of a budget exists."
    for optimum in fit.optima:
        yield from _of_optimum(optimum, [float(point.row.parameters) for point in points])


def _of_budgets(points: Sequence[Point]) -> Iterator[str]:
    """Runs that were planned for one budget but differ in FLOPs."""
    named: dict[float, list[float]] = {}
    for point in points:
        budget = point.row.axes.get("flops")
        if isinstance(budget, float):
            named.setdefault(budget, []).append(float(point.row.flops))
    for budget, found in sorted(named.items()):
        if max(found) > (1 + SAME) * min(found):
            yield (
                f"Runs planned for {budget:g} FLOPs have {min(found):.2g} to {max(found):.2g}, as"
                " an epoch is rounded to whole steps: only those within"
                f" {SAME:.0%} of each other count as one budget."
            )


def _of_optimum(optimum: Optimum, sizes: Sequence[float]) -> Iterator[str]:
    where = f"The best model for {flops(optimum.flops)} ({optimum.approach})"
    if optimum.extrapolation > _MAX_EXTRAPOLATION:
        yield (
            f"{where} is extrapolated: the budget is {optimum.extrapolation:.3g} times the largest"
            " that was run."
        )
    if not optimum.parameters.high <= _WIDE * max(optimum.parameters.low, 0):
        yield (
            f"{where} is uncertain by more than a factor of {_WIDE:g}: add runs before relying on"
            " it."
        )
    away = max(optimum.parameters.value / max(sizes), min(sizes) / optimum.parameters.value)
    if away > 2:
        side = "larger" if optimum.parameters.value > max(sizes) else "smaller"
        yield f"{where} is {away:.3g} times {side} than any model that was run."


def _of_rates(fit: MetricFit) -> Iterator[str]:
    for rate in fit.best_rates:
        where = f"The best learning rate of {rate.label}"
        if rate.optimum is None:
            yield (
                f"{where} is not between the smallest and the largest rate that was run: the best"
                f" is {rate.lr[np.argmin(rate.y)]:.3g}; try rates beyond it."
            )
        if rate.left_out:
            yield (
                f"{where} comes from a parabola without"
                f" {count_text(len(rate.left_out), 'run')} that diverged or are outliers:"
                f" {', '.join(rate.left_out)}."
            )
        if rate.optimum and not rate.optimum.high <= _WIDE * max(rate.optimum.low, 0):
            yield f"{where} is uncertain by more than a factor of {_WIDE:g}: add rates or seeds."
