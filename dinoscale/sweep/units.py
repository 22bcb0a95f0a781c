"""Large numbers as people write them."""

from __future__ import annotations

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(number: float) -> str:
    """Three digits and a unit, as 21.7M."""
    for size, unit in _UNITS:
        if number >= size * 0.9995:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number:.3g}"
    return f"{number:.3g}"
