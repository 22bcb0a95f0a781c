"""Numbers for people: 40 k, 1.2 M, 0.31, 8e+32."""

from __future__ import annotations

import math

SAME = 0.05  # budgets or image counts this close count as equal: whole batches shift them so far
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")  # prefix i stands for 1000^i


def number(value: float | None, *, digits: int = 3, zeros: bool = False) -> str:
    """A number as short text, with an SI prefix from a thousand on, as far as there are any.

    Args:
        value: the number; None and non-finite values give "-".
        digits: significant digits; integers below a thousand keep all of theirs.
        zeros: whether trailing zeros are kept.
    """
    if value is None or not math.isfinite(value):
        return "-"
    rounded = float(f"{value:.{digits}g}")
    size = math.floor(math.log10(abs(rounded)) + 1e-9) if rounded else 0
    thousands = max(size // 3, 0)
    if thousands >= len(_PREFIXES):
        return f"{rounded:.{digits}g}"
    shown = (
        f"{rounded / 1000**thousands:{'#' if zeros else ''}.{max(digits, 3 if size > 1 else 1)}g}"
    )
    return f"{shown.rstrip('.')} {_PREFIXES[thousands]}".rstrip()
