"""The guard of a run of phases: none begins where the teacher has fallen."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from dinoscale.checkpoint.layout import START_FILE, STATE_FILE, directory
from dinoscale.checkpoint.progress import Guarded, Progress
from dinoscale.config import RunConfig, parse_config, phases_of
from dinoscale.errors import RunFailedError, UnreadableError
from dinoscale.runtime import retry
from dinoscale.runtime.outputs import BEST_WEIGHTS
from dinoscale.training import best
from dinoscale.training.best import best_checkpoint, export_best, finish
from dinoscale.training.due import Due, due_after
from dinoscale.training.hooks.guard import judge
from dinoscale.training.hooks.held_out import HeldOut
from dinoscale.training.hooks.measurements import Measurements
from dinoscale.training.hooks.online_knn import Measured
from dinoscale.training.phases import next_phase
from tests.distributed.tiny_run import tiny_config, tiny_plan
from tests.unit.checkpoint.stored import store

IMAGES = "9 of 9 images of held_out"
STEPS = 4  # of each phase
RANK = {"rankme": 8.0, "agreement": 1.0}


def _config(folder: Path, **guard: Any) -> RunConfig:
    guard = {"every_steps": 2, "images": "held_out", "on_fall": "stop"} | guard
    values = tiny_config(str(folder), train={"epochs": STEPS}, guard=guard).model_dump()
    return parse_config(values | {"phases": [{"name": "first"}, {"name": "second"}]})


def _measurements(
    run: RunConfig, *, identity: str = "", knn_top1: float | None = None
) -> Measurements:
    """Of a phase; the held-out images are named as those of `_known`."""
    held_out = HeldOut.__new__(HeldOut)
    held_out.images, held_out.identity = IMAGES, identity
    held_out._path = Path(run.run_dir) / START_FILE
    measuring, online_knn = MagicMock(), None
    if knn_top1 is not None:
        online_knn = MagicMock()
        measuring.attempt.return_value = Measured(knn_top1, rankme=5.0, patch_top1=None)
    return Measurements(run, measuring, online_knn, held_out, MagicMock(), MagicMock(), warns=True)


def _known(step: int, *, fall: str = "") -> Guarded:
    return Guarded(IMAGES, "rankme", step, RANK, 0, RANK, 0, RANK, fall)


def _store(run: RunConfig, step: int, known: Guarded | None) -> None:
    progress = asdict(Progress(step=step, guarded=known))
    plan = {"steps_per_epoch": 1, "world_size": 1}
    about: dict[str, Any] = {"plan": plan, "config": {"engine": {"zero_stage": 0}}}
    store(Path(run.run_dir), step, ranks=1, progress=progress, saved_at="then", **about)


@pytest.mark.parametrize(
    ("on_fall", "known", "index"),
    [
        ("stop", _known(STEPS), 1),
        ("stop", _known(STEPS, fall="it fell"), 0),
        ("roll_back", _known(STEPS, fall="it fell"), 0),  # killed before it went back
        ("stop", _known(STEPS - 2), 0),  # killed before it was measured
        ("warn", _known(STEPS, fall="it fell"), 1),
        ("stop", None, 1),  # the guard is new
    ],
)
def test_a_phase_follows_only_where_the_guard_passes_the_last_step(
    tmp_path: Path, on_fall: str, known: Guarded | None, index: int
) -> None:
    config = _config(tmp_path, on_fall=on_fall)
    runs = phases_of(config)
    _store(runs[0], STEPS, known)
    assert next_phase(config, runs).index == index


def test_the_guard_measures_beyond_the_end_of_a_run_that_has_been_shortened() -> None:
    config = tiny_config(train={"epochs": STEPS}, guard={"every_steps": 7, "images": "held_out"})
    plan = tiny_plan(config)
    assert due_after(plan.stop_step + 1, config, plan).guard


def test_a_run_that_a_fall_ends_needs_a_verdict_to_finish(tmp_path: Path) -> None:
    config = phases_of(_config(tmp_path))[0]
    unjudged = Progress(step=STEPS, guarded=_known(2))
    with pytest.raises(RunFailedError, match="the guard could not measure it"):
        finish(unjudged, config, lambda: None)
    finish(Progress(step=STEPS, guarded=_known(STEPS)), config, lambda: None)
    warns = phases_of(_config(tmp_path, on_fall="warn"))[0]
    finish(unjudged, warns, lambda: None)


def _by_knn(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"guard": run.guard.model_copy(update={"measure": "knn_top1"})})


def test_by_k_nn_a_last_step_without_it_does_not_pass_and_is_judged_once_it_is_there(
    tmp_path: Path,
) -> None:
    config = _config(tmp_path)
    first, second = map(_by_knn, phases_of(config))
    start = RANK | {"knn_top1": 60.0}
    known = Guarded(IMAGES, "knn_top1", STEPS, RANK, 0, start, 0, start, identity="one")
    _store(first, STEPS, known)
    assert next_phase(config, (first, second)).index == 0
    progress = Progress(step=STEPS, guarded=known)
    with pytest.raises(RunFailedError, match="the guard could not measure it"):
        finish(progress, first, lambda: None)
    measurements = _measurements(first, identity="one", knn_top1=30.0)
    everything = Due(log=True, knn=True, guard=True, save=True)
    due = measurements.missing(progress, everything)
    assert (due.knn, due.guard) == (True, False)
    assert measurements.missing(replace(progress, knn_top1=30.0), everything).knn
    former = replace(progress, knn_top1=90.0)
    due_anew = _measurements(first, identity="other k").missing(former, everything)
    assert (due_anew.knn, due_anew.guard, former.knn_top1) == (True, True, None)
    assert measurements.take(progress, MagicMock(), due)
    assert progress.guarded is not None
    assert progress.guarded.values["knn_top1"] == 30
    assert progress.guarded.fall.startswith("its k-NN top-1 is 30, 50% below the best so far, 60")


@pytest.mark.parametrize("start", ["everything", "teacher"])
def test_a_phase_goes_on_from_the_start_and_the_best_of_the_one_before(
    tmp_path: Path, start: str
) -> None:
    phases = [{"name": "first"}, {"name": "second", "start": start}]
    config = parse_config(_config(tmp_path).model_dump() | {"phases": phases})
    first, second = phases_of(config)
    best_values = {"rankme": 10.0, "agreement": 1.0}
    known = Guarded(IMAGES, "rankme", STEPS, RANK, 0, RANK, 2, best_values)
    _store(first, STEPS, known)
    (Path(first.run_dir) / START_FILE).write_bytes(b"neighbours")
    Path(second.run_dir).mkdir(parents=True)
    progress = Progress()
    _measurements(second).carry_over(progress)
    carried = progress.guarded
    assert carried is not None
    assert (carried.start_text, carried.best_text) == ("step 0 of 01_first", "step 2 of 01_first")
    assert (Path(second.run_dir) / START_FILE).read_bytes() == b"neighbours"
    after = judge(carried, second.guard, step=0, values={"rankme": 8.9}, images=IMAGES)
    assert after.fall.startswith(
        "its RankMe is 8.9, 11% below the best so far, 10 at step 2 of 01_"
    )
    better = judge(carried, second.guard, step=0, values={"rankme": 11.0}, images=IMAGES)
    assert (better.best_text, better.start_text) == ("step 0", "step 0 of 01_first")
    _store(second, 0, better)
    assert better.score_at(0, "rankme") == 11.0


def test_a_phase_with_other_images_begins_anew(tmp_path: Path) -> None:
    first, second = phases_of(_config(tmp_path))
    _store(first, STEPS, replace(_known(STEPS), identity="one"))
    progress = Progress()
    _measurements(second, identity="other").carry_over(progress)
    assert progress.guarded is None
    _measurements(first, identity="one").carry_over(progress)  # begins from no run
    assert progress.guarded is None


def test_a_phase_does_not_begin_anew_while_the_one_before_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry.time, "sleep", lambda _seconds: None)
    first, second = phases_of(_config(tmp_path))
    _store(first, STEPS, _known(STEPS))
    state = directory(Path(first.run_dir), STEPS) / STATE_FILE
    kept = state.read_bytes()
    state.unlink()
    state.mkdir()  # an error of reading, as of a file system that is away
    with pytest.raises(UnreadableError):
        _measurements(second).carry_over(Progress())
    state.rmdir()
    state.write_bytes(kept)


def test_the_phase_that_ends_says_by_which_images_the_best_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = phases_of(_config(tmp_path))
    _store(first, 2, replace(_known(2), values={"rankme": 10.0}))
    _store(first, STEPS, _known(STEPS))
    _store(second, 2, replace(_known(2), images="others"))  # in the last folder
    converted = MagicMock()
    monkeypatch.setattr(best, "convert", converted)
    summary = finish(Progress(step=STEPS, guarded=_known(STEPS)), first, lambda: None)
    exported = directory(Path(first.run_dir), 2)
    assert converted.call_args.args[0] == exported
    assert summary == {"best_checkpoint": str(exported)}


def test_the_best_of_all_phases_is_exported_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = phases_of(_config(tmp_path))
    for run, ranks in ((first, (8.0, 10.0)), (second, (9.9, 9.5))):
        for step, rank in zip((0, 2), ranks, strict=True):
            _store(run, step, replace(_known(step), values={"rankme": rank}))
    converted = MagicMock()
    monkeypatch.setattr(best, "convert", converted)
    assert export_best(Path(second.run_dir)) == directory(Path(first.run_dir), 2)
    assert converted.call_args.args[:2] == (
        directory(Path(first.run_dir), 2),
        tmp_path / BEST_WEIGHTS,
    )
    own = best_checkpoint(Path(second.run_dir))
    assert own is not None
    assert own.step == 0
