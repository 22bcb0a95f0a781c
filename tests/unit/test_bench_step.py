"""`bench step`: time goes to the part that took it, and bad input is refused with a sentence."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoscale.config import load_config, resolve, split_batch
from dinoscale.errors import ConfigError
from dinoscale.planning.bench.budget import Budget, fit_to_time, in_turns
from dinoscale.planning.bench.ceiling import matmul_rates
from dinoscale.planning.bench.our_step import OurStep
from dinoscale.planning.bench.step import CHECKOUT, bench_step, find_reference, too_slow
from dinoscale.planning.bench.step_report import as_text
from dinoscale.planning.bench.timeline import PARTS, Timeline, watch_pair
from dinoscale.runtime.launcher_env import read_process
from dinoscale.training.feed import Feed, MicroBatches, open_images
from tests.distributed.tiny_run import tiny_config

PAUSE_S = 0.25  # of a pretended clock; sums of quarters are exact


def _sleep(times: int) -> None:
    _Clock.now_s += times * PAUSE_S


class _Clock:
    now_s = 0.0


class _Student(nn.Module):
    """Looks like a student; every part of it takes another time."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.backbone = nn.Identity()
        self.master = ["weights"]

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        _sleep(1)
        features = self.network.backbone(crops)
        _sleep(2)
        return features

    def backward(self) -> None:
        _sleep(3)

    def step(self, *, apply: bool) -> bool:
        _sleep(4)
        return apply


class _Teacher:
    def begin(self, timeline: Timeline) -> None:
        _sleep(7)
        with timeline.interrupted():
            timeline.mark("augmentation")
            _sleep(8)
        _sleep(9)

    def targets(self) -> str:
        _sleep(5)
        return "targets"

    def update(self, student: Any) -> None:
        assert student.master == ["weights"]
        _sleep(6)


def test_time_goes_to_the_part_that_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: _Clock.now_s)
    timeline = Timeline(torch.device("cpu"))
    student, teacher = watch_pair(_Student(), _Teacher(), timeline)
    timeline.mark("data")
    begin = time.perf_counter()
    _sleep(1)
    teacher.begin(timeline)
    assert teacher.targets() == "targets"
    student(torch.ones(1))
    student.backward()
    assert student.step(apply=True)
    teacher.update(student)
    parts = timeline.take()
    whole = time.perf_counter() - begin
    assert tuple(parts) == PARTS
    expected = {"data": 1, "student_forward": 1, "loss": 2, "backward": 3, "optimizer": 4}
    expected |= {"teacher": 7 + 9 + 5, "augmentation": 8, "ema": 6}
    for part, seconds in parts.items():
        assert seconds == expected.get(part, 0) * PAUSE_S, part
    assert sum(parts.values()) == whole
    assert sum(timeline.take().values()) == 0  # the marks are gone


def test_the_ceiling_is_a_rate_of_products() -> None:
    kinds = (torch.bfloat16, torch.float32)
    rates = matmul_rates(torch.device("cpu"), kinds, tokens=64, embed_dim=16)
    assert tuple(rates) == kinds
    assert all(1e8 < rate < 1e14 for rate in rates.values())


def _budget(**changes: Any) -> Budget:
    given = {"limit_s": 360.0, "seconds": 10.0, "turns": 3, "image_flops": 1e11}
    rates = {"our_flops_per_s": 1e11, "their_flops_per_s": 1e11}
    return Budget(**{**given, **rates, "device": "cpu", "with_reference": True, **changes})


def test_a_slow_machine_measures_fewer_images_and_no_reference() -> None:
    config = load_config("vit_s16", ["train.batch_size=128", "train.micro_batch_size=64"])
    fast = _budget(our_flops_per_s=1e14, their_flops_per_s=1e14)
    assert fit_to_time(config, fast, world_size=1) == (config, "")
    assert fast.fits_once(128)
    small, changed = fit_to_time(config, _budget(), world_size=2)
    assert small.train.batch_size == 2 * small.train.micro_batch_size == 2 * 4
    assert small.optim.min_lr == 0
    assert "64 x 1 images per step and rank do not fit into 6 minutes" in changed
    assert _budget().fits(4)
    assert not _budget().fits(8)
    assert _budget(with_reference=False).fits(8)
    assert _budget().fits_once(4)
    assert not _budget(their_flops_per_s=1e9).fits_once(1)  # as bf16 without instructions for it
    for slow_reference in (_budget(their_flops_per_s=1e9), _budget(their_flops_per_s=1.0)):
        ours_alone = fit_to_time(config, _budget(with_reference=False), world_size=2)
        assert fit_to_time(config, slow_reference, world_size=2) == ours_alone
        assert ours_alone[0].train.micro_batch_size == 8
        assert not slow_reference.fits_once(8)
    assert "engine.precision=fp32" in too_slow(config, 360)
    assert _budget().expected_s(4, theirs=True) < 360
    slowest, _ = fit_to_time(config, _budget(our_flops_per_s=1.0), world_size=1)
    assert slowest.train.batch_size == 1


def test_a_slow_machine_measures_whole_groups_of_masks() -> None:
    sizes = ["train.batch_size=144", "train.micro_batch_size=72", "ibot.mask_group=12"]
    config = load_config("vit_s16", [*sizes, "ibot.loss_weight=1"])
    measured = set()
    for rate in (1e10, 5e11, 1e12, 1e15):
        slow = _budget(with_reference=False, our_flops_per_s=rate)
        small, _ = fit_to_time(config, slow, world_size=1)
        size = small.train.micro_batch_size
        assert size == next((size for size in (72, 36) if slow.fits(size)), 12)
        measured.add(size)
    assert measured == {12, 36, 72}


def test_a_slow_machine_leaves_koleo_a_neighbour() -> None:
    sizes = ["train.batch_size=64", "train.micro_batch_size=64"]
    config = load_config("vit_s16", [*sizes, "koleo.loss_weight=0.1"])
    slowest, _ = fit_to_time(config, _budget(our_flops_per_s=1.0), world_size=1)
    assert slowest.train.micro_batch_size == 2
    assert split_batch(slowest, world_size=1).micro_batch_size == 2


def _bench(*overrides: str, seconds: float = 1.0, turns: int = 1) -> Any:
    return bench_step(
        load_config("vit_s16", ["train.batch_size=64", *overrides]),
        read_process({}),
        seconds=seconds,
        turns=turns,
        with_reference=False,
        trace_dir=None,
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="measures ViTs only"):
        _bench("model.backbone=resnet50", "model.drop_path_rate=0")
    with pytest.raises(ConfigError, match="--turns"):
        _bench(turns=0)
    with pytest.raises(ConfigError, match="--seconds"):
        _bench(seconds=math.nan)


def test_too_little_memory_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="1 images do not fit into memory"):
        _bench("head.num_prototypes=10_000_000_000_000")


def test_the_reference_comes_with_a_checkout_and_does_not_accumulate(tmp_path: Path) -> None:
    config = load_config("vit_s16", ["train.batch_size=64"])
    plan = resolve(config, world_size=1, num_images=640)
    found, why_not = find_reference(config, plan, CHECKOUT)
    assert found.__module__ == "tests.reference"
    assert not why_not
    found, why_not = find_reference(config, replace(plan, accumulation_steps=2), CHECKOUT)
    assert found is None
    assert "train.batch_size=64" in why_not
    half = [f"schedules.local_weight.{key}=0.5" for key in ("start", "peak", "end")]
    for others in (
        ["ibot.loss_weight=1"],
        ["koleo.loss_weight=0.1"],
        ["dino.targets=sinkhorn_knopp"],
        ["dino.same_view_pairs=true"],
        half,
    ):
        with_more = load_config("vit_s16", ["train.batch_size=64", *others])
        found, why_not = find_reference(with_more, plan, CHECKOUT)
        assert found is None
        assert "the step of DINO v1" in why_not
    found, why_not = find_reference(config, plan, tmp_path)
    assert found is None
    assert "which only a checkout has" in why_not


def test_words_name_what_was_measured_and_what_was_not() -> None:
    spread = {"median": 0.5, "min": 0.4, "max": 0.6}
    result: dict[str, Any] = {
        "backbone": "vit",
        "device": "cpu",
        "precision": "fp32",
        "zero_stage": 2,
        "world_size": 2,
        "micro_batch_size": 4,
        "accumulation_steps": 1,
        "split_s": dict.fromkeys(PARTS, 0.05),
        "communication_s": 0.125,
        "images_per_s": spread,
        "seconds_per_step": spread,
        "peak_memory_bytes": 2**30,
        "flops_per_s": 3e12,
        "matmul_ceiling_flops_per_s": 4e12,
        "utilisation": 0.75,
        "reference": None,
        "ratio": None,
        "no_reference": "it is away",
    }
    text = as_text(result)
    assert "the reference was not measured: it is away" in text
    assert "25.0%" in text  # of communication
    assert "75.0% of the 4 that" in text
    assert "1024 MiB" in text
    reference = {"seconds_per_step": spread, "peak_memory_bytes": 2**31}
    ratio = {"throughput": spread, "peak_memory": spread, "cpu_time": spread}
    text = as_text(result | {"reference": reference, "ratio": ratio, "world_size": 1})
    assert "0.50 x as fast (0.40 to 0.60) in 0.50 x the memory" in text
    assert "communication" not in text


def test_no_turn_begins_that_would_end_too_late(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: _Clock.now_s)
    taken = []
    for turn in in_turns(5, limit_s=5 * PAUSE_S):
        taken.append(turn)
        _sleep(2)
    assert taken == [0, 1]
    said = capsys.readouterr().err
    assert said.startswith("the first of 5 turns took 0.5 s")
    assert "no time for turn 3 of 5 within" in said
    assert list(in_turns(2, limit_s=60.0)) == [0, 1]


def test_micro_batches_are_made_when_the_step_asks_for_them_as_in_a_run() -> None:
    config = tiny_config(
        data={"train": "synthetic:shapes?images=6&size=16", "num_workers": 0},
        train={"epochs": 10, "batch_size": 6, "micro_batch_size": 2},
    )
    plan, process = resolve(config, world_size=1, num_images=6), read_process({})
    step: Any = OurStep.__new__(OurStep)  # without a student
    step._timeline, step._device, step.crops = Timeline(process.device), process.device, []
    step._feed = Feed(config, plan, process, open_images(config), depth=2)
    batches = next(step._feed.steps(0, offset=0))
    sent = []
    for micro_batch in MicroBatches(3, lambda index: step._made(index, batches[index])):
        assert micro_batch.global_crops.shape[1] == 2
        torch.testing.assert_close(step.crops[0], micro_batch.global_crops[0], rtol=0, atol=0)
        sent.append([part for part, _ in step._timeline._marks].count("host_to_device"))
    assert sent == [1, 2, 3]
