"""The guard of a run of phases: none begins where the teacher has fallen."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dinoscale.checkpoint.progress import Guarded, Progress
from dinoscale.config import RunConfig, parse_config, phases_of
from dinoscale.errors import RunFailedError
from dinoscale.training.best import finish
from dinoscale.training.due import due_after
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


def _known(step: int, *, fall: str = "") -> Guarded:
    return Guarded(IMAGES, "rankme", step, RANK, 0, RANK, 0, RANK, fall)


def _store(run: RunConfig, step: int, known: Guarded | None) -> None:
    progress = asdict(Progress(step=step, guarded=known))
    store(Path(run.run_dir), step, ranks=1, plan={"steps_per_epoch": 1}, progress=progress)


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
