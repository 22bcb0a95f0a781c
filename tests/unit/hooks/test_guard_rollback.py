"""The way back to the best checkpoint after a fall, where the disk does not do what it should."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dinoscale.checkpoint.layout import STATE_FILE, checkpoints, directory, shard_file
from dinoscale.checkpoint.progress import Guarded, Progress
from dinoscale.errors import RunFailedError, UnreadableError
from dinoscale.runtime.outputs import BEST_WEIGHTS
from dinoscale.training import best
from dinoscale.training.best import best_checkpoint, end_at_fall, export_best
from dinoscale.training.hooks.events import Events
from tests.distributed.tiny_run import tiny_config
from tests.unit.checkpoint.stored import store

RANKS = {0: 8.0, 2: 10.0, 4: 9.5, 6: 1.0}  # RankMe by step; the last is a fall
FALL = "it fell"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Checkpoints of a run that has just fallen."""
    for step in RANKS:
        about: dict[str, Any] = {"saved_at": "then", "plan": {"world_size": 1}}
        about["config"] = {"engine": {"zero_stage": 0}}
        store(
            tmp_path, step, ranks=1, progress=asdict(Progress(step, guarded=_known(step))), **about
        )
    return tmp_path


def _known(step: int) -> Guarded:
    rank = {number: {"rankme": value} for number, value in RANKS.items()}
    fall = FALL if step == 6 else ""
    return Guarded("images", "rankme", step, rank[step], 0, rank[0], 2, rank[2], fall)


def _fall(run_dir: Path) -> None:
    guard = {"every_steps": 2, "images": "a", "on_fall": "roll_back"}
    config = tiny_config(str(run_dir), guard=guard)
    end_at_fall(_known(6), config, Events(run_dir, active=False), lambda: None)


def _steps(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoints(run_dir)]


def test_a_fall_goes_back_though_the_best_weights_cannot_be_written(run_dir: Path) -> None:
    with pytest.raises(RunFailedError, match="Checkpoints after the best, step 2, are set aside"):
        _fall(run_dir)  # these checkpoints have no backbone that can be built
    assert _steps(run_dir) == [0, 2]


def test_only_the_checkpoints_of_the_last_fall_lie_aside(run_dir: Path) -> None:
    older = run_dir / "checkpoints" / "fallen_step_00000098"
    older.mkdir()
    with pytest.raises(RunFailedError):
        _fall(run_dir)
    aside = {path.name for path in (run_dir / "checkpoints").glob("fallen_*")}
    assert aside == {"fallen_step_00000004", "fallen_step_00000006"}


def test_nothing_is_set_aside_while_a_checkpoint_cannot_be_read(run_dir: Path) -> None:
    state = directory(run_dir, 2) / STATE_FILE
    kept = state.read_bytes()
    state.unlink()
    state.mkdir()  # an error of reading, as of a file system that is away
    with pytest.raises(UnreadableError, match="may be the best"):
        _fall(run_dir)
    assert _steps(run_dir) == [*RANKS]
    state.rmdir()
    state.write_bytes(kept)
    with pytest.raises(RunFailedError):
        _fall(run_dir)
    assert _steps(run_dir) == [0, 2]


def test_nothing_is_set_aside_for_a_damaged_best(run_dir: Path) -> None:
    best_one = directory(run_dir, 2)
    shard = best_one / shard_file(0)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFailedError, match=r"best checkpoint is damaged.*Nothing was set aside"):
        _fall(run_dir)
    assert _steps(run_dir) == [*RANKS]
    best_one.rename(best_one.with_name("damaged"))
    with pytest.raises(RunFailedError, match="step 4, are set aside"):
        _fall(run_dir)


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("of torch")])
def test_an_export_gives_heartbeats_and_costs_the_best_weights_alone(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    beats: list[None] = []

    def convert(*_: object, heartbeat: Any, **__: object) -> None:
        heartbeat()
        raise error

    monkeypatch.setattr(best, "convert", convert)
    assert export_best(run_dir, lambda: beats.append(None)) is None
    assert beats


def test_weights_of_an_earlier_end_do_not_pass_for_the_best(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(str(run_dir), guard={"every_steps": 2, "images": "a"})
    best.warn_of_old_weights(config)  # there are none
    weights = run_dir / BEST_WEIGHTS
    weights.write_bytes(b"")
    os.utime(weights, (4e9, 4e9))
    best.warn_of_old_weights(config)
    assert not caplog.records
    os.utime(weights, (1e9, 1e9))
    best.warn_of_old_weights(config)
    assert "is of an earlier end of this run" in caplog.text
    caplog.clear()  # nor where the run ends, but cannot export
    assert best.finish(Progress(6, guarded=_known(6)), config, lambda: None) == {
        "best_checkpoint": None
    }
    assert "is of an earlier end of this run" in caplog.text


def test_the_best_is_that_of_the_guard(run_dir: Path) -> None:
    found = best_checkpoint(run_dir)
    assert found is not None
    assert found.step == 2
