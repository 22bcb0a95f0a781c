"""Full and read-only disks fail the save, not the run; damaged checkpoints are skipped."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dinoscale.checkpoint.checksums import read_sums, sha256, write_sums
from dinoscale.checkpoint.layout import (
    INDEX_FILE,
    SHARED_FILE,
    checkpoints,
    directory,
    leftovers,
    shard_file,
)
from dinoscale.checkpoint.load import open_verified
from tests.faults.run_processes import (
    RANKS,
    RunProcesses,
    losses,
    newest_step,
    same_checkpoint,
    steps_logged,
    write_config,
)
from tests.unit.checkpoint.test_checksums import DAMAGES

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

LAST = 16


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 960 kB: room for some checkpoints of 300 kB, not for all."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=960k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount a small disk here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _config(folder: Path, **checkpoint: Any) -> Path:
    """A run of 16 steps in `folder`/run whose YAML file lies beside."""
    return write_config(folder, stage=2, epochs=1, checkpoint={"every_steps": 4} | checkpoint)


def _events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_disk_that_fills_up_stops_saves_and_not_steps(small_disk: Path) -> None:
    config = _config(small_disk, every_steps=4, keep_last=100)
    run = RunProcesses(config)
    codes = run.end()
    said = run.said()
    run_dir = run.run_dir
    assert sorted(losses(run_dir)) == list(range(1, LAST + 1))  # all steps were taken
    failed = [event for event in _events(run_dir) if event["event"] == "save failed"]
    assert failed, said
    assert all("No space left on device" in event["reason"] for event in failed)
    assert "was not saved" in said
    assert codes == [1, 1]  # the end of the run is not on disk: that is said and is no success
    assert "free some space in" in said
    assert "Traceback" not in said
    whole = checkpoints(run_dir)
    assert len(whole) >= 2
    assert leftovers(run_dir) == []  # what did not fit was removed
    for path in whole:
        open_verified(path)
    shutil.rmtree(whole[0])  # the user makes room and starts again
    assert RunProcesses(config).end() == [0, 0]
    assert newest_step(run_dir) == LAST


def test_directory_that_turns_read_only_stops_saves_and_not_steps(tmp_path: Path) -> None:
    config = _config(tmp_path)
    run = RunProcesses(config, "train.epochs=3", slow_disk_s=0.1)
    assert run.wait_until(lambda: newest_step(run.run_dir) >= 8)
    folder = str(run.run_dir / "checkpoints")
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        run.send(signal.SIGKILL)
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    try:
        assert run.end() == [1, 1]
    finally:
        subprocess.run(["umount", folder], check=True)
    assert sorted(losses(run.run_dir)) == list(range(1, 3 * LAST + 1))
    assert "Read-only file system" in run.said()
    assert "Traceback" not in run.said()
    open_verified(checkpoints(run.run_dir)[-1])
    assert RunProcesses(config, "train.epochs=3").end() == [0, 0]
    assert newest_step(run.run_dir) == 3 * LAST


# Step -> file and damage, of the newest checkpoints. Every pair is tried by the unit tests; these
# start whole runs.
DAMAGED = (
    {16: ("shard_00000.safetensors", "truncated"), 12: ("shared.safetensors", "emptied")},
    {
        16: ("state.json", "missing"),
        12: ("SHA256SUMS", "truncated"),
        8: ("shard_00001.safetensors", "bit flipped"),
    },
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints of steps 4, 8, 12, 16, and its YAML file."""
    config = _config(tmp_path_factory.mktemp("finished"), keep_last=100)
    assert RunProcesses(config).end() == [0] * RANKS
    return config.parent


@pytest.mark.parametrize("damaged", DAMAGED)
def test_damaged_checkpoints_are_named_and_the_one_before_them_used(
    finished: Path, tmp_path: Path, damaged: dict[int, tuple[str, str]]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "run", run_dir)
    config = _config(tmp_path, keep_last=100)
    for step, (file, damage) in damaged.items():
        DAMAGES[damage](directory(run_dir, step) / file)
    run = RunProcesses(config)
    assert run.end() == [0, 0]
    said = run.outputs[0].read_text()
    for step, (file, _) in damaged.items():
        path = directory(run_dir, step)
        named = next(line for line in said.splitlines() if str(path) in line and file in line)
        assert "resuming from an older checkpoint" in named
        assert (run_dir / "checkpoints" / f"damaged_{path.name}").is_dir()
    assert f"resuming from {directory(run_dir, min(damaged) - 4)}" in said
    assert same_checkpoint(directory(run_dir, LAST), directory(finished / "run", LAST))


def test_if_all_are_damaged_the_run_does_not_start_over(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "run", run_dir)
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    for path in checkpoints(run_dir):
        DAMAGES["emptied"](path / "shared.safetensors")
    run = RunProcesses(_config(tmp_path, keep_last=100))
    assert run.end() == [2, 2]
    for output in run.outputs:
        assert "none of the 4 checkpoints" in output.read_text()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before


def test_weights_of_another_run_are_refused_at_the_first_loss(tmp_path: Path) -> None:
    # Without centering the loss falls fast and far, whatever that is worth.
    changes = {"dino": {"momentum": 0.5, "center_momentum": 1.0}, "optim": {"lr": 0.05}}
    config = write_config(tmp_path, stage=2, epochs=6, **changes)
    assert RunProcesses(config, "train.stop_after_steps=90").end() == [0, 0]
    run_dir = tmp_path / "run"
    assert losses(run_dir)[90][0] < 0.1 * losses(run_dir)[1][0]
    other = write_config(tmp_path / "other", stage=2, epochs=6, **changes)
    assert RunProcesses(other, "train.stop_after_steps=1", "seed=1").end() == [0, 0]
    fresh, own = directory(other.parent / "run", 1), directory(run_dir, 90)
    for name in (shard_file(0), shard_file(1), SHARED_FILE, INDEX_FILE):
        shutil.copy(fresh / name, own / name)
    write_sums(own, {name: sha256(own / name) for name in read_sums(own)})
    state = json.loads((own / "state.json").read_text())
    state["optimizer_steps"] = json.loads((fresh / "state.json").read_text())["optimizer_steps"]
    (own / "state.json").write_text(json.dumps(state))
    write_sums(own, {name: sha256(own / name) for name in read_sums(own)})
    run = RunProcesses(config)
    assert run.end() == [2, 2], run.said()
    for output in run.outputs:
        assert "the first loss after the resume is" in output.read_text()
    assert steps_logged(run_dir) == 90
    assert newest_step(run_dir) == 90


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=5", "seed was 0"),
        ("data.train=synthetic:shapes?images=102&size=16", "the number of images"),
        ("data.images_per_epoch=60", "the number drawn from each source an epoch"),
        ("train.batch_size=16", "train.batch_size was 8"),
        ("resume=false", "already holds a run and resume is false"),
    ],
)
def test_setting_that_would_shift_the_position_is_refused(
    finished: Path, override: str, says: str
) -> None:
    run = RunProcesses(finished / "run.yaml", override)
    assert run.end() == [2, 2]
    for output in run.outputs:
        assert says in output.read_text()
        assert "Traceback" not in output.read_text()
    assert newest_step(finished / "run") == LAST


def test_other_changed_setting_is_named_and_accepted(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    config = write_config(tmp_path, stage=2, epochs=2, optim={"lr": 0.01})
    run = RunProcesses(config, "train.stop_after_steps=18")
    assert run.end() == [0, 0]
    assert "optim.lr 0.02 -> 0.01" in run.said()
    assert "train.epochs 1 -> 2" in run.said()
