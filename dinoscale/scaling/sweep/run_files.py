"""Files of a sweep in the folder of a run, beside those of the training.

job.json states what to do; only the sweep writes it. result.json states the outcome; only the job
writes it, except that the sweep clears the ending of an earlier attempt before it starts another,
so that no job is judged by an earlier ending. Both files are replaced atomically.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from dinoscale.runtime.outputs import replace_text
from dinoscale.scaling.design.planned_run import PlannedRun

RUNS = "runs"  # in the folder of a sweep; it holds a folder for each run
JOB, RESULT, SETTINGS, LOG = "job.json", "result.json", "settings.yaml", "job.log"
HEARTBEAT_S = 30.0  # interval at which a running job writes its result

Ending = Literal["", "done", "stopped", "failed", "bad input"]
Point = Mapping[str, float | None]
T = TypeVar("T", "Job", "Result")


@dataclass(frozen=True)
class Job:
    """What to do for a run, and the attempts so far.

    Attributes:
        key: key of the run, see `PlannedRun`.
        metrics: as in the sweep's file: name -> `online`, or a line of `dinoscale evaluate`.
        commands: metric with a line -> words after `dinoscale` that measure it.
        nodes: number of nodes.
        processes: ranks per node.
        failures: attempts that failed.
        forgiven: failures before the last --retry-failed, which no longer count.
        handle: the executor's handle of the last attempt; empty once its end has been handled.
        log_begin: size of job.log in bytes before the last attempt.
    """

    key: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    nodes: int = 1
    processes: int = 1
    failures: int = 0
    forgiven: int = 0
    handle: str = ""
    log_begin: int = 0


@dataclass(frozen=True)
class Result:
    """The outcome of a job so far.

    Attributes:
        key: key of the run.
        ending: how the last attempt ended; empty while it runs, or if it was killed.
        error: why it failed, else empty.
        seconds: training time, summed over all attempts.
        trained: whether the training is complete.
        metrics: measured values by name; None where not finite.
        lines: metric -> line that measured it.
        prints: metric -> fingerprint of its images and code, see `measured_on.py`.
        curves: see `Row`.
        versions: versions of libraries and code.
        events: counts of events during training, see `hooks/events.py`.
        num_images: number of images in the training set; 0 where unknown.
    """

    key: str
    ending: str = ""
    error: str = ""
    seconds: float = 0.0
    trained: bool = False
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    lines: Mapping[str, str] = field(default_factory=dict)
    curves: Sequence[Point] = field(default_factory=list)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    prints: Mapping[str, Any] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)
    num_images: int = 0

    def measured(self, metrics: Mapping[str, str]) -> bool:
        """Whether all metrics have been measured by their current lines."""
        return all(self.lines.get(name) == line for name, line in metrics.items())


def folders_of(runs: Sequence[PlannedRun], out: Path) -> dict[str, Path]:
    """Key -> folder of each run.

    A new axis changes the name of a run but not its key, whose first digits end the name: a run
    that has started keeps its folder.

    Args:
        runs: runs of the sweep.
        out: folder of the sweep.
    """
    try:
        there = {path.name for path in (out / RUNS).iterdir()}
    except FileNotFoundError:
        there = set()
    by_digits = {name.rpartition("-")[2]: name for name in sorted(there)}

    def name_of(run: PlannedRun) -> str:
        return run.name if run.name in there else by_digits.get(run.key[:8], run.name)

    return {run.key: out / RUNS / name_of(run) for run in runs}


def read_job(run_dir: Path) -> Job | None:
    """The job of a run; None where its file is missing or damaged."""
    return _read(run_dir / JOB, Job)


def read_result(run_dir: Path, key: str) -> Result:
    """The result of a run; an empty one where the file is missing, damaged, or of another run."""
    result = _read(run_dir / RESULT, Result)
    return result if result is not None and result.key == key else Result(key)


def is_alive(run_dir: Path) -> bool:
    """Whether a job, perhaps on another machine, has written its result recently."""
    try:
        return time.time() - (run_dir / RESULT).stat().st_mtime < 4 * HEARTBEAT_S
    except OSError:
        return False


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        record = kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    empty = kind("")
    valid = all(type(getattr(record, f.name)) is type(getattr(empty, f.name)) for f in fields(kind))
    return record if valid else None


def write_record(run_dir: Path, record: Job | Result) -> None:
    """Replace job.json or result.json atomically.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    name = JOB if isinstance(record, Job) else RESULT
    replace_text(run_dir / name, json.dumps(asdict(record), indent=1) + "\n")


def finite_or_none(value: Any) -> float | None:
    """A finite number from JSON; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None
