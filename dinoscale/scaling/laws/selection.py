"""Select the runs of a table that a law is fitted to.

Runs that differ only in the seed share a setting and form one point of a law, the mean of their log
y. Their scatter measures only the effect of the seed, not the error of the law. Among settings that
differ in anything else, such as the learning rate, the best counts, as if it had been tuned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dinoscale.scaling.laws.laws import Numbers
from dinoscale.scaling.number_text import SAME
from dinoscale.scaling.sweep.table import Row

QUANTITIES = ("parameters", "images", "flops")
_NO_DIFFERENCE = {"seed", "run_dir"}  # keys that do not distinguish settings
_DISQUALIFYING = (
    "collapse",
    "rolled back",
    "fall",
)  # events that make a run unrepresentative of its settings
_RATE_KEYS = {"lr", "min_lr"}  # in optim


@dataclass(frozen=True)
class Point:
    """Runs of one setting.

    Attributes:
        rows: the runs, which differ only in the seed.
        y: their metric, (number of runs,).
    """

    rows: tuple[Row, ...]
    y: Numbers

    @property
    def row(self) -> Row:
        """The first of the runs."""
        return self.rows[0]

    @property
    def log_y(self) -> float:
        """Mean of log y over the seeds."""
        return float(np.log(self.y).mean())


def usable_rows(rows: Sequence[Row], metric: str) -> tuple[list[Row], dict[str, str]]:
    """The runs that a fit can use, and the reasons for excluding the others: name -> reason."""
    reasons = [_reason(row, metric) for row in rows]
    used = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    left_out = {row.name: reason for row, reason in zip(rows, reasons, strict=True) if reason}
    return used, left_out


def _reason(row: Row, metric: str) -> str:
    if row.status != "done":
        return f"failed: {row.error or 'the table gives no reason'}"
    events = disqualifying_events(row)
    if events:
        return f"{' and '.join(events)} during training (events.jsonl)"
    value = row.metrics.get(metric)
    if metric not in row.metrics:
        return f"{metric} was not measured"
    if value is None or not math.isfinite(value):
        return f"{metric} is not a finite number"
    if value <= 0:
        return f"{metric} is {value:g}, but a power law is positive"
    sizes = {
        name: getattr(row, name) for name in ("parameters", "images", "flops", "flops_per_image")
    }
    wrong = [f"{name} is {size}" for name, size in sizes.items() if not size or size <= 0]
    return ", ".join(wrong)


def disqualifying_events(row: Row) -> list[str]:
    """Events after which the result of a run says nothing about its settings."""
    return [name for name in _DISQUALIFYING if row.events.get(name)]


def group_by_setting(rows: Iterable[Row], metric: str) -> list[Point]:
    """One point per setting, in the order of the runs."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(setting_key(row), []).append(row)
    return [
        Point(tuple(group), np.array([row.metrics[metric] for row in group], dtype=np.float64))
        for group in groups.values()
    ]


def setting_key(row: Row, *, any_rate: bool = False) -> str:
    """Equal for runs that differ only in the seed (and with `any_rate` the learning rate)."""
    config = {name: value for name, value in row.config.items() if name not in _NO_DIFFERENCE}
    sizes = [row.parameters, row.flops_per_image, row.images, row.distinct_images, row.batch_size]
    if not any_rate:
        return json.dumps([sizes, row.lr, config], sort_keys=True)
    optim = config.get("optim")
    if isinstance(optim, dict):
        config["optim"] = {name: optim[name] for name in optim if name not in _RATE_KEYS}
    return json.dumps([sizes, config], sort_keys=True)


def tuned(points: Sequence[Point]) -> list[Point]:
    """The best setting of each number of parameters and images."""
    of_images = close_groups([point.row.images for point in points])
    return _best(points, [(p.row.parameters, g) for p, g in zip(points, of_images, strict=True)])


def best_along(points: Sequence[Point], quantity: str) -> list[Point]:
    """The best setting at each value of a quantity, by ascending value.

    Along the FLOPs: the settings that no cheaper one beats.
    """
    ascending = sorted(points, key=size_of(quantity))
    if quantity == "flops":
        frontier: list[Point] = []
        for point in ascending:
            if not frontier or point.log_y < frontier[-1].log_y:
                frontier.append(point)
        return frontier
    values = [size_of(quantity)(point) for point in ascending]
    if quantity == "parameters":
        return _best(ascending, values)
    return _best(ascending, close_groups(values))


def size_of(quantity: str) -> Callable[[Point], float]:
    """A function that returns a quantity of a point."""
    return lambda point: float(getattr(point.row, quantity))


def _best(points: Sequence[Point], keys: Sequence[object]) -> list[Point]:
    best: dict[object, Point] = {}
    for point, key in zip(points, keys, strict=True):
        if key not in best or point.log_y < best[key].log_y:
            best[key] = point
    return list(best.values())


def close_groups(values: Sequence[float]) -> list[int]:
    """Group index of each value; values of a group differ by at most `SAME`."""
    groups, number, first = [0] * len(values), -1, -math.inf
    for index in sorted(range(len(values)), key=lambda index: values[index]):
        if number < 0 or values[index] > first * (1 + SAME):
            number, first = number + 1, values[index]
        groups[index] = number
    return groups
