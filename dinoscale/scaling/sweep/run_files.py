"""What is kept in the folder of a run besides the training's own files.

job.json says what to do and is written by the sweep alone, result.json says what came of it and is
written by the job alone: the sweep only takes the ending of an earlier start out of it before
another, so that no job is judged by what one before it left. Both are replaced as a whole or not at
all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from dinoscale.scaling.design.planned_run import PlannedRun

RUNS = "runs"  # in the folder of a sweep; a folder for each run
JOB, RESULT, SETTINGS, LOG = "job.json", "result.json", "settings.yaml", "job.log"
HEARTBEAT_S = 30.0  # between two times that a running job writes its result

Ending = Literal["", "done", "stopped", "failed", "bad input"]
Point = Mapping[str, float | None]
T = TypeVar("T", "Job", "Result")


@dataclass(frozen=True)
class Job:
    """What to do for a run, and what was tried.

    Attributes:
        key: of the run, see `PlannedRun`.
        metrics: as in the sweep's file: name -> `online`, or a line of `dinoscale evaluate`.
        commands: what follows `dinoscale` to measure those that have a line, by name.
        nodes: of the run.
        processes: ranks on each of them.
        failures: starts that failed.
        forgiven: those of them that count no longer.
        handle: what the executor knows the last start by; empty when that has been dealt with.
        log_begin: bytes of job.log before that start.
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
    """What came of a job so far.

    Attributes:
        key: of the run.
        ending: of its last start; empty while that lives, or if it was killed.
        error: why it failed, else empty.
        seconds: of training, all starts together.
        trained: the training is complete.
        metrics: what was measured, by name; None where it is not finite.
        lines: by which line.
        prints: on which images and by which code, as `measure.print_of` tells it.
        curves: see `Row`.
        versions: of libraries and code.
        events: how often what happened in the training, see `hooks/events.py`.
        num_images: different images that it had; 0 where it does not say.
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
        """Whether all metrics are there, each by the line that it has now."""
        return all(self.lines.get(name) == line for name, line in metrics.items())


def folders_of(runs: Sequence[PlannedRun], out: Path) -> dict[str, Path]:
    """The folder of each run by its key.

    A new axis gives a run another name and leaves it its key, whose first digits end the name: a
    run that has begun keeps the folder it has.

    Args:
        runs: of the sweep.
        out: its folder.
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
    """The job of a run; None where there is none, or its file is damaged."""
    return _read(run_dir / JOB, Job)


def read_result(run_dir: Path, key: str) -> Result:
    """What came of a run so far; nothing where the file is missing, damaged, or of another run."""
    result = _read(run_dir / RESULT, Result)
    return result if result is not None and result.key == key else Result(key)


def lives(run_dir: Path) -> bool:
    """Whether a job has written its result lately; others may do so on other machines."""
    try:
        return time.time() - (run_dir / RESULT).stat().st_mtime < 4 * HEARTBEAT_S
    except OSError:
        return False


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        record = kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    plain = kind("")
    alike = all(type(getattr(record, f.name)) is type(getattr(plain, f.name)) for f in fields(kind))
    return record if alike else None


def write_record(run_dir: Path, record: Job | Result) -> None:
    """Replace job.json or result.json.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    name = JOB if isinstance(record, Job) else RESULT
    write_whole(run_dir / name, json.dumps(asdict(record), indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Replace a file as a whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def finite_or_none(value: Any) -> float | None:
    """A number of JSON, None for null and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None
