"""`train.micro_batch_size=auto` on processes that may take only so much memory."""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dinoscale.config import load_config, parse_config
from tests.forked import ROOT, Forked, server_pids, start_module
from tests.harness import environment_of
from tests.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]

FITS, TOO_LARGE = 37, 74
ONE_STEP = ("train.epochs=1", "train.stop_after_steps=1", "optim.min_lr=0")
_SIZES: dict[str, dict[str, Any]] = {  # many short rows of few numbers: memory for little work
    "model": {"patch_size": 4, "embed_dim": 32, "depth": 8, "num_heads": 1, "drop_path_rate": 0.0},
    "head": {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
    "crops": {"global_size": 24, "local_size": 24, "num_local": 10},
    "optim": {"warmup_epochs": 0},
    "dino": {"freeze_last_layer_epochs": 0},
    "data": {"train": "synthetic:shapes?images=148&size=24", "num_workers": 0},
    "engine": {"precision": "fp32"},
    "eval": {"crop": 24, "resize": 24},
    "log": {"wandb": False, "every_steps": 1},
}


@pytest.fixture(scope="module")
def peaks() -> tuple[int, int]:
    """Bytes of private writable memory that unlimited trials of `FITS` and `TOO_LARGE` take."""
    trials = [_unlimited_trial(size) for size in (FITS, TOO_LARGE)]
    most = [0, 0]
    while any(trial.poll() is None for trial in trials):
        for index, trial in enumerate(trials):
            with contextlib.suppress(OSError, KeyError):  # it has ended
                most[index] = max(most[index], _peak_so_far(trial.pid))
        time.sleep(0.02)
    assert [trial.returncode for trial in trials] == [0, 0]
    return most[0], most[1]


@pytest.fixture(scope="module")
def limit(peaks: tuple[int, int]) -> int:
    """With which `FITS` fits and `TOO_LARGE` does not; a trial leaves 8 % of it alone."""
    return sum(peaks) // 2


def _peak_so_far(pid: int) -> int:
    """Bytes of private writable memory; what is not of that kind does not change in a step."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in lines)
        if name.startswith("Vm")
    }
    return 1024 * (kib["VmPeak"] - kib["VmSize"] + kib["VmData"])


def _unlimited_trial(
    size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    port: int | None = None,
    engine: dict[str, int] | None = None,
) -> subprocess.Popen[str]:
    train = {"batch_size": world_size * size, "micro_batch_size": "auto"}
    settings = {**_SIZES, "train": train, "engine": {**_SIZES["engine"], **(engine or {})}}
    order = {"config": parse_config(settings).model_dump(mode="json"), "micro_batch_size": size}
    own = environment_of(rank, world_size=world_size, port=port or free_port())
    trial = subprocess.Popen(
        [sys.executable, "-m", "dinoscale.training.micro_batch.trial"],
        env=own | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert trial.stdin is not None
    trial.stdin.write(json.dumps(order) + "\n")
    trial.stdin.flush()
    return trial


def _limited(
    words: list[str], environment: dict[str, str], said: Path, limit: int
) -> "subprocess.Popen[bytes]":
    """A new interpreter: one that is forked has the server's memory already."""
    with said.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dinoscale", *words],
            env=environment,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
    return process


class Ranks:
    """`dinoscale train` on some processes, of which the last may have a limit of memory."""

    def __init__(
        self, folder: Path, *overrides: str, world_size: int, limit: int | None = None
    ) -> None:
        self.run_dir = folder / "run"
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump(_SIZES))
        settings = ["train.micro_batch_size=auto", f"run_dir={self.run_dir}", *overrides]
        words = ["train", str(config), *settings]
        port = free_port()
        self.processes: list[Forked | subprocess.Popen[bytes]] = []
        for rank in range(world_size):
            environment = environment_of(rank, world_size=world_size, port=port)
            said = folder / f"said_{rank}.txt"
            said.unlink(missing_ok=True)
            if limit is None or rank < world_size - 1:
                forked = start_module("dinoscale", *words, environment=environment, output=said)
                self.processes.append(forked)
            else:
                self.processes.append(_limited(words, environment, said, limit))
        self._folder = folder

    def end(self) -> tuple[list[int], str]:
        """Exit codes, and what the first rank said."""
        codes = [process.wait(timeout=300) for process in self.processes]
        return codes, self.said()

    def said(self) -> str:
        """By the first rank until now."""
        return (self._folder / "said_0.txt").read_text()

    def wait_for_trial(self) -> list[psutil.Process]:
        """The processes of a trial, once there is one on every rank."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            children = [
                child
                for process in self.processes
                for child in psutil.Process(process.pid).children()
                if "dinoscale.training.micro_batch.trial" in _command(child)
            ]
            if len(children) == len(self.processes):
                return children
            time.sleep(0.05)
        raise AssertionError(f"no trial began\n{self.said()}")


def _command(process: psutil.Process) -> list[str]:
    """Nothing where the process has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # that of a zombie is one too
        return []


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}  # of other tests
    yield
    children = psutil.Process().children(recursive=True)
    left = [child for child in children if child.pid not in before | server_pids()]
    for child in left:
        child.kill()
    assert not left


def _losses(run_dir: Path) -> dict[int, float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_two_ranks_agree_and_neither_their_config_nor_a_resumed_run_searches_again(
    tmp_path: Path, limit: int
) -> None:
    settings = (f"train.batch_size={2 * TOO_LARGE}", "optim.min_lr=0", "train.epochs=2")
    codes, said = Ranks(
        tmp_path, *settings, "train.stop_after_steps=1", world_size=2, limit=limit
    ).end()
    assert codes == [0, 0], said
    assert f"auto: trying {FITS}\n" in said
    assert f"micro-batch {FITS} fits (peak " in said
    assert f"micro-batch {TOO_LARGE} does not fit (needs more than 0." in said
    assert f"); taking {FITS} after 2 trials" in said
    assert f"2 ranks x {FITS} x 2 (micro-batches)" in said
    run = tmp_path / "run"
    assert load_config(str(run / "config.yaml")).train.micro_batch_size == FITS
    (event,) = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["size"], event["trials"]) == ("micro-batch found", FITS, 2)

    words = ("train", run / "config.yaml", f"run_dir={tmp_path / 'again'}")
    port = free_port()
    environments = [environment_of(rank, world_size=2, port=port) for rank in range(2)]
    again = [start_module("dinoscale", *words, environment=each) for each in environments]
    assert [rank.wait(300) for rank in again] == [0, 0], again[0].said()
    assert "trying" not in again[0].said()
    assert _losses(tmp_path / "again") == _losses(run)

    codes, said = Ranks(tmp_path, *settings, world_size=1).end()
    assert codes == [0], said
    assert "trying" not in said
    assert f"1 rank x {FITS} x 4 (micro-batches)" in said


def test_where_not_one_image_fits_the_remedies_are_named(
    tmp_path: Path, peaks: tuple[int, int]
) -> None:
    settings = (*ONE_STEP, "train.batch_size=1")
    of_no_image = peaks[0] - (peaks[1] - peaks[0])  # both sizes are doubles
    too_low = of_no_image - (peaks[1] - peaks[0]) // 8  # more than peaks differ between starts
    codes, said = Ranks(tmp_path, *settings, world_size=1, limit=too_low).end()
    assert codes == [2], said
    assert "even micro-batch 1 does not fit (needs more than 0." in said
    assert "engine.checkpoint_every_k_blocks=1" in said
    assert "Traceback" not in said


def test_another_failure_of_a_trial_is_named_and_is_no_limit(tmp_path: Path) -> None:
    settings = (*ONE_STEP, f"train.batch_size={TOO_LARGE}")
    codes, said = Ranks(
        tmp_path, *settings, "model.backbone=vit_nonsense_patch4_24", world_size=1
    ).end()
    assert codes == [2], said
    assert f"the trial of {FITS} failed on rank 0 (exit code 2), not for lack of memory:" in said
    assert "vit_nonsense_patch4_24" in said
    assert "Traceback" not in said


def _wait_for_limit(trial: subprocess.Popen[str]) -> None:
    inherited = resource.getrlimit(resource.RLIMIT_DATA)
    while resource.prlimit(trial.pid, resource.RLIMIT_DATA) == inherited:
        assert trial.poll() is None, "it took its steps without a limit"
        time.sleep(0.02)


def test_a_trial_limits_its_own_memory_and_does_not_outlive_its_run() -> None:
    trial = _unlimited_trial(TOO_LARGE)
    assert trial.stdin is not None
    _wait_for_limit(trial)
    trial.stdin.close()  # as where the run has ended, however it did
    assert trial.wait(timeout=120) == 1


def test_no_thread_begins_under_the_limit_of_a_trial() -> None:
    """Gloo hangs where one of its threads finds no room for its stack."""
    port, engine = free_port(), {"zero_stage": 3, "zero_hpz_partition_size": 2}  # most groups
    first, second = (
        _unlimited_trial(FITS, rank=rank, world_size=2, port=port, engine=engine)
        for rank in range(2)
    )
    _wait_for_limit(first)
    tasks = Path(f"/proc/{first.pid}/task")
    begun, seen = {path.name for path in tasks.iterdir()}, set[str]()
    while first.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            seen |= {path.name for path in tasks.iterdir()}
        time.sleep(0.02)
    assert (first.returncode, second.wait(timeout=60)) == (0, 0)
    assert seen <= begun


def test_a_signal_to_the_run_and_its_trial_is_no_failure_of_the_trial(tmp_path: Path) -> None:
    settings = (*ONE_STEP, f"train.batch_size={TOO_LARGE}")
    ranks = Ranks(tmp_path, *settings, world_size=1)
    children = ranks.wait_for_trial()
    for process in (*children, *ranks.processes):  # as launchers do with whole trees
        process.send_signal(signal.SIGTERM)
    codes, said = ranks.end()
    assert codes == [75], said
