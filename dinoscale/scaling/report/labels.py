"""Labels for text, tables and plots: numbers with units, intervals, names of metrics."""

from __future__ import annotations

import math

from dinoscale.scaling.laws.laws import Interval
from dinoscale.scaling.number_text import number


def flops(value: float) -> str:
    """FLOPs with an SI prefix, such as 12 EFLOPs."""
    text = number(value)
    return f"{text}FLOPs" if " " in text else f"{text} FLOPs"


def exponential(value: float) -> str:
    """FLOPs as they are typed, such as 1.2e19."""
    return f"{value:.3g}".replace("e+", "e")


def interval(found: Interval) -> str:
    """An estimate with its interval."""
    return f"{number(found.value, zeros=True)} ({ends(found)})"


def ends(found: Interval) -> str:
    """The ends of an interval; an infinite upper or zero lower end bounds nothing."""
    low, high = (number(end, zeros=True) for end in (found.low, found.high))
    bounded = found.low > 0 and math.isfinite(found.low)
    if not math.isfinite(found.high):
        return f"at least {low}" if bounded else "no bounds"
    return f"{low} to {high}" if bounded else f"at most {high}"


def percent(share: float, *, sign: bool = False) -> str:
    """A fraction as percent."""
    return f"{'+' if sign and share > 0 else ''}{number(100 * share)} %"


def metric_name(metric: str) -> str:
    """A metric within a sentence."""
    return "loss" if metric == "loss" else f"{metric} error"


def metric_unit(metric: str) -> str:
    """A metric with its unit."""
    return f"{metric_name(metric)} ({'nats' if metric == 'loss' else 'fraction'})"
