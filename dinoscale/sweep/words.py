"""Numbers as people read them: 40 k, 1.2 M, 0.31, with their intervals."""

from __future__ import annotations

import math

from dinoscale.sweep.laws import Interval

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")  # of 1000^i
PREFIXES_SAY = "k, M, G, T, P, E, Z: 10 to the power of 3, 6, 9, 12, 15, 18, 21"


def number(value: float | None, *, digits: int = 3) -> str:
    """A number of a few digits, from a thousand on with the prefix of a unit; "-" for none."""
    if value is None or not math.isfinite(value):
        return "-"
    rounded = float(f"{value:.{digits}g}")
    size = math.floor(math.log10(abs(rounded)) + 1e-9) if rounded else 0
    if size < 3:
        return f"{rounded:.{max(digits, size + 1)}g}"
    thousands = min(size // 3, len(_PREFIXES) - 1)
    return f"{rounded / 1000**thousands:.{max(digits, 3)}g} {_PREFIXES[thousands]}"


def flops(value: float) -> str:
    """Floating-point operations, such as 12 EFLOPs."""
    text = number(value)
    return f"{text}FLOPs" if " " in text else f"{text} FLOPs"


def interval(found: Interval) -> str:
    """An estimate with its interval; an end that is infinite, or zero, bounds nothing."""
    low = found.low > 0 and math.isfinite(found.low)
    high = math.isfinite(found.high)
    if low and high:
        ends = f"{number(found.low)} to {number(found.high)}"
    elif low:
        ends = f"at least {number(found.low)}"
    else:
        ends = f"at most {number(found.high)}" if high else "no bounds"
    return f"{number(found.value)} ({ends})"


def percent(share: float, *, sign: bool = False) -> str:
    """A fraction as percent."""
    return f"{100 * share:{'+' if sign else ''}.2g} %" if abs(share) < 1 else f"{100 * share:.0f} %"


def metric_name(metric: str) -> str:
    """A metric with its unit."""
    return "loss, nats" if metric == "loss" else f"{metric} error, fraction"
