"""Kill a run repeatedly at random moments; its result must be that of an undisturbed run."""

import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dinoscale.checkpoint.layout import directory, leftovers
from tests.distributed.tiny_run import dinov2
from tests.faults.run_processes import (
    BATCH,
    IMAGES,
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
from tests.ports import free_port

_STEPS_PER_START = 7  # at most; a checkpoint comes every third step
_SLOW_DISK_S = 0.05  # of each file, so that a kill can fall into a save
_SLOWER_DISK_S = 0.25  # where it has to, also if a busy machine notices the save late
_STARTING_S = 1.0  # a kill at step 0 falls into the time before the first step
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node", str(RANKS), "--master-port", "PORT", "-m"],
    "deepspeed": [
        *("deepspeed", "--num_accelerators", str(RANKS), "--master_port", "PORT"),
        "--module",
    ],
}
OBJECTIVES: dict[str, Mapping[str, dict[str, Any]]] = {  # changes of the configuration
    "dino": {},
    "sinkhorn_knopp": dinov2(
        "sinkhorn_knopp",
        patch_head=True,
        train={"micro_batch_size": BATCH // RANKS // 2},
        gram={"loss_weight": 1.0, "refresh_every_steps": 4, "first_refresh_step": 5},
    ),
    "centering": dinov2("centering", patch_head=False),
    "adapters": {"lora": {"rank": 2}, "anchor": {"class_weight": 1.0}},
    "distillation": {},
    "features": {
        "distill": {"class_feature_weight": 1.0, "patch_feature_weight": 1.0},
        "dino": {"loss_weight": 0.0},
        "crops": {"num_local": 0},
    },
}
_SOURCES = {  # a run
    "adapters": ("train", "init_from"),
    "distillation": ("distill", "teacher"),
    "features": ("distill", "teacher"),
}


@dataclass(frozen=True)
class Moment:
    """When and how one start of the run is killed.

    Attributes:
        step: the kill comes after this step is logged, counted from the start.
        in_save: whether it waits until a checkpoint is being written.
        delay_s: added to that.
        target: "rank 0", "rank 1", "all", "torchrun" or "deepspeed".
        workers: data workers per rank of this start.
    """

    step: int
    in_save: bool
    delay_s: float
    target: str
    workers: int


@dataclass
class Tally:
    """Results of the kills; `in_save` counts those that left a half-written checkpoint."""

    kills: int = 0
    in_save: int = 0
    resumed: int = 0
    bit_identical: int = 0
    lost_steps: int = 0


def moments(kills: int, seed: int, *, launchers: bool = True) -> list[Moment]:
    """The same for a seed. Every third falls into a save, every fourth hits a launcher, if any."""
    chance, found = random.Random(seed), []
    for number in range(kills):
        step = (
            chance.randint(0, _STEPS_PER_START) if number else _STEPS_PER_START
        )  # first, a checkpoint
        in_save = number % 3 == 1
        longest = 0.05 if in_save else 0.15 if step else _STARTING_S
        targets = list(LAUNCHERS) if launchers and number % 4 == 3 else ["rank 0", "rank 1", "all"]
        delay_s, target = chance.uniform(0, longest), chance.choice(targets)
        found.append(Moment(step, in_save, delay_s, target, chance.choice([0, 0, 1])))
    return found


@dataclass(frozen=True)
class _Left:
    """What a start left on disk: its logged numbers, and a copy of the newest checkpoint."""

    losses: dict[int, tuple[float, ...]]
    step: int
    checkpoint: Path

    @classmethod
    def copied(cls, run_dir: Path, to: Path) -> "_Left":
        """Copy it, since the next start goes on in `run_dir`."""
        step = newest_step(run_dir)
        copy = directory(to, step)
        if step:
            shutil.copytree(directory(run_dir, step), copy)
        return cls(losses(run_dir), step, copy)

    def same_as(self, whole_dir: Path) -> bool:
        """Whether an undisturbed run that saved each step has it too, bit for bit."""
        expected = losses(whole_dir)
        return all(values == expected[at] for at, values in self.losses.items()) and (
            self.step == 0 or same_checkpoint(self.checkpoint, directory(whole_dir, self.step))
        )


def run_kills(
    folder: Path,
    *,
    kills: int,
    stage: int,
    seed: int,
    objective: str = "dino",
    launchers: bool = True,
) -> Tally:
    """Train once with `kills` interruptions and once undisturbed, and compare.

    What each kill leaves is compared with the undisturbed run: the newest checkpoint bit for bit,
    and every loss that was logged. So is what the last start leaves, which nobody disturbs; the
    undisturbed run goes as far as that.

    Raises:
        AssertionError: a process outlived its run, or a run ended by itself with an error.
    """
    epochs = 2 + 3 * kills * _STEPS_PER_START * BATCH // (2 * IMAGES)  # kills come late
    sections = OBJECTIVES[objective]
    if objective in _SOURCES:
        section, key = _SOURCES[objective]
        given = {**sections.get(section, {}), key: str(_source(folder, stage=stage))}
        sections = {**sections, section: given}
    broken = write_config(folder / "broken", stage=stage, epochs=epochs, **sections)
    tally, run_dir, left = Tally(), broken.parent / "run", list[_Left]()
    for moment in moments(kills, seed, launchers=launchers):
        _run_until(broken, moment)
        left.append(_Left.copied(run_dir, folder / f"left_{tally.kills}"))
        tally.kills += 1
        tally.in_save += bool(leftovers(run_dir))
        tally.lost_steps += max(steps_logged(run_dir) - left[-1].step, 0)
        tally.resumed += left[-1].step > 0  # by the start after this kill
    last = min(newest_step(run_dir) + _STEPS_PER_START, epochs * IMAGES // BATCH)
    assert RunProcesses(broken, f"train.stop_after_steps={last}").end() == [0] * RANKS
    result = _Left.copied(run_dir, folder / "left_at_the_end")
    furthest = max(step for each in [*left, result] for step in [each.step, *each.losses])
    all_steps = {"every_steps": 1, "keep_last": 9999}  # an orphan saves at any step
    sections = {**sections, "checkpoint": all_steps}
    whole = write_config(folder / "whole", stage=stage, epochs=epochs, **sections)
    assert RunProcesses(whole, f"train.stop_after_steps={furthest}").end() == [0] * RANKS
    tally.bit_identical = sum(each.same_as(whole.parent / "run") for each in left)
    if result.step != last or not result.same_as(whole.parent / "run"):
        tally.bit_identical = 0  # whatever held in between, the result is another
    return tally


def _source(folder: Path, *, stage: int) -> Path:
    """A run whose weights others begin with."""
    config = write_config(folder / "source", stage=stage, epochs=1)
    assert RunProcesses(config, "train.stop_after_steps=3").end() == [0] * RANKS
    return config.parent / "run"


def _run_until(config: Path, moment: Moment) -> None:
    """One start of the run, ended by a kill."""
    run_dir, overrides = config.parent / "run", [f"data.num_workers={moment.workers}"]
    begun_at, begin = newest_step(run_dir), time.time()

    def has_come() -> bool:
        metrics = run_dir / "metrics.jsonl"
        if moment.step == 0:  # one rank alone would wait for the other in vain, with no launcher
            ready = run_dir / "versions.json"
            return moment.target == "all" or (ready.exists() and ready.stat().st_mtime > begin)
        if not metrics.exists() or metrics.stat().st_mtime < begin:
            return False  # lines of the start before
        if steps_logged(run_dir) < begun_at + moment.step:
            return False
        return not moment.in_save or any(p.name.endswith(".part") for p in leftovers(run_dir))

    if moment.target in LAUNCHERS:
        _kill_launcher(config, moment, overrides, has_come)
        return
    slow_disk_s = _SLOWER_DISK_S if moment.in_save else _SLOW_DISK_S
    run = RunProcesses(config, *overrides, slow_disk_s=slow_disk_s, quick_verdict=True)
    assert run.wait_until(has_come), "the run ended by itself\n" + run.said()
    time.sleep(moment.delay_s)
    pids = run.pids()
    hit = range(RANKS) if moment.target == "all" else [int(moment.target[-1])]
    run.send(signal.SIGKILL, ranks=hit)
    codes = run.end(timeout_s=200)
    for rank, code in enumerate(codes):  # a rank that lost the other ends by itself
        assert code == (-signal.SIGKILL if rank in hit else 1), f"{codes}\n{run.said()}"
    assert gone(pids), "a process outlived its run"


def _kill_launcher(
    config: Path, moment: Moment, overrides: list[str], has_come: Callable[[], bool]
) -> None:
    port = str(free_port())
    words = [port if word == "PORT" else word for word in LAUNCHERS[moment.target]]
    launcher = run_launcher([*words, "dinoscale", "train", str(config), *overrides], config.parent)
    end = time.monotonic() + 120
    while not has_come():
        assert launcher.poll() is None, (config.parent / "launcher.txt").read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(moment.delay_s)
    pids = [child.pid for child in psutil.Process(launcher.pid).children(recursive=True)]
    launcher.kill()
    launcher.wait()
    assert gone(pids, timeout_s=100), "ranks outlived their launcher"
