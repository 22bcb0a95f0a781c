"""A run of phases goes on exactly, wherever it is killed: between two, or within one."""

import signal
from pathlib import Path

import pytest

from dinoscale.checkpoint.layout import checkpoints, phase_directories
from dinoscale.checkpoint.load import Checkpoint
from dinoscale.config import load_config, phases_of
from tests.faults.kills import OBJECTIVES
from tests.faults.run_processes import (
    RANKS,
    RunProcesses,
    losses,
    newest_step,
    same_checkpoint,
    steps_logged,
    write_config,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

_PHASES = """\
phases:
- {name: small, change: {train: {stop_after_steps: 7}}}
- name: large
  change:
    crops: {global_size: 48}
    dino: {freeze_last_layer_epochs: 0}
    optim: {lr: 0.01, warmup_epochs: 0}
    train: {epochs: 1}
    checkpoint: {every_steps: 8}
"""
STEPS = (7, 16)


def _phases(folder: Path) -> Path:
    config = write_config(folder, stage=2, epochs=2, **OBJECTIVES["sinkhorn_knopp"])
    config.write_text(config.read_text().replace("phases: []\n", _PHASES))
    return config


def test_killed_phases_end_as_the_undisturbed_ones(tmp_path: Path) -> None:
    whole, broken = _phases(tmp_path / "whole"), _phases(tmp_path / "broken")
    undisturbed = RunProcesses(whole, "data.num_workers=1")
    assert undisturbed.wait_until(lambda: bool(phase_directories(whole.parent / "run")))
    whole.write_text("seed: 77\n")  # the next run of somebody
    assert undisturbed.end(timeout_s=200) == [0] * RANKS, undisturbed.said()
    assert "phase 2 of 2: large" in undisturbed.said()
    assert '"phase": "large"' in undisturbed.said()

    small, large = (Path(run.run_dir) for run in phases_of(load_config(str(broken))))
    assert RunProcesses(broken, "phase=small").end() == [0] * RANKS
    _kill_after(broken, large, steps=1)
    assert not checkpoints(large), "a kill between the checkpoint before and the first of the phase"
    _kill_after(broken, large, steps=9)
    trial = RunProcesses(broken, "train.stop_after_steps=10")
    assert trial.end() == [0] * RANKS, trial.said()
    assert newest_step(large) == 10
    assert RunProcesses(broken).end() == [0] * RANKS

    expected = phase_directories(whole.parent / "run")
    assert [path.name for path in expected] == [small.name, large.name]
    for there, here, last in zip(expected, (small, large), STEPS, strict=True):
        assert newest_step(here) == newest_step(there) == last
        assert losses(here) == losses(there)
        assert same_checkpoint(checkpoints(here)[-1], checkpoints(there)[-1])
    counts = Checkpoint(checkpoints(large)[-1]).state["optimizer_steps"]
    assert max(counts.values()) == sum(STEPS), "the second phase has an optimizer of its own"


def _kill_after(config: Path, run_dir: Path, *, steps: int) -> None:
    """Kill all ranks once this start has logged some steps of a phase."""
    begun = steps_logged(run_dir)
    run = RunProcesses(config)
    assert run.wait_until(lambda: steps_logged(run_dir) >= max(begun, 1) + steps - 1), run.said()
    run.send(signal.SIGKILL)
    run.end()
