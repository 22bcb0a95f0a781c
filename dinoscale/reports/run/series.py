"""A scalar over the steps of a run, in bounded memory however long the run is."""

from __future__ import annotations

from typing import NamedTuple

BUCKETS = 1000  # 500 to 1000 are in use once a series is longer; each draws two points


class Point(NamedTuple):
    """A value and its step."""

    step: int
    value: float


class _Bucket:
    """Neighboring points, reduced to their extremes and sum."""

    __slots__ = (
        "count",
        "first_step",
        "high",
        "high_step",
        "last_step",
        "low",
        "low_step",
        "total",
    )

    def __init__(self, step: int, value: float) -> None:
        self.first_step = self.last_step = self.low_step = self.high_step = step
        self.low = self.high = self.total = value
        self.count = 1

    def add(self, step: int, value: float) -> None:
        self.last_step = step
        self.total += value
        self.count += 1
        if value < self.low:
            self.low_step, self.low = step, value
        elif value > self.high:
            self.high_step, self.high = step, value

    def join(self, later: _Bucket) -> None:
        self.last_step = later.last_step
        self.total += later.total
        self.count += later.count
        if later.low < self.low:
            self.low_step, self.low = later.low_step, later.low
        if later.high > self.high:
            self.high_step, self.high = later.high_step, later.high

    def lowest(self) -> Point:
        return Point(self.low_step, self.low)

    def highest(self) -> Point:
        return Point(self.high_step, self.high)


class Series:
    """Finite values in log order; exact up to 1000 points, then aggregated.

    Neighbors are joined into buckets of equal numbers of points. Each keeps its lowest and highest
    point and its mean, so that no spike is lost.

    Attributes:
        count: number of points added.
        last: the last point; None without any.
    """

    def __init__(self) -> None:
        """Start without points."""
        self.count = 0
        self.last: Point | None = None
        self._buckets: list[_Bucket] = []
        self._size = 1  # points in a full bucket

    def add(self, step: int, value: float) -> None:
        """Add a finite value; this is called for every number of a log."""
        self.last = Point(step, value)
        self.count += 1
        buckets = self._buckets
        if buckets and buckets[-1].count < self._size:
            buckets[-1].add(step, value)
            return
        if len(buckets) == BUCKETS:
            for left, right in zip(buckets[::2], buckets[1::2], strict=True):
                left.join(right)
            del buckets[1::2]
            self._size *= 2
        buckets.append(_Bucket(step, value))

    @property
    def lowest(self) -> Point | None:
        """The lowest point, the first among equals; None without any."""
        lows = (bucket.lowest() for bucket in self._buckets)
        return min(lows, key=lambda point: point.value, default=None)

    @property
    def highest(self) -> Point | None:
        """The highest point, the first among equals; None without any."""
        highs = (bucket.highest() for bucket in self._buckets)
        return max(highs, key=lambda point: point.value, default=None)

    def points(self) -> list[Point]:
        """The points to draw, by step: all, or the extremes of each bucket."""
        extremes = {bucket.lowest() for bucket in self._buckets}
        return sorted(extremes | {bucket.highest() for bucket in self._buckets})

    def means(self) -> list[Point]:
        """Mean of each bucket at its middle step, by step."""
        return sorted(
            Point((bucket.first_step + bucket.last_step) // 2, bucket.total / bucket.count)
            for bucket in self._buckets
        )


def smooth(points: list[Point], *, window: int) -> list[Point]:
    """Moving average over `window` points, fewer at the ends."""
    half = window // 2
    sums = [0.0]
    for point in points:
        sums.append(sums[-1] + point.value)
    smoothed = []
    for place, point in enumerate(points):
        reach = min(half, place, len(points) - 1 - place)  # symmetric
        low, high = place - reach, place + reach + 1
        smoothed.append(Point(point.step, (sums[high] - sums[low]) / (high - low)))
    return smoothed
