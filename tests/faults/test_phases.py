"""A run of three phases, one with Gram anchoring, goes on as if nobody had interrupted it.

It is killed within each phase and at each border, and goes on in the middle of the Gram phase on
other ranks and at another ZeRO stage.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinoscale.checkpoint.layout import checkpoints, directory, phase_directories
from dinoscale.checkpoint.load import Checkpoint
from dinoscale.config import RunConfig, load_config, parse_config, phases_of
from tests.faults.kills import OBJECTIVES
from tests.faults.run_processes import (
    BATCH,
    RANKS,
    RunProcesses,
    losses,
    newest_step,
    same_checkpoint,
    steps_logged,
    write_config,
)
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = (5, 8, 5)  # of each phase; checkpoints come after every third step and the last
REFRESHED = (2, 4)  # steps done of the second
AMID = 3  # a checkpoint between its refreshes
_PHASES = """\
phases:
- {name: small, change: {gram: {loss_weight: 0}, train: {stop_after_steps: 5}}}
- name: gram
  change:
    gram: {refresh_every_steps: 2, first_refresh_step: 2, max_refreshes: 2}
    dino: {freeze_last_layer_epochs: 0}
    optim: {lr: 0.01, warmup_epochs: 0}
    train: {epochs: 1, stop_after_steps: 8}
- name: large
  start: teacher
  change:
    crops: {global_size: 48}
    gram: {teacher: "{run_dir}/phases/02_gram", refresh_every_steps: null, first_refresh_step: 0}
    dino: {freeze_last_layer_epochs: 0}
    optim: {lr: 0.01, warmup_epochs: 0}
    train: {epochs: 1, steps_per_epoch: 5}
"""
# Starts after step `AMID` of the second phase: ranks, stage, and the step where that phase stops.
# Each trains what is left of a phase.
ELASTIC = {
    "by_stage_0": [(1, 0, 6), (2, 3, 8), (2, 3, 8)],
    "by_stage_3": [(1, 3, 8), (2, 0, 8)],
}
# As the whole run goes on, but for rates that differ by ten roundings: how far roundings carry.
NUDGED = [(2, 2, 8), (2, 2, 8)]
_NUDGES = ["phases.gram.optim.lr=0.01000001", "phases.large.optim.lr=0.01000001"]


def _phases(folder: Path) -> Path:
    sections = OBJECTIVES["sinkhorn_knopp"]
    sections = {
        **sections,
        "koleo": {"loss_weight": 0.1, "scope": "all"},  # so that ranks do not matter
        "checkpoint": {"keep_last": 3},
    }
    config = write_config(folder, stage=2, epochs=2, **sections)
    config.write_text(config.read_text().replace("phases: []\n", _PHASES))
    return config


def _folders(config: Path) -> list[Path]:
    return [Path(run.run_dir) for run in phases_of(load_config(str(config)))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of the phases of a run that nobody interrupts."""
    config = _phases(tmp_path_factory.mktemp("whole"))
    folders = _folders(config)
    run = RunProcesses(config, "data.num_workers=1")
    assert run.wait_until(folders[0].exists)
    config.write_text("seed: 77\n")  # the next run of somebody
    assert run.end(timeout_s=400) == [0] * RANKS, run.said()
    assert "phase 3 of 3: large" in run.said()
    assert '"phase": "large"' in run.said()
    assert phase_directories(config.parent / "run") == folders
    return folders


def test_killed_phases_end_as_the_undisturbed_ones(tmp_path: Path, whole: list[Path]) -> None:
    config = _phases(tmp_path)
    small, gram, large = folders = _folders(config)
    _kill_when(config, lambda: steps_logged(small) >= 4)
    assert RunProcesses(config, "phase=small").end() == [0] * RANKS
    _kill_when(config, (gram / "versions.json").exists)
    assert not checkpoints(gram), "a kill between two phases"
    _kill_when(config, lambda: newest_step(gram) > 0 and steps_logged(gram) > AMID)
    assert newest_step(gram) == AMID, "a kill between two refreshes"
    _kill_when(config, lambda: newest_step(gram) == STEPS[1])
    _kill_when(config, (large / "versions.json").exists)
    assert not checkpoints(large)
    _kill_when(config, lambda: steps_logged(large) >= 4)
    trial = RunProcesses(config, "train.stop_after_steps=4")  # not that of the phase
    assert trial.end() == [0] * RANKS, trial.said()
    assert newest_step(large) == 4
    assert RunProcesses(config).end() == [0] * RANKS

    assert phase_directories(tmp_path / "run") == folders
    for there, here, last in zip(whole, folders, STEPS, strict=True):
        assert newest_step(here) == newest_step(there) == last
        assert losses(here) == losses(there)
        assert same_checkpoint(checkpoints(here)[-1], checkpoints(there)[-1])


def _kill_when(config: Path, come: Callable[[], bool]) -> None:
    """Start the run, and kill all ranks once something is on disk."""
    run = RunProcesses(config, slow_images_s=0.02)  # steps slower than a kill
    assert run.wait_until(come), run.said()
    run.send(signal.SIGKILL)
    run.end()


def test_each_phase_has_the_gram_network_and_the_optimizer_that_it_asks_for(
    whole: list[Path],
) -> None:
    last = [Checkpoint(directory(path, steps)) for path, steps in zip(whole, STEPS, strict=True)]
    assert [each.gram_refreshes for each in last] == [None, len(REFRESHED), 0]
    counts = [max(each.state["optimizer_steps"].values()) for each in last]
    assert counts == [STEPS[0], STEPS[0] + STEPS[1], STEPS[2]], "a new optimizer for a teacher"
    of_gram, of_large = (
        [step for step, values in losses(path).items() if values[-1] == 0] for path in whole[1:]
    )
    assert of_gram == [1, REFRESHED[0]], "no Gram network before the end of this step"
    assert of_large == [], "it begins with one"


def train_all(jobs: list[dict[str, Any]]) -> None:
    """On every rank: train the next phase of each run; of a run of one part, train it."""
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    for job in jobs:
        train(parse_config(job), read_process(os.environ))


def _train_all(ranks: int, configs: list[RunConfig]) -> None:
    jobs = [config.model_dump(mode="json") for config in configs]
    function = "tests.faults.test_phases:train_all"
    run_distributed(function, world_size=ranks, timeout_s=400, jobs=jobs)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, whole: list[Path]) -> Path:
    """Runs that go on elsewhere, and two that begin by themselves at a border, in their folders."""
    root = tmp_path_factory.mktemp("others")
    config = _phases(root)
    one: list[RunConfig] = []
    two: list[RunConfig] = []
    for name, parts in {**ELASTIC, "nudged": NUDGED}.items():
        _copy_until_amid(whole, root / name)
        for ranks, stage, last in parts:
            of_ranks = [
                f"run_dir={root / name}",
                f"engine.zero_stage={stage}",
                f"train.micro_batch_size={BATCH // 2 // ranks}",  # what batch norm and KoLeo see
                f"phases.gram.train.stop_after_steps={last}",
                *(_NUDGES if name == "nudged" else []),
            ]
            (one if ranks == 1 else two).append(load_config(str(config), of_ranks))
    small, gram, large = phases_of(load_config(str(config)))
    begin = {"continue_from": str(directory(whole[0], STEPS[0]))}
    two.append(_first_steps(gram, root / "gram", seed=small.seed + 1, train=begin))
    begin = {"init_from": str(directory(whole[1], STEPS[1])), "init_head": True}
    section = {"gram": {"teacher": begin["init_from"]}}
    two.append(_first_steps(large, root / "large", seed=small.seed + 2, train=begin, **section))
    _train_all(1, one)
    _train_all(RANKS, two)
    return root


def _copy_until_amid(whole: list[Path], run_dir: Path) -> None:
    """A run whose second phase has the checkpoint of step `AMID` alone."""
    small, gram, _ = whole
    for phase in (small, gram):
        shutil.copytree(phase, run_dir / "phases" / phase.name)
    for path in checkpoints(run_dir / "phases" / gram.name):
        if path.name != directory(gram, AMID).name:
            shutil.rmtree(path)


def _first_steps(run: RunConfig, run_dir: Path, *, seed: int, **changes: Any) -> RunConfig:
    """Two steps of a run."""
    values = run.model_dump() | {"run_dir": str(run_dir), "seed": seed}
    for section, of_section in changes.items():
        values[section] |= of_section
    values["train"] |= {"stop_after_steps": 2}
    return parse_config(values)


@pytest.fixture(scope="module")
def tolerance(others: Path, whole: list[Path]) -> float:
    """Relative, of a number of a step: ten times what ten roundings make of it on this machine."""
    spread = 0.0
    for there in whole:
        nudged, numbers = losses(others / "nudged" / "phases" / there.name), losses(there)
        for step, expected in numbers.items():
            pairs = zip(nudged[step], expected, strict=True)
            spread = max(spread, *(abs(x - y) / max(abs(y), 0.01) for x, y in pairs))
    assert 0 < spread < 1e-3, "more would hide mistakes"
    return 10 * spread


@pytest.mark.parametrize("name", ELASTIC)
def test_the_gram_phase_goes_on_elsewhere(
    others: Path, whole: list[Path], tolerance: float, name: str
) -> None:
    for there in whole:
        here = others / name / "phases" / there.name
        assert newest_step(here) == newest_step(there)
        found, expected = losses(here), losses(there)
        assert found.keys() == expected.keys()
        for step, numbers in expected.items():
            near = pytest.approx(numbers, rel=tolerance, abs=0.01 * tolerance)
            assert found[step] == near, (there.name, step)
        counts = [Checkpoint(checkpoints(path)[-1]).gram_refreshes for path in (here, there)]
        assert counts[0] == counts[1]


def test_a_phase_begins_at_the_last_checkpoint_of_the_one_before(
    others: Path, whole: list[Path]
) -> None:
    for there, name in zip(whole[1:], ("gram", "large"), strict=True):
        found, expected = losses(others / name), losses(there)
        assert found == {step: expected[step] for step in (1, 2)}


def test_missing_weights_of_the_last_phase_end_the_run_before_it_begins(tmp_path: Path) -> None:
    config = _phases(tmp_path)
    run = RunProcesses(config, "phases.large.gram.teacher=/nowhere/weights.pth")
    assert run.end() == [2] * RANKS
    for output in run.outputs:
        assert "phases.large.gram.teacher: /nowhere/weights.pth: No such file" in output.read_text()
        assert "Traceback" not in output.read_text()
    assert not (tmp_path / "run").exists()
