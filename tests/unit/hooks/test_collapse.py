"""The monitor on series with the shapes of recorded runs (see training/hooks/collapse.py)."""

import math
from collections.abc import Callable

import pytest
import torch

from dinoscale.losses.centering import entropy
from dinoscale.training.hooks.collapse import (
    OBSERVE_EVERY,
    CollapseMonitor,
    Reading,
)

PROTOTYPES = 128
LN_K = math.log(PROTOTYPES)
Series = Callable[[int], tuple[float, float, float]]  # step -> information, share, h


def _alarms(
    series: Series,
    *,
    steps: int = 300,
    warmup: int = 25,
    freeze: int = 0,
    temp: float = 0.04,
    every: int = OBSERVE_EVERY,
) -> list[tuple[int, str]]:
    monitor = CollapseMonitor(
        num_prototypes=PROTOTYPES,
        student_temp=0.1,
        center_momentum=0.9,
        warmup_steps=warmup,
        freeze_steps=freeze,
    )
    found = []
    for step in range(every, steps + 1, every):
        information, share, h = series(step)
        alarm = monitor.observe(step, Reading(h + information, h, h + information, share, temp))
        if alarm is not None:
            found.append((step, alarm.kind))
    return found


def _healthy(step: int) -> tuple[float, float, float]:
    """Quickstart: information falls from 1.9 to 0.2 around step 120 and rises again."""
    information = 0.2 + 1.7 * math.exp(-step / 30) + 0.5 * max(0, 1 - math.exp((120 - step) / 80))
    share = 0.02 + 0.17 * math.exp(-(((step - 40) / 20) ** 2))
    return information, share, LN_K * (0.94 - 0.4 * math.exp(-step / 30))


def _slow_start(step: int) -> tuple[float, float, float]:
    """Equal targets for 150 steps, then information grows by 1.6 in 25 steps."""
    information = min(1.5, 0.01 * 1.6 ** (max(0, step - 150) / 25))
    return information, 0.02, LN_K - information


def _unfreeze_bump(step: int) -> tuple[float, float, float]:
    """Information falls from 2 to 0.04 for 40 steps as the prototypes come loose at step 100."""
    if step < 100:
        return 0.1 + 1.9 * (step / 100) ** 2, 0.03, LN_K - 2.5
    return (0.04 if step < 140 else 1.0), 0.05, LN_K - 1.2


def _uniform(step: int) -> tuple[float, float, float]:
    information = 1.9 * math.exp(-step / 15)  # below 0.05 from step 55
    return information, 0.02, LN_K - information


def _one_hot(step: int) -> tuple[float, float, float]:
    """A few images escape, so the targets never stop carrying information."""
    share = 0.97 / (1 + math.exp((35 - step) / 8))  # 0.5 at step 36
    return 0.4, share, 2.2 * (1 - share)


def _constant(step: int) -> tuple[float, float, float]:
    return 0.45 * math.exp(-step / 25), 0.25, 3.1 + 0.4 * math.sin(step / 10)


@pytest.mark.parametrize("every", [1, OBSERVE_EVERY])
def test_healthy_run_raises_nothing(every: int) -> None:
    assert _alarms(_healthy, steps=600, every=every) == []


def test_equal_targets_during_the_warm_up_raise_nothing() -> None:
    assert _alarms(_slow_start, steps=600, warmup=150) == []
    assert _alarms(_slow_start, steps=600, freeze=150) == []


def test_equal_targets_that_stay_so_after_the_warm_up_are_a_collapse() -> None:
    def never_starts(step: int) -> tuple[float, float, float]:
        return 0.01 + 0.002 * math.sin(step), 0.02, LN_K - 0.01

    assert _alarms(never_starts, warmup=150) == [(200, "uniform")]


def test_start_with_a_lagging_center_raises_nothing() -> None:
    def lagging(step: int) -> tuple[float, float, float]:
        return (0.001, 0.9, 0.3) if step < 40 else (0.3, 0.1, 4.0)

    assert _alarms(lagging) == []


def test_information_that_a_lagging_center_hid_counts_as_none_learned() -> None:
    def dips(step: int) -> tuple[float, float, float]:
        information = 0.001 if step < 20 or 60 <= step < 120 else 0.4
        return information, 0.05, LN_K - 0.5

    assert _alarms(dips, warmup=200) == []


def test_equal_targets_that_narrow_are_named_one_hot() -> None:
    def narrows(step: int) -> tuple[float, float, float]:
        return (0.5 if step < 100 else 0.001), (0.1 if step < 115 else 0.9), 0.5

    assert _alarms(narrows) == [(140, "one_hot")]


def test_loss_bump_after_the_prototypes_unfreeze_raises_nothing() -> None:
    assert _alarms(_unfreeze_bump, warmup=1000, freeze=100) == []


@pytest.mark.parametrize(
    ("series", "kind", "begin"),
    [(_uniform, "uniform", 55), (_one_hot, "one_hot", 36), (_constant, "constant", 55)],
)
@pytest.mark.parametrize("every", [1, OBSERVE_EVERY])
def test_collapse_is_named_once_within_fifty_steps(
    series: Series, kind: str, begin: int, every: int
) -> None:
    ((step, found),) = _alarms(series, every=every)
    assert found == kind
    assert begin < step <= begin + 50


def test_collapse_of_targets_that_had_learned_does_not_wait_for_the_warm_up() -> None:
    def learns_then_collapses(step: int) -> tuple[float, float, float]:
        information = min(1.0, step / 200) if step < 200 else 0.001
        return information, 0.02, LN_K - information

    ((step, kind),) = _alarms(learns_then_collapses, warmup=10_000)
    assert (step, kind) == (225, "uniform")


def test_teacher_without_sharpening_does_not_wait_for_the_warm_up() -> None:
    def flat(step: int) -> tuple[float, float, float]:
        return 0.04 * math.exp(-step / 20), 0.01, LN_K - 0.01

    assert _alarms(flat, warmup=10_000, temp=0.04) == []
    assert _alarms(flat, warmup=10_000, temp=0.1) == [(30, "uniform")]


def test_alarm_comes_again_only_after_it_has_cleared() -> None:
    def twice(step: int) -> tuple[float, float, float]:
        collapsed = 100 <= step < 150 or 200 <= step < 250
        return (0.001 if collapsed else 0.5), 0.02, LN_K - 0.5

    def two_winners(step: int) -> tuple[float, float, float]:
        collapsed = 100 <= step < 150 or 200 <= step < 250
        return 0.3, (0.9 if collapsed else 0.2), 1.0

    def flickers(step: int) -> tuple[float, float, float]:
        return (0.06 if step == 150 else 0.001), 0.02, LN_K - 0.001

    assert _alarms(twice) == [(125, "uniform"), (225, "uniform")]
    assert _alarms(two_winners) == [(125, "one_hot"), (225, "one_hot")]
    assert len(_alarms(flickers)) == 1


def test_dips_shorter_than_the_window_raise_nothing() -> None:
    def dips(step: int) -> tuple[float, float, float]:
        low = step % 40 < 20
        return (0.001 if low else 0.5), (0.1 if low else 0.8), 3.0

    assert _alarms(dips) == []


def test_non_finite_step_changes_nothing() -> None:
    def skips(step: int) -> tuple[float, float, float]:
        return (math.nan, math.nan, math.nan) if step == 70 else _uniform(step)

    assert _alarms(skips) == _alarms(_uniform)


def _text(kind: str, *, temp: float) -> str:
    monitor = CollapseMonitor(
        num_prototypes=PROTOTYPES,
        student_temp=0.1,
        center_momentum=0.999,
        warmup_steps=0,
        freeze_steps=0,
    )
    h, share = (0.01, 0.99) if kind == "one_hot" else (LN_K, 0.01)
    alarms = [monitor.observe(step, Reading(h, h, h, share, temp)) for step in range(0, 100, 5)]
    (alarm,) = [alarm for alarm in alarms if alarm is not None]
    assert alarm.kind == kind
    return alarm.text


def test_text_names_the_settings_and_their_values() -> None:
    one_hot, uniform = _text("one_hot", temp=0.04), _text("uniform", temp=0.3)
    assert "lower dino.center_momentum (now 0.999" in one_hot
    assert "99.0 %" in one_hot
    assert "lower dino.teacher_temp (now 0.3 against dino.student_temp 0.1" in uniform
    assert "it has to be lower" in uniform
    assert "it has to be lower" not in _text("uniform", temp=0.08)
    assert "teacher entropy 4.852 of at most 4.852 nats" in uniform


def test_reading_of_known_targets() -> None:
    targets = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0.5, 0.5]])
    mean_target = targets.mean(0)
    of_targets, of_mean = float(entropy(targets)), float(entropy(mean_target))
    reading = Reading(2.0, of_targets, of_mean, float(mean_target.max()), teacher_temp=0.04)
    assert reading.share == 0.5
    mean = 0.5 * math.log(2) + 0.25 * math.log(4) + 0.25 * math.log(8)
    assert reading.information == pytest.approx(mean - math.log(2) / 4)
