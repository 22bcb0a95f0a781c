"""Numbers of a run in bounded memory: short ones exact, long ones with their spikes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoscale.reports.run.series import BUCKETS, Point, Series, smooth


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=200))
def test_a_short_series_is_kept_as_it_is(values: list[float]) -> None:
    series = Series()
    for step, value in enumerate(values):
        series.add(step, value)
    assert series.points() == [Point(step, value) for step, value in enumerate(values)]
    assert series.lowest == min(series.points(), key=lambda point: point.value)
    assert series.highest == max(series.points(), key=lambda point: point.value)


@pytest.mark.parametrize("count", [BUCKETS + 1, 10 * BUCKETS + 7])
def test_a_long_series_is_thinned_and_keeps_its_spikes_and_mean(count: int) -> None:
    series = Series()
    spikes = {count // 3: 1e6, count // 2: -1e6}
    for step in range(count):
        series.add(step, spikes.get(step, float(step % 7)))
    points = series.points()
    assert BUCKETS / 2 <= len(points) <= 2 * BUCKETS
    assert {Point(step, value) for step, value in spikes.items()} <= set(points)
    assert series.count == count
    assert [point.step for point in points] == sorted(point.step for point in points)
    assert all(point.step == 0 or abs(point.value) < 1e6 for point in series.means()[:10])
    quiet = [point.value for point in series.means() if abs(point.value) < 10]
    assert sum(quiet) / len(quiet) == pytest.approx(3, abs=0.2)


def test_a_straight_line_stays_straight_when_smoothed() -> None:
    line = [Point(step, 2.0 * step) for step in range(50)]
    assert [p.value for p in smooth(line, window=9)] == pytest.approx([p.value for p in line])
