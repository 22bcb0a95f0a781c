"""Start a two-process run, end it in some way, restart it, and compare what is on disk.

The ranks run `dinoscale train`, with its own signals and exit codes.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import load_file

from dinoscale.checkpoint import checksums
from dinoscale.checkpoint.layout import checkpoints
from dinoscale.checkpoint.load import Checkpoint
from dinoscale.config import dump_config
from dinoscale.runtime import watchdog
from tests.distributed.tiny_run import tiny_config
from tests.forked import ROOT, Forked
from tests.harness import environment_of
from tests.ports import free_port

RANKS = 2
IMAGES, BATCH = 128, 8  # 16 steps an epoch
_NUMBERS = ("loss", "teacher_entropy", "grad_norm")
_TERMS = ("dino_loss", "ibot_loss", "koleo_loss", "gram_loss", "anchor_class_loss")


def write_config(folder: Path, *, stage: int, epochs: int, **changes: dict[str, Any]) -> Path:
    """A run of `epochs` x 16 steps that saves every third step and logs each; its YAML file."""
    sections = {
        "model": {"drop_path_rate": 0.2},
        "head": {"num_prototypes": 33, "hidden_dim": 22, "bottleneck_dim": 15, "batch_norm": True},
        "dino": {"momentum": 0.9, "freeze_last_layer_epochs": 1},
        "optim": {"lr": 0.02, "warmup_epochs": 1},
        "train": {"epochs": epochs, "batch_size": BATCH, "micro_batch_size": BATCH // RANKS},
        "data": {"train": f"synthetic:shapes?images={IMAGES}&size=16", "num_workers": 0},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "checkpoint": {"every_steps": 3, "keep_last": 2},
    }
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(dump_config(tiny_config(run_dir=str(folder / "run"), **sections)))
    return path


class Faults(NamedTuple):
    """What is wrong with a rank; as in `RunProcesses`."""

    slow_disk_s: float
    slow_images_s: float
    stuck: bool
    before_save: Callable[[Path], None] | None
    quick_verdict: bool


class RunProcesses:
    """One start of a run on `RANKS` processes."""

    def __init__(
        self,
        config: Path,
        *overrides: str,
        slow_disk_s: float = 0.0,
        slow_images_s: float = 0.0,
        stuck_reader: int | None = None,
        before_save: Callable[[Path], None] | None = None,
        quick_verdict: bool = False,
    ) -> None:
        """Start.

        Args:
            config: YAML file; the run goes to "run" beside it.
            overrides: settings that win over it.
            slow_disk_s: how long each file of a checkpoint takes to reach the disk.
            slow_images_s: how long each image takes to be read.
            stuck_reader: a rank whose third step's images never come.
            before_save: called on rank 1 with each file before it is written.
            quick_verdict: whether a rank that lost another one finds out in tenths of a second who
                is gone, instead of in seconds.
        """
        self.run_dir, port = config.parent / "run", free_port()
        self.outputs = [config.parent / f"output_{rank}.txt" for rank in range(RANKS)]
        self.ranks = [
            Forked(
                _rank,
                rank,
                Faults(
                    slow_disk_s,
                    slow_images_s,
                    stuck=stuck_reader == rank,
                    before_save=before_save if rank else None,
                    quick_verdict=quick_verdict,
                ),
                ["train", str(config), *overrides],
                environment=environment_of(rank, world_size=RANKS, port=port),
                output=output,
            )
            for rank, output in enumerate(self.outputs)
        ]

    def running(self) -> bool:
        """Whether all ranks are alive."""
        return all(process.poll() is None for process in self.ranks)

    def pids(self) -> list[int]:
        """Of the ranks and of their data workers."""
        found = []
        for process in self.ranks:
            found.append(process.pid)
            if psutil.pid_exists(process.pid):
                found += [child.pid for child in psutil.Process(process.pid).children()]
        return found

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float = 120.0) -> bool:
        """Wait for `condition`; false if the run ended before."""
        end = time.monotonic() + timeout_s
        while not condition():
            if not self.running():
                return False
            if time.monotonic() > end:
                self.send(signal.SIGKILL)  # else the session waits for them
                raise AssertionError("the condition never held\n" + self.said())
            time.sleep(0.01)
        return True

    def send(self, number: int, *, ranks: Sequence[int] = range(RANKS)) -> None:
        """Signal some ranks."""
        for rank in ranks:
            self.ranks[rank].send_signal(number)

    def end(self, *, timeout_s: float = 120.0) -> list[int | None]:
        """Wait until all ranks have ended; exit codes, negative for a signal."""
        end = time.monotonic() + timeout_s
        for process in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        codes = [process.poll() for process in self.ranks]
        if None in codes:
            self.send(signal.SIGKILL)
            raise AssertionError(f"exit codes {codes} after {timeout_s} s\n{self.said()}")
        return codes

    def said(self) -> str:
        """What the ranks printed."""
        return "\n".join(output.read_text()[-3000:] for output in self.outputs)


def gone(pids: Sequence[int], *, timeout_s: float = 100.0) -> bool:
    """Whether all processes end in time; data workers notice the end of their rank in seconds."""
    end = time.monotonic() + timeout_s
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _rank(rank: int, faults: Faults, arguments: list[str]) -> None:
    socket.gethostname = lambda: f"host-{rank}"  # for messages: as if on two machines
    if faults.slow_disk_s:
        _slow_down_the_disk(faults.slow_disk_s)
    if faults.slow_images_s:
        _wait_before_reads(lambda _read: faults.slow_images_s)
    if faults.stuck:  # a network file system that does not answer from the third step on
        _wait_before_reads(lambda read: 1000.0 if read == 2 * BATCH // RANKS else 0.0)
    if faults.before_save is not None:
        _call_before_saves(faults.before_save)
    if faults.quick_verdict:
        _hasten_the_verdict()
    from dinoscale import __main__

    sys.argv = ["dinoscale", *arguments]
    __main__.main()


def _hasten_the_verdict() -> None:
    """Post ten times as often, so that ten times shorter waits tell as much."""
    for name in ("POST_S", "_READS_APART_S", "_LINGER_S"):
        setattr(watchdog, name, getattr(watchdog, name) / 10)


def _slow_down_the_disk(seconds: float) -> None:
    to_disk = checksums.flush

    def flush(path: Path) -> None:
        time.sleep(seconds)
        to_disk(path)

    checksums.flush = flush


def _call_before_saves(call: Callable[[Path], None]) -> None:
    from dinoscale.checkpoint import save

    to_file = save.write_tensors

    def write_tensors(tensors: Any, path: Path, **options: Any) -> None:
        call(path)
        to_file(tensors, path, **options)

    save.write_tensors = write_tensors


def _wait_before_reads(seconds: Callable[[int], float]) -> None:
    from dinoscale.data.sources.synthetic import ShapesSource

    read, calls = ShapesSource.picture, itertools.count()

    def picture(self: ShapesSource, index: int) -> Any:
        time.sleep(seconds(next(calls)))
        return read(self, index)

    ShapesSource.picture = picture  # type: ignore[method-assign]


def steps_logged(run_dir: Path) -> int:
    """The last step in metrics.jsonl, 0 before the first."""
    return max(losses(run_dir), default=0)


def losses(run_dir: Path) -> dict[int, tuple[float, ...]]:
    """Step -> loss, teacher entropy, gradient norm, terms; a line cut off by a crash is skipped."""
    path, found = run_dir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss" in record:
            found[int(record["step"])] = tuple(
                record[name] for name in (*_NUMBERS, *_TERMS) if name in record
            )
    return found


def newest_step(run_dir: Path) -> int:
    """Of the newest checkpoint, 0 if there is none."""
    found = checkpoints(run_dir)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def same_checkpoint(first: Path, second: Path) -> bool:
    """Whether two step_* directories hold the same numbers, bit for bit."""
    one, other = Checkpoint(first), Checkpoint(second)
    files = sorted(path.name for path in first.glob("*.safetensors"))
    if files != sorted(path.name for path in second.glob("*.safetensors")):
        return False
    for name in files:
        here, there = load_file(first / name), load_file(second / name)
        if here.keys() != there.keys():
            return False
        if not all(torch.equal(here[key], there[key]) for key in here):
            return False
    counts = ("optimizer_steps", "progress", "gram_refreshes")
    return all(one.state[name] == other.state[name] for name in counts)


def run_launcher(words: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a real launcher; its output goes to `folder`/launcher.txt."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": programs, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "launcher.txt").open("ab") as output:
        return subprocess.Popen(
            words,
            env={**os.environ, **variables},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
