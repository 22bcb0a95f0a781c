"""Numbers as people read them: 40 k, 1.2 M, 0.31."""

from __future__ import annotations

import math

SAME = 0.05  # relative difference of budgets, or images, that whole batches explain
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
