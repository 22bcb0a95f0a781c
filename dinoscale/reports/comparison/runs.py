"""Measurements for a comparison, one after the other; each is saved as soon as it is done."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoscale.errors import DataError, DinoscaleError
from dinoscale.evaluate.predictions import digest_of_file
from dinoscale.reports.comparison.scores import Outcome, read_report
from dinoscale.reports.html import write_file
from dinoscale.runtime.fingerprint import Fingerprint, differences

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One task on one file of weights.

    Attributes:
        weights: as given.
        network: teacher or student.
        task: its name.
        line: the task and its options, as given.
        result: file of the report; see `result_path`.
        made_from: returns the fingerprint of a report made now; None if an input is missing.
        measure: returns the report.
    """

    weights: str
    network: str
    task: str
    line: str
    result: Path
    made_from: Callable[[], Fingerprint | None]
    measure: Callable[[], dict[str, object] | None]


def result_path(folder: Path, weights: str, words: Sequence[str]) -> Path:
    """File of the result of a task; its name depends on the options and the weights.

    Weights count as changed if the size or time of one of their files has changed. The rest of the
    fingerprint is compared before a saved result is used again.

    Args:
        folder: of all results.
        weights: file or folder.
        words: the task and its options.
    """
    path = Path(weights).absolute()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamps = [
        (str(file), found.st_size, found.st_mtime_ns)
        for file in files
        if file.is_file()
        for found in [file.stat()]
    ]
    key = hashlib.sha256(json.dumps([str(path), stamps, *words]).encode()).hexdigest()[:12]
    return folder / f"{re.sub(r'[^0-9A-Za-z._-]+', '_', path.name)[-60:]}-{words[0]}-{key}.json"


def measure_all(jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Run the jobs that have no valid result; a task that fails leaves an error, others go on.

    Raises:
        ConfigError: a result cannot be written.
    """
    for number, job in enumerate(jobs):
        where = f"{number + 1} of {len(jobs)}: {job.line}, {job.weights}"
        report, error = _saved(job, where), ""
        if report is not None:
            log.info("%s: already measured, see %s", where, job.result)
        else:
            log.info("%s", where)
            report, error = _measure(job)
        yield Outcome(job.weights, job.network, job.task, job.line, report, error)


def _saved(job: Job, where: str) -> dict[str, object] | None:
    """The report of an earlier run, if its fingerprint and its predictions are unchanged."""
    if not job.result.exists():
        return None
    try:
        report = read_report(job.result)
        now = job.made_from()
    except DataError as error:
        log.warning("%s Measuring again.", error)
        return None
    changed = differences(report.get("made_from"), now or {})
    kept = report.get("predictions")
    if isinstance(kept, str) and digest_of_file(Path(kept)) != report.get("predictions_sha256"):
        changed = [*changed, "predictions"]
    if changed:
        log.warning("%s: measuring again, these changed: %s", where, ", ".join(changed))
    return None if changed else report


def _measure(job: Job) -> tuple[dict[str, object] | None, str]:
    """The report, or the error."""
    from dinoscale.evaluate.finished_items import forget  # loads torch, as the task does

    try:
        report = job.measure()
    except DinoscaleError as error:
        log.error("%s: %s", job.line, error)
        return None, str(error)
    except Exception as error:  # a bug or lack of memory must not stop the other tasks
        log.exception("%s failed; this is a bug, or lack of memory", job.line)
        return None, f"{type(error).__name__}: {error}"
    assert report is not None  # one process
    write_file(job.result, f"{json.dumps(report)}\n".encode())
    forget(report)
    return read_report(job.result), ""
