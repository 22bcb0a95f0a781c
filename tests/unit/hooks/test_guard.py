"""The guard's verdicts: what is a fall, what becomes the best, and what the text says."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from torch import nn

from dinoscale.checkpoint.layout import START_FILE
from dinoscale.checkpoint.progress import (
    Guarded,
    Progress,
    read_guarded,
    read_verdicts,
    write_measured,
)
from dinoscale.checkpoint.retention import Keep, Summary, best_of, superfluous
from dinoscale.config import load_config, phases_of
from dinoscale.config.sections.fields import is_streamed
from dinoscale.config.sections.guard import GuardConfig
from dinoscale.data.shards.remote import is_remote
from dinoscale.data.sources.source import open_source
from dinoscale.errors import ConfigError
from dinoscale.training.hooks.guard import end_text, fall_text, judge, new_start_text, starts
from dinoscale.training.hooks.held_out import HeldOut
from dinoscale.training.hooks.measurements import Measurements
from dinoscale.training.hooks.setting_names import as_set_here
from tests.distributed.tiny_run import tiny_config

RULE = GuardConfig(every_steps=10, max_fall=0.1, min_agreement=0.3)


def _judged(*found: dict[str, float], rule: GuardConfig = RULE) -> Guarded:
    """After measurements at steps 0, 10, ..."""
    known = None
    for number, values in enumerate(found):
        known = judge(known, rule, step=10 * number, values=values, images="a")
    assert known is not None
    return known


def _rank(rank: float, agreement: float = 1.0) -> dict[str, float]:
    return {"rankme": rank, "agreement": agreement}


def test_the_first_measurement_is_start_and_best() -> None:
    found = _judged(_rank(8.0))
    assert (found.start, found.best, found.fall) == (_rank(8.0), _rank(8.0), "")


def test_only_more_than_the_margin_below_the_best_is_a_fall() -> None:
    assert _judged(_rank(5.0), _rank(10.0), _rank(9.0)).fall == ""
    fall = _judged(_rank(5.0), _rank(10.0), _rank(8.9))
    assert fall.fall == (
        "its RankMe is 8.9, 11% below the best so far, 10 at step 10 (guard.max_fall 0.1)"
    )
    assert (fall.best_step, fall.start_step, fall.start) == (10, 0, _rank(5.0))


def test_a_fall_ends_when_the_measure_is_back_and_of_ties_the_newest_is_best() -> None:
    back = _judged(_rank(10.0), _rank(2.0), _rank(10.0))
    assert (back.fall, back.best_step) == ("", 20)


def test_too_little_agreement_is_a_fall_that_is_never_the_best() -> None:
    fall = _judged(_rank(10.0), _rank(20.0, agreement=0.29))
    assert fall.fall.startswith("it shares 29% of the nearest neighbours with the start, step 0")
    assert fall.best_step == 0
    assert _judged(_rank(10.0), {"rankme": 9.5}).fall == ""  # the start is not known


def test_features_without_a_direction_are_a_fall_whatever_the_measure() -> None:
    by_knn = GuardConfig(every_steps=10, measure="knn_top1")
    start = {**_rank(5.0), "knn_top1": 50.0}
    assert "not finite" in _judged(start, _rank(0.0, 0.0), rule=by_knn).fall
    assert "not finite" in _judged(_rank(0.0, 0.0), rule=by_knn).fall


def test_a_measure_that_could_not_be_taken_is_not_judged() -> None:
    by_knn = GuardConfig(every_steps=10, measure="knn_top1")
    start = {**_rank(5.0), "knn_top1": 50.0}
    without = _judged(start, _rank(1.0), rule=by_knn)
    assert (without.fall, without.best_step) == ("", 0)
    low = {**_rank(5.0), "knn_top1": 44.0}
    assert "k-NN top-1 is 44, 12% below" in _judged(start, _rank(1.0), low, rule=by_knn).fall


def test_another_measure_has_a_best_of_its_own() -> None:
    start, best = {"rankme": 5.0, "knn_top1": 60.0}, {"rankme": 10.0, "knn_top1": 50.0}
    by_knn = GuardConfig(every_steps=10, measure="knn_top1")
    low = {"rankme": 12.0, "knn_top1": 53.0}
    fall = judge(_judged(start, best), by_knn, step=20, values=low, images="a")
    assert fall.fall.startswith("its k-NN top-1 is 53, 12% below the best so far, 60 at step 0")
    assert (fall.best_step, fall.measure) == (0, "knn_top1")
    known = judge(_judged(_rank(5.0)), by_knn, step=10, values=low, images="a")
    assert (known.best_step, known.fall) == (10, ""), "nothing was known by this measure"


def test_other_images_begin_anew() -> None:
    known = judge(_judged(_rank(10.0)), RULE, step=10, values=_rank(1.0), images="b")
    assert (known.fall, known.start_step, known.best_step) == ("", 10, 10)


def test_other_images_are_told_by_their_identity_and_of_older_versions_by_words() -> None:
    known = judge(None, RULE, step=0, values=_rank(10.0), images="5 of a", identity="one")
    assert not starts(known, "5 of a, which has moved", "one")
    assert starts(known, "5 of a", "other")
    assert not starts(_judged(_rank(10.0)), "a", "one")
    assert "5 of a; its numbers so far are of other images (others, or" in new_start_text(
        known, step=7, images="5 of a"
    )


def test_a_stopped_run_goes_on_after_its_margin_has_been_lifted(tmp_path: Path) -> None:
    fallen = _judged(_rank(10.0), _rank(8.0))
    held_out = _held_out(tmp_path)
    held_out.images, held_out.identity = "a", ""

    def judged_again(
        known: Guarded, held_out: HeldOut | None, **rule: Any
    ) -> tuple[Progress, bool]:
        guard = {"every_steps": 10, "images": "a", "on_fall": "stop", **rule}
        parts = (MagicMock(), None, held_out, MagicMock(), MagicMock())
        progress = Progress(step=10, guarded=known)
        measurements = Measurements(tiny_config(guard=guard), *parts, warns=False)
        return progress, measurements.judge_again(progress)

    assert judged_again(fallen, held_out) == (Progress(step=10, guarded=fallen), False)
    progress, changed = judged_again(fallen, held_out, max_fall=0.3)
    assert progress.guarded is not None
    assert (progress.guarded.fall, progress.guarded.best_step, changed) == ("", 0, True)
    progress, changed = judged_again(progress.guarded, held_out, max_fall=0.1)
    assert (progress.guarded, changed) == (fallen, True)
    assert judged_again(fallen, None) == (Progress(step=10), False)


def test_without_a_guard_the_best_is_that_of_k_nn_again() -> None:
    fallen = _judged(_rank(9.0), _rank(1.0))
    found = [_summary(0, 80.0, _judged(_rank(9.0))), _summary(10, 85.0, fallen)]
    assert best_of(found) == found[0]
    assert best_of([*found, _summary(20, 70.0, None)]) == found[1]


def test_the_best_of_former_images_stays() -> None:
    former = judge(None, RULE, step=0, values=_rank(9.0), images="a", identity="one")
    later = judge(former, RULE, step=10, values=_rank(8.5), images="a", identity="one")
    new = judge(None, RULE, step=20, values=_rank(1.0), images="a", identity="two")
    better = judge(new, RULE, step=30, values=_rank(2.0), images="a", identity="two")
    steps = dict(zip((0, 10, 20, 30, 40), (former, later, new, better, better), strict=True))
    found = [_summary(step, None, known) for step, known in steps.items()]
    doomed = superfluous(found, Keep(last=1, best=True))
    assert [one.step for one in doomed] == [10, 20]


def test_the_best_of_former_images_stays_where_others_are_measured_on_it(tmp_path: Path) -> None:
    former = judge(None, RULE, step=10, values=_rank(9.0), images="a", identity="one")
    new = judge(former, RULE, step=10, values=_rank(1.0), images="a", identity="two")
    better = judge(new, RULE, step=20, values=_rank(2.0), images="a", identity="two")
    for known in (former, new):
        write_measured(tmp_path, None, known)
    again = replace(new, values=_rank(1.5))
    write_measured(tmp_path, None, again)
    assert read_guarded(tmp_path) == again
    assert read_verdicts(tmp_path) == [again, former]
    best = replace(_summary(10, None, again), former=(former,))
    found = [best, *(_summary(step, None, better) for step in (20, 30))]
    assert superfluous(found, Keep(last=1, best=True)) == []
    assert superfluous([replace(best, former=()), *found[1:]], Keep(last=1, best=True)) != []


def test_the_best_of_a_run_that_began_under_an_older_version_is_over_both() -> None:
    older = judge(None, RULE, step=0, values=_rank(9.0), images="a")
    newer = judge(older, RULE, step=10, values=_rank(8.5), images="a", identity="one")
    assert (newer.start_step, newer.best_step) == (0, 0)
    assert newer.compares(older)
    assert older.compares(newer)
    found = [_summary(0, None, older), _summary(10, None, newer)]
    assert best_of(found) == best_of([*found[::-1]]) == found[0]


def test_the_texts_name_the_settings() -> None:
    config = tiny_config(optim={"lr": 0.3, "layer_decay": 0.9}, guard={"on_fall": "roll_back"})
    fall = _judged(_rank(10.0), _rank(1.0))
    text = fall_text(fall, config)
    for name in ("optim.lr (now 0.3)", "optim.backbone_lr", "optim.layer_decay (now 0.9)"):
        assert name in text
    for name in ("dino.momentum (now 0.9)", "train.epochs 10", "90% below"):
        assert name in text
    assert "guard.on_fall=roll_back" in end_text(fall, config.guard, best_step=0)
    stop = end_text(fall, GuardConfig(on_fall="stop"), best_step=0)
    assert "guard.on_fall=warn goes on from step 10" in stop


def test_the_texts_name_the_curves_and_the_phase_that_the_settings_are_of() -> None:
    phases = phases_of(load_config("adapt_dinov2_vits14", ["data.train=a"]))
    text = fall_text(_judged(_rank(10.0), _rank(1.0)), phases[1])
    for name in ("Lower schedules.lr (now 0 to 5e-05 to 5e-05)", "schedules.lr.warmup_epochs"):
        assert name in text
    for name in ("dino.momentum (now 0.994)", "of phase adapt, on the command line phases.adapt."):
        assert name in text
    assert "optim.lr " not in text
    assert "optim.warmup_epochs" not in text
    config = tiny_config()
    assert as_set_here("lower optim.lr, raise dino.momentum", config) == (
        "lower optim.lr, raise dino.momentum"
    )


def test_what_is_known_survives_as_plain_data(tmp_path: Path) -> None:
    known = _judged(_rank(10.0), _rank(1.0))
    progress = Progress(step=10, guarded=known)
    assert Progress(**json.loads(json.dumps(asdict(progress)))) == progress
    write_measured(tmp_path, None, known)
    assert read_guarded(tmp_path) == known
    assert Progress(step=10).guarded is None  # as of an older version


@pytest.mark.parametrize("change", [{"step": "1"}, {"best": [1]}, {"values": {"rankme": "x"}}])
def test_damaged_plain_data_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    plain = asdict(_judged(_rank(10.0))) | change
    with pytest.raises((TypeError, AttributeError)):
        Guarded(**plain)
    (tmp_path / "measured.json").write_text(json.dumps({"guarded": plain}))
    assert read_guarded(tmp_path) is None


def _summary(step: int, knn: float | None, guarded: Guarded | None) -> Summary:
    return Summary(Path(f"step_{step:08d}"), step, 1, "now", knn, 2, 2, guarded)


def test_the_best_checkpoint_is_the_guards_and_no_fall() -> None:
    one, two = _judged(_rank(9.0)), _judged(_rank(9.0), _rank(12.0))
    three = _judged(_rank(9.0), _rank(12.0), _rank(30.0, agreement=0.1))
    found = [_summary(0, 80.0, one), _summary(10, 60.0, two), _summary(20, 90.0, three)]
    best = best_of(found)
    assert best is not None
    assert best.step == 10
    later = _summary(25, 95.0, three)  # was not measured by the guard
    assert best_of([*found, later]) == best
    assert best_of([_summary(0, 80.0, None), _summary(5, 70.0, None)]) == _summary(0, 80.0, None)


class _Features(nn.Module):
    """Features that are a linear function of the pixels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(3 * 16 * 16, 6)

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        features: torch.Tensor = self.layer(images[0].flatten(1))
        return features


SPEC = "synthetic:shapes?images=40&size=16"


def _held_out(folder: Path, spec: str = SPEC, **sections: dict[str, Any]) -> HeldOut:
    guard = {"every_steps": 5, "images": spec, "num_images": 30}
    config = tiny_config(str(folder), guard=guard, **sections)
    return HeldOut(config, lambda name, decoder: open_source(name, decoder))


def _values(held_out: HeldOut, seed: int, *, starts: bool = False) -> dict[str, float]:
    cpu = torch.device("cpu")
    return held_out.measure(_Features(seed), cpu, lambda: None, starts=starts)


def test_agreement_with_the_start_survives_a_new_start(tmp_path: Path) -> None:
    first = _held_out(tmp_path)
    assert first.images == "30 of 40 images of synthetic:shapes?images=40&size=16"
    assert _values(first, 0, starts=True)["agreement"] == 1
    later = _values(first, 1)
    assert 0 < later["agreement"] < 1
    assert _values(_held_out(tmp_path), 1) == later
    assert _values(_held_out(tmp_path), 0)["agreement"] == 1


@pytest.mark.parametrize("damage", [b"", None])
def test_a_lost_start_costs_the_agreement_alone(tmp_path: Path, damage: bytes | None) -> None:
    _values(_held_out(tmp_path), 0, starts=True)
    if damage is None:
        (tmp_path / START_FILE).unlink()
    else:
        (tmp_path / START_FILE).write_bytes(damage)
    assert [*_values(_held_out(tmp_path), 1)] == ["rankme"]


def test_the_same_images_at_another_path_are_the_same_and_others_of_its_names_are_not(
    tmp_path: Path,
) -> None:
    for folder, size in (("one", 8), ("moved", 8), ("other", 9)):
        (tmp_path / folder).mkdir()
        for name in "abc":
            Image.new("RGB", (size, 9 * size)).save(tmp_path / folder / f"{name}.png")
    one, moved, other = (
        _held_out(tmp_path, str(tmp_path / folder)) for folder in ("one", "moved", "other")
    )
    assert one.identity == moved.identity
    assert one.images != moved.images
    assert other.identity != one.identity
    shown = _held_out(tmp_path, str(tmp_path / "one"), eval={"crop": 8, "resize": 8})
    assert shown.identity != one.identity


def test_where_k_nn_decides_its_sets_and_its_k_tell_the_numbers_apart(tmp_path: Path) -> None:
    def identity(measure: str, *, seed: int = 1, k: int = 5) -> str:
        sets = {"train": f"{SPEC}&seed=0", "test": f"{SPEC}&seed={seed}", "k": k}
        guard = {"every_steps": 5, "images": SPEC, "measure": measure}
        config = tiny_config(str(tmp_path), guard=guard, eval=sets)
        labelled = [open_source(str(sets[name])) for name in ("train", "test")]
        return HeldOut(config, lambda name, _: open_source(name), labelled=labelled).identity

    by_knn = identity("knn_top1")
    assert identity("knn_top1") == by_knn
    assert len({by_knn, identity("knn_top1", seed=2), identity("knn_top1", k=6)}) == 3
    assert identity("rankme") == identity("rankme", seed=2, k=6)


def test_without_other_images_the_guard_measures_a_fixed_choice_of_those_trained_on(
    tmp_path: Path,
) -> None:
    preset = load_config("adapt_dinov2_vits14", [f"data.train={SPEC}"])
    assert [run.guard.every_steps for run in phases_of(preset)] == [1000, 1000]
    assert preset.guarded_images == SPEC
    config = preset.model_copy(update={"run_dir": str(tmp_path)})
    held_out = HeldOut(config, lambda name, decoder: open_source(name, decoder))
    assert held_out.images == f"40 of 40 images of {SPEC}"
    labelled = tiny_config(eval={"train": "b", "test": "c"}, data={"train": "a"})
    assert labelled.guarded_images == "b"


def test_streamed_images_are_refused_with_the_configuration() -> None:
    url = "https://host/a.tar"
    with pytest.raises(ConfigError, match=r"guard\.images: https://host/a\.tar is streamed"):
        load_config("adapt_dinov2_vits14", [f"data.train={url}"])
    load_config("adapt_dinov2_vits14", [f"data.train={url}", "guard.images=a"])
    load_config("adapt_dinov2_vits14", [f"data.train={url}", "guard.every_steps=null"])
    for scheme in ("https", "HTTP", "s3", "gs", "hdfs", "pipe", "ftp", "file", "synthetic", "c"):
        assert is_streamed(f"{scheme}://host/a.tar") == is_remote(f"{scheme}://host/a.tar")
    assert not is_streamed("s3")


def test_the_start_of_other_images_gives_no_agreement(tmp_path: Path) -> None:
    _values(_held_out(tmp_path), 0, starts=True)
    other = _held_out(tmp_path, f"{SPEC}&seed=5")
    assert [*_values(other, 1)] == ["rankme"]


def test_a_start_without_finite_features_leaves_no_start_of_others(tmp_path: Path) -> None:
    _values(_held_out(tmp_path), 0, starts=True)
    held_out, broken = _held_out(tmp_path), _Features(0)
    nn.init.constant_(broken.layer.weight, torch.nan)
    held_out.measure(broken, torch.device("cpu"), lambda: None, starts=True)
    assert not (tmp_path / START_FILE).exists()


def test_features_that_are_not_finite_have_no_rank(tmp_path: Path) -> None:
    held_out, broken = _held_out(tmp_path), _Features(0)
    nn.init.constant_(broken.layer.weight, torch.nan)
    found = held_out.measure(broken, torch.device("cpu"), lambda: None, starts=False)
    assert found == {"rankme": 0.0, "agreement": 0.0}


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        (
            {"guard": {"every_steps": 5, "images": "a", "measure": "knn_top1"}},
            "guard.measure: 'knn",
        ),
        (
            {"guard": {"every_steps": 5, "images": "a"}, "checkpoint": {"keep_best": False}},
            "checkpoint.keep_best: the guard",
        ),
    ],
)
def test_what_a_guard_lacks_is_named(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        tiny_config(**sections)
