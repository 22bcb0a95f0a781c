"""Fits as text and as JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from dinoscale.scaling.laws.laws import Interval, MetricFit
from dinoscale.scaling.report.labels import exponential, flops, interval

_WIDTH = 100


def as_json(fits: Sequence[MetricFit]) -> dict[str, Any]:
    """All fits by metric, JSON-able; infinite ends become null."""
    return {fit.metric: plain(fit) for fit in fits}


def plain(value: Any) -> Any:
    """A value as plain JSON types: non-finite numbers become null, functions are dropped."""
    if is_dataclass(value):
        parts = {part.name: getattr(value, part.name) for part in fields(value)}
        return {name: plain(part) for name, part in parts.items() if not callable(part)}
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):  # numpy's too
        return float(value) if math.isfinite(value) else None
    return value


def as_text(fits: Sequence[MetricFit]) -> str:
    """All fits as text, with their warnings."""
    return "\n".join(line for fit in fits for line in [*_lines(fit), ""])


def _lines(fit: MetricFit) -> Iterator[str]:
    yield (
        f"{fit.metric}: {fit.num_runs} runs; {100 * fit.confidence:g} % confidence intervals,"
        " unless marked as prediction intervals"
    )
    yield ""
    if fit.cautions:
        yield "  Warnings:"
        for caution in fit.cautions:
            yield from _wrapped(caution, first="  - ", rest="    ")
        yield ""
    yield from _joint(fit)
    yield from _laws(fit)
    yield from _isoflops(fit)
    yield from _optima(fit)
    yield from _rates(fit)
    if fit.left_out:
        yield "  Left out:"
        for name, reason in fit.left_out.items():
            yield from _wrapped(f"{name}: {reason}", first="    ", rest="      ")
        yield ""


def _wrapped(text: str, *, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def _joint(fit: MetricFit) -> Iterator[str]:
    law = fit.joint
    if law is None:
        return
    yield f"  {fit.metric} = E + A / N^a + B / D^b, N parameters and D images seen"
    yield from _numbers(
        E=law.irreducible,
        A=law.parameters_coefficient,
        a=law.parameters_exponent,
        B=law.images_coefficient,
        b=law.images_exponent,
    )
    yield f"    {_goodness(law.r2, law.left_out_error, 'the largest budget')}"
    yield ""


def _laws(fit: MetricFit) -> Iterator[str]:
    for quantity, law in fit.laws.items():
        yield f"  {fit.metric} = E + A / x^a, x {quantity}, best runs at {len(law.x)} values"
        yield from _numbers(E=law.irreducible, A=law.coefficient, a=law.exponent)
        yield f"    {_goodness(law.r2, law.left_out_error, 'the largest x')}"
        yield ""


def _numbers(**intervals: Interval) -> Iterator[str]:
    for name, found in intervals.items():
        yield f"    {name}  {interval(found)}"


def _goodness(r2: float, left_out_error: float | None, largest: str) -> str:
    explained = f"explains {100 * r2:.1f} % of the variance"
    if left_out_error is None:
        return f"{explained}; too few runs to predict {largest} from the others"
    return (
        f"{explained}; fitted without {largest}, its error there is {100 * left_out_error:+.2g} %"
    )


def _isoflops(fit: MetricFit) -> Iterator[str]:
    if fit.isoflops:
        yield "  Best number of parameters at each budget"
        yield f"    {'budget':>12}  {'models':>6}  parameters"
        for iso in fit.isoflops:
            best = interval(iso.optimum) if iso.optimum else "no minimum between the models"
            yield f"    {flops(iso.flops):>12}  {len(set(iso.parameters)):6d}  {best}"
        yield ""
    for frontier in fit.frontiers:
        yield f"  Growth of the best sizes with the FLOPs C ({frontier.approach})"
        yield f"    parameters ~ C^p, p  {interval(frontier.parameters_exponent)}"
        yield f"    images     ~ C^q, q  {interval(frontier.images_exponent)}"
        yield ""


def _optima(fit: MetricFit) -> Iterator[str]:
    for optimum in fit.optima:
        times = f"{optimum.extrapolation:.3g} times the largest run"
        budget = f"{flops(optimum.flops)} ({exponential(optimum.flops)})"
        yield f"  Best use of {budget}, {times} ({optimum.approach})"
        yield f"    parameters  {interval(optimum.parameters)}"
        yield f"    images      {interval(optimum.images)}"
        if optimum.metric:
            yield f"    {fit.metric} by the law  {interval(optimum.metric)}"
        if optimum.run:
            yield f"    {fit.metric} of one run  {interval(optimum.run)}, prediction interval"
        yield ""


def _rates(fit: MetricFit) -> Iterator[str]:
    if not fit.best_rates:
        return
    yield "  Best learning rate"
    for rate in fit.best_rates:
        best = interval(rate.optimum) if rate.optimum else "not within the rates that were run"
        yield from _wrapped(f"{rate.label}: {best}", first="    ", rest="      ")
    yield ""
