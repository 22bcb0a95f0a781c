"""A number over the steps of a run in bounded memory, however long the run is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

BUCKETS = 1000  # at least half as many once a series is longer; two points each are drawn


class Point(NamedTuple):
    """A value and its step."""

    step: int
    value: float


@dataclass
class _Bucket:
    """Neighbouring points, of which only the extremes are kept."""

    first_step: int
    last_step: int
    lowest: Point
    highest: Point
    total: float
    count: int

    def join(self, other: _Bucket) -> None:
        self.last_step = other.last_step
        self.lowest = min(self.lowest, other.lowest, key=lambda point: point.value)
        self.highest = max(self.highest, other.highest, key=lambda point: point.value)
        self.total += other.total
        self.count += other.count


@dataclass
class Series:
    """Finite values in the order of their lines; exact up to 1000 points, then thinned.

    Neighbours are joined in buckets of equal numbers of points, and of each the lowest, the highest
    and the mean are kept, so that no spike is lost.

    Attributes:
        count: of all points.
        lowest: of all points, the first of equals; None without any. `highest` and `last` alike.
    """

    count: int = 0
    lowest: Point | None = None
    highest: Point | None = None
    last: Point | None = None
    _buckets: list[_Bucket] = field(default_factory=list)
    _size: int = 1  # points in a full bucket

    def add(self, step: int, value: float) -> None:
        """Take a finite value."""
        point = self.last = Point(step, value)
        self.count += 1
        if self.lowest is None or value < self.lowest.value:
            self.lowest = point
        if self.highest is None or value > self.highest.value:
            self.highest = point
        new = _Bucket(step, step, point, point, value, 1)
        if self._buckets and self._buckets[-1].count < self._size:
            self._buckets[-1].join(new)
            return
        if len(self._buckets) == BUCKETS:
            for left, right in zip(self._buckets[::2], self._buckets[1::2], strict=True):
                left.join(right)
            del self._buckets[1::2]
            self._size *= 2
        self._buckets.append(new)

    def points(self) -> list[Point]:
        """What to draw, ordered by step: all points, or the extremes of each bucket."""
        return sorted({point for bucket in self._buckets for point in self._extremes(bucket)})

    def means(self) -> list[Point]:
        """Mean of each bucket at its middle, ordered by step."""
        return sorted(
            Point((bucket.first_step + bucket.last_step) // 2, bucket.total / bucket.count)
            for bucket in self._buckets
        )

    @staticmethod
    def _extremes(bucket: _Bucket) -> Iterator[Point]:
        yield bucket.lowest
        yield bucket.highest


def smooth(points: list[Point], *, window: int) -> list[Point]:
    """Mean of each point with its neighbours, `window` in all, fewer at the ends."""
    half = window // 2
    sums = [0.0]
    for point in points:
        sums.append(sums[-1] + point.value)
    smoothed = []
    for place, point in enumerate(points):
        reach = min(half, place, len(points) - 1 - place)  # as far to both sides
        low, high = place - reach, place + reach + 1
        smoothed.append(Point(point.step, (sums[high] - sums[low]) / (high - low)))
    return smoothed
