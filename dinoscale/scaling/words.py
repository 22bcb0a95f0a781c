"""Numbers as people read them: 40 k, 1.2 M, 0.31, with their intervals."""

from __future__ import annotations

import math

from dinoscale.scaling.laws import Interval

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")  # of 1000^i


def number(value: float | None, *, digits: int = 3, zeros: bool = False) -> str:
    """A number in words for people.

    Args:
        value: from a thousand on it gets the prefix of a unit; "-" for None and not finite.
        digits: significant ones, of integers below a thousand all.
        zeros: whether zeros at the end are kept.
    """
    if value is None or not math.isfinite(value):
        return "-"
    rounded = float(f"{value:.{digits}g}")
    size = math.floor(math.log10(abs(rounded)) + 1e-9) if rounded else 0
    thousands = min(max(size // 3, 0), len(_PREFIXES) - 1)
    shown = (
        f"{rounded / 1000**thousands:{'#' if zeros else ''}.{max(digits, 3 if size > 1 else 1)}g}"
    )
    return f"{shown.rstrip('.')} {_PREFIXES[thousands]}".rstrip()


def flops(value: float) -> str:
    """Floating-point operations, such as 12 EFLOPs."""
    text = number(value)
    return f"{text}FLOPs" if " " in text else f"{text} FLOPs"


def exponential(value: float) -> str:
    """The same as one types it, such as 1.2e19."""
    return f"{value:.3g}".replace("e+", "e")


def interval(found: Interval) -> str:
    """An estimate with its interval."""
    return f"{number(found.value, zeros=True)} ({ends(found)})"


def ends(found: Interval) -> str:
    """An interval; an end that is infinite, or zero, bounds nothing."""
    low, high = (number(end, zeros=True) for end in (found.low, found.high))
    bounded = found.low > 0 and math.isfinite(found.low)
    if not math.isfinite(found.high):
        return f"at least {low}" if bounded else "no bounds"
    return f"{low} to {high}" if bounded else f"at most {high}"


def percent(share: float, *, sign: bool = False) -> str:
    """A fraction as percent."""
    return f"{'+' if sign and share > 0 else ''}{number(100 * share)} %"


def metric_name(metric: str) -> str:
    """A metric in a sentence."""
    return "loss" if metric == "loss" else f"{metric} error"


def metric_unit(metric: str) -> str:
    """The same with its unit."""
    return f"{metric_name(metric)} ({'nats' if metric == 'loss' else 'fraction'})"
