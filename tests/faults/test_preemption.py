"""Asked to stop, a run saves its current step, exits with 75, and resumes as if never stopped."""

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from dinoscale.checkpoint.layout import directory
from dinoscale.checkpoint.load import Checkpoint
from dinoscale.checkpoint.retention import summary
from tests.faults.kills import LAUNCHERS
from tests.faults.run_processes import (
    RANKS,
    RunProcesses,
    gone,
    losses,
    newest_step,
    run_launcher,
    same_checkpoint,
    steps_logged,
    write_config,
)
from tests.forked import run_module
from tests.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

SAVED = 75
EPOCH = 16  # steps
LAST = 64  # steps: long enough to be asked within
MORE = 8  # steps after the stop; one of seven is logged in one case
RARELY = {"every_steps": 1000, "every_epochs": 1000}  # so that what is saved was asked for


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run that was never asked to stop."""
    often = {"every_steps": 1, "keep_last": 1000}
    config = write_config(tmp_path_factory.mktemp("whole"), stage=2, epochs=4, checkpoint=often)
    assert RunProcesses(config).end() == [0] * RANKS
    return config.parent / "run"


def _same_as(undisturbed: Path, run_dir: Path) -> bool:
    step = newest_step(run_dir)
    expected = losses(undisturbed)
    assert step > 0
    return losses(run_dir) == {at: expected[at] for at in losses(run_dir)} and same_checkpoint(
        directory(run_dir, step), directory(undisturbed, step)
    )


def _require_going_on_as(undisturbed: Path, config: Path) -> None:
    """Start again for some steps; a difference would show in the first."""
    run_dir = config.parent / "run"
    last = min(newest_step(run_dir) + MORE, LAST)
    assert RunProcesses(config, f"train.stop_after_steps={last}").end() == [0] * RANKS
    assert newest_step(run_dir) == last
    assert _same_as(undisturbed, run_dir)


@pytest.mark.parametrize(
    ("number", "ranks", "workers", "log"),
    [
        (signal.SIGTERM, [0, 1], 1, 1),
        (signal.SIGUSR1, [1], 0, 1),  # the other learns of it from the step
        (signal.SIGUSR1, [1], 0, 7),  # and that when the next one is under way
    ],
)
def test_signal_to_ranks(
    tmp_path: Path, undisturbed: Path, number: int, ranks: list[int], workers: int, log: int
) -> None:
    every = {"every_steps": log}
    config = write_config(tmp_path, stage=2, epochs=4, checkpoint=RARELY, log=every)
    run = RunProcesses(config, f"data.num_workers={workers}")
    assert run.wait_until(lambda: steps_logged(run.run_dir) >= 3)
    pids = run.pids()
    children = [pid for pid in pids if pid not in [process.pid for process in run.ranks]]
    assert bool(children) == bool(workers)
    for child in children:  # launchers signal whole process trees
        os.kill(child, number)
    run.send(number, ranks=ranks)
    assert run.end(timeout_s=200) == [SAVED] * RANKS, run.said()
    assert gone(pids)
    assert 3 <= newest_step(run.run_dir) < LAST
    assert _same_as(undisturbed, run.run_dir)
    assert "the same command goes on from there" in run.said()
    assert "Traceback" not in run.said()
    _require_going_on_as(undisturbed, config)


def test_signal_amid_knn_is_heard_after_the_save_and_failing_knn_costs_its_number(
    tmp_path: Path,
) -> None:
    bank = "synthetic:shapes?images=240&size=16"
    config = write_config(
        tmp_path,
        stage=2,
        epochs=2,
        checkpoint=RARELY | {"every_epochs": 1},
        eval={"train": bank, "test": bank, "batch_size": 4, "k": 3},
    )
    run = RunProcesses(config, slow_images_s=0.05)  # k-NN takes 12 s
    assert run.wait_until(lambda: newest_step(run.run_dir) == EPOCH)
    run.send(signal.SIGTERM, ranks=[1])
    assert run.end() == [SAVED] * RANKS, run.said()
    assert f"no k-NN after step {EPOCH}: " in run.said()
    assert Checkpoint(directory(run.run_dir, EPOCH)).progress.knn_top1 is None

    for name in ("0/a.png", "0/b.png", "1/a.png", "1/b.png"):
        (tmp_path / "labelled" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "labelled" / name)
    labelled = [f"eval.{name}={tmp_path / 'labelled'}" for name in ("train", "test")]
    run = RunProcesses(config, *labelled, slow_images_s=0.01)
    assert run.wait_until(lambda: steps_logged(run.run_dir) > EPOCH + 1)
    shutil.rmtree(tmp_path / "labelled")
    assert run.end() == [0] * RANKS, run.said()
    assert "cannot be read: No such file or directory. The image may be intact" in run.said()
    measured = [directory(run.run_dir, step) for step in (EPOCH, 2 * EPOCH)]
    assert [summary(path).knn_top1 for path in measured] == [50.0, None]  # two classes, all black


# What each launcher makes of a SIGTERM to itself. That of deepspeed dies of it and tells nobody;
# its ranks see that it is gone.
OF_LAUNCHER = {"deepspeed": -signal.SIGTERM, "torchrun": 1}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_the_launcher(tmp_path: Path, undisturbed: Path, launcher: str) -> None:
    config = write_config(tmp_path, stage=2, epochs=4, checkpoint=RARELY)
    run_dir = config.parent / "run"
    port = str(free_port())
    words = [port if word == "PORT" else word for word in LAUNCHERS[launcher]]
    process = run_launcher([*words, "dinoscale", "train", str(config)], config.parent)
    end = time.monotonic() + 300
    while steps_logged(run_dir) < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    code = process.wait(timeout=200)
    assert gone(pids, timeout_s=100)
    said = (config.parent / "launcher.txt").read_text()
    assert code == OF_LAUNCHER[launcher], said[-3000:]
    assert 3 <= newest_step(run_dir) < LAST, said[-3000:]
    assert _same_as(undisturbed, run_dir)
    assert "the same command goes on from there" in said
    _require_going_on_as(undisturbed, config)


def test_sigterm_to_plain_python(tmp_path: Path) -> None:
    config = write_config(tmp_path, stage=2, epochs=4, checkpoint=RARELY)
    run_dir = config.parent / "run"
    command = ["python", "-m", "dinoscale", "train", str(config)]
    process = run_launcher(command, config.parent)
    end = time.monotonic() + 300
    while steps_logged(run_dir) < 3:
        assert process.poll() is None, (config.parent / "launcher.txt").read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == SAVED
    step = newest_step(run_dir)
    assert Checkpoint(directory(run_dir, step)).step == step == steps_logged(run_dir)
    last = min(step + MORE, LAST)
    again = run_module("dinoscale", "train", config, f"train.stop_after_steps={last}")
    assert again.returncode == 0, again.stderr
    assert newest_step(run_dir) == last
    assert list(losses(run_dir)) == list(range(1, last + 1))
