import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoscale.config import parse_config, resolve
from dinoscale.engine.build import schedules_of
from dinoscale.engine.schedules import Curve, Schedules, cosine, teacher_temp


def _imagenet() -> Schedules:
    """100 epochs of ImageNet at 512 images: the settings of a published log."""
    return Schedules(
        steps_per_epoch=2502,
        total_steps=250200,
        warmup_steps=25020,
        peak_lr=1e-3,
        min_lr=1e-6,
        weight_decay=0.04,
        weight_decay_end=0.4,
        momentum=0.996,
        momentum_end=1.0,
        warmup_teacher_temp=0.04,
        teacher_temp=0.07,
        warmup_teacher_temp_epochs=30,
        teacher_temp_per_step=False,
        freeze_last_layer_epochs=1,
    )


@pytest.mark.parametrize(
    ("step", "lr", "weight_decay", "momentum"),
    [
        (0, 0.0, 0.04, 0.996),
        (1, 3.996962308645e-08, 0.04000000001418952, 0.9960000000001576),
        (25019, 1e-3, 0.04880912865913, 0.9960978792073),
        (25020, 1e-3, 0.04880982706687, 0.9960978869674),
        (25021, 9.99999999951388e-4, 0.04881052550160, 0.9960978947278),
        (125100, 5.872372647446e-4, 0.22, 0.998),
        (250199, 1.00000004861e-06, 0.39999999998581, 0.99999999999984),
    ],
)
def test_values_of_the_published_run(
    step: int, lr: float, weight_decay: float, momentum: float
) -> None:
    now = _imagenet().at(step)
    assert now.lr == pytest.approx(lr, rel=1e-12)
    assert now.weight_decay == pytest.approx(weight_decay, rel=1e-12)
    assert now.momentum == pytest.approx(momentum, rel=1e-12)


def test_epoch_means_agree_with_the_published_log() -> None:
    schedules = _imagenet()
    values = [schedules.at(step) for step in range(2502)]
    assert math.fsum(now.lr for now in values) / 2502 == pytest.approx(4.99820136696e-05, rel=1e-11)
    decay = math.fsum(now.weight_decay for now in values) / 2502
    assert decay == pytest.approx(0.0400295896048, rel=1e-11)


def test_temperature_and_freeze_are_constant_within_an_epoch() -> None:
    schedules = _imagenet()
    first, last, following = schedules.at(2502), schedules.at(5003), schedules.at(5004)
    assert first.teacher_temp == last.teacher_temp == pytest.approx(0.0410344827586207, rel=1e-12)
    assert following.teacher_temp == pytest.approx(0.0420689655172414, rel=1e-12)
    assert (first.epoch, last.epoch, following.epoch) == (1, 1, 2)
    assert schedules.at(2501).prototypes_frozen
    assert not first.prototypes_frozen


def test_temperature_per_step_is_linear_over_the_warmup_and_includes_both_ends() -> None:
    schedules = replace(_imagenet(), teacher_temp_per_step=True)
    temps = [schedules.at(step).teacher_temp for step in (0, 1, 2, 75058, 75059, 75060, 250199)]
    rise = 0.03 / 75059  # over 30 x 2502 steps
    expected = [0.04, 0.04 + rise, 0.04 + 2 * rise, 0.07 - rise, 0.07, 0.07, 0.07]
    assert temps == pytest.approx(expected, rel=1e-14)


def test_teacher_temp_reaches_its_end_on_the_last_warmup_epoch() -> None:
    temps = [teacher_temp(e, warmup_temp=0.04, temp=0.07, warmup=30) for e in range(31)]
    assert temps[0] == 0.04
    assert temps[28] < 0.07
    assert temps[29] == pytest.approx(0.07, rel=1e-15)
    assert temps[30] == 0.07


def test_warmup_of_one_step_is_its_start() -> None:
    values = [cosine(i, base=1, final=0, total_steps=3, warmup_steps=1) for i in range(3)]
    assert values == [0.0, 1.0, 0.5]
    assert teacher_temp(0, warmup_temp=0.04, temp=0.07, warmup=1) == 0.04


def test_warmup_may_be_the_whole_run() -> None:
    values = [cosine(i, base=1, final=0, total_steps=3, warmup_steps=3) for i in range(3)]
    assert values == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(("step", "warmup"), [(-1, 0), (10, 0), (0, 11), (0, -1)])
def test_steps_outside_the_run_are_refused(step: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="need 0 <="):
        cosine(step, base=1, final=0, total_steps=10, warmup_steps=warmup)


@given(
    total=st.integers(1, 400),
    base=st.floats(-5, 5),
    final=st.floats(-5, 5),
    start=st.floats(-5, 5),
    data=st.data(),
)
def test_cosine_stays_between_its_ends_and_takes_small_steps(
    total: int, base: float, final: float, start: float, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(0, total))
    step = data.draw(st.integers(0, total - 1))

    def at(i: int) -> float:
        return cosine(
            i, base=base, final=final, total_steps=total, warmup_steps=warmup, start=start
        )

    ends = (start, base) if step < warmup else (base, final)
    assert min(ends) - 1e-12 <= at(step) <= max(ends) + 1e-12
    if step + 1 < total and step + 1 != warmup == 1:
        slope = abs(base - start) / max(warmup - 1, 1) + 2 * abs(base - final) / (total - warmup)
        assert abs(at(step + 1) - at(step)) <= slope + 1e-12


def test_a_curve_in_place_of_a_formula_changes_nothing_else() -> None:
    plain, step = _imagenet(), 123
    curve = Curve(start=0.5, peak=0.7, end=0.9, warmup_steps=100, cosine_steps=50)
    before = plain.at(step)
    assert (before.local_weight, before.gram_weight) == (1.0, 1.0)
    for field, changed in {
        "lr_curve": "lr",
        "weight_decay_curve": "weight_decay",
        "momentum_curve": "momentum",
        "teacher_temp_curve": "teacher_temp",
        "local_weight": "local_weight",
        "gram_weight": "gram_weight",
    }.items():
        now = replace(plain, **{field: curve}).at(step)
        assert now == replace(before, **{changed: curve.at(step)})
        assert now != before


@given(
    st.integers(0, 20), st.integers(0, 20), *[st.floats(0, 1, allow_subnormal=False) for _ in "abc"]
)
def test_a_curve_stays_between_its_three_values_and_ends(
    warmup: int, length: int, start: float, peak: float, end: float
) -> None:
    curve = Curve(start=start, peak=peak, end=end, warmup_steps=warmup, cosine_steps=length)
    values = [curve.at(step) for step in range(warmup + length + 2)]
    low, high = min(start, peak, end), max(start, peak, end)
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)
    assert values[-2:] == [end, end]
    if warmup:
        assert values[0] == start
    if length:
        assert values[warmup] == pytest.approx(peak, abs=1e-12)  # not on the step before
    if length > 1:
        assert values[warmup + length - 1] == pytest.approx(end, abs=1e-12)


def test_peak_and_end_of_a_curve_of_the_rate_grow_with_the_batch_and_its_start_does_not() -> None:
    curve = {"start": 1e-4, "peak": 1e-3, "end": 1e-5, "warmup_epochs": 1, "cosine_epochs": 1}
    config = parse_config({"train": {"batch_size": 512}, "schedules": {"lr": curve}})
    plan = resolve(config, world_size=1, num_images=1024)  # 2 steps an epoch
    rates = [schedules_of(config, plan).at(step).lr for step in range(5)]
    assert rates == pytest.approx([1e-4, 1.05e-3, 2e-3, 2e-5, 2e-5], rel=1e-14)
    assert (plan.peak_lr, plan.min_lr) == (2e-3, 2e-5)
    given = {"train": {"batch_size": 512}, "schedules": {"lr": curve | {"start": 0.5}}}
    assert parse_config(given).peak_lr == 0.5


def test_a_cosine_cut_from_a_longer_run_ends_at_the_final_value() -> None:
    values = [cosine(i, base=2.0, final=1.0, total_steps=9, extra=0.5) for i in range(9)]
    assert (values[0], values[-1]) == (2.0, 1.0)
    assert values == sorted(values, reverse=True)
    assert cosine(0, base=2.0, final=1.0, total_steps=1, extra=0.5) == 1.0


def test_a_step_with_gram_has_its_weight_or_one_where_that_is_zero() -> None:
    run = replace(_imagenet(), gram_weight=Curve(0.0, 2.0, 2.0, warmup_steps=10))
    assert [run.at(step).gram_weight for step in (0, 5)] == [0, 1]
    assert [run.at(step).with_gram().gram_weight for step in (0, 10)] == [1, 2]
    assert run.at(0).with_gram() == replace(run.at(0), gram_weight=1.0)
