"""Which of many results a sheet shows, and what it calls the weights that gave them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import TypeVar

T = TypeVar("T")

OF_A_KIND = 3


def best_median_worst(
    results: Sequence[T], quality: Callable[[T], float], *, of_a_kind: int = OF_A_KIND
) -> list[tuple[str, T]]:
    """Choose results to show, each with what it is; one of few results that is several comes once.

    Args:
        results: all of them.
        quality: of a result, the higher the better.
        of_a_kind: how many of the best, of the median and of the worst ones.
    """
    order = sorted(range(len(results)), key=lambda number: -quality(results[number]))
    middle = max(0, (len(order) - of_a_kind) // 2)
    kinds = {
        "best": order[:of_a_kind],
        "median": order[middle : middle + of_a_kind],
        "worst": order[-of_a_kind:],
    }
    labels: dict[int, str] = {}
    for kind, chosen in kinds.items():
        for number in chosen:
            labels.setdefault(number, kind)
    return [(kind, results[number]) for number, kind in labels.items()]


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths that no two of them share."""
    parts = [PurePath(path).parts for path in paths]
    for length in range(1, max(map(len, parts), default=1)):
        names = [str(PurePath(*part[-length:])) for part in parts]
        if max(Counter(names).values()) == 1:
            return names
    return list(paths)
