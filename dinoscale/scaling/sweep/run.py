"""Run a sweep: start the runs that have not ended, collect results, survive interruptions.

A run is done when its row is in the table, whatever becomes of its folder. Until then its folder
states what is left to do, so that a sweep killed at any moment continues when started again.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dinoscale.checkpoint.layout import checkpoints
from dinoscale.config import dump_config
from dinoscale.config.sweep.executor import ExecutorConfig
from dinoscale.errors import DataError, DinoscaleError, PreemptedError, RunFailedError
from dinoscale.runtime.outputs import replace_text
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.sweep.executors import Executor, LocalExecutor
from dinoscale.scaling.sweep.preflight import (
    EvaluationWords,
    lock_sweep,
    measuring_commands,
    require_data,
    require_machine,
    require_own_folders,
)
from dinoscale.scaling.sweep.reuse import with_known_keys
from dinoscale.scaling.sweep.run_files import (
    LOG,
    SETTINGS,
    Job,
    Result,
    folders_of,
    read_job,
    read_result,
    write_record,
)
from dinoscale.scaling.sweep.run_logs import last_error
from dinoscale.scaling.sweep.table import TABLE, Row, append_row, read_table
from dinoscale.scaling.sweep.table_row import row_of
from dinoscale.scaling.sweep.work_list import describe_work, to_measure

log = logging.getLogger(__name__)

_POLL_S = 0.2
_REFRESH_S = 5.0


def run_sweep(
    runs: Sequence[PlannedRun],
    *,
    out: Path,
    metrics: Mapping[str, str],
    executor: ExecutorConfig,
    retry_failed: bool,
    evaluation_words: EvaluationWords,
) -> dict[str, Any]:
    """Run everything that has not ended and write the table.

    Args:
        runs: runs of the sweep.
        out: folder of the sweep.
        metrics: metrics to measure for each run, see `SweepConfig`.
        executor: where to run, and how many runs at a time.
        retry_failed: whether to start runs again that have used up their retries.
        evaluation_words: turns a line of `dinoscale evaluate` and the weights into the words after
            `dinoscale`; raises ConfigError if the line is invalid.

    Returns:
        JSON-able: numbers of runs done, failed and left, and the path of the table.

    Raises:
        DinoscaleError: nothing could be started, or another process runs the sweep.
        RunFailedError: some runs failed; the others are done.
        PreemptedError: asked to stop; running jobs have saved or continue in the queue.
    """
    start, out = time.monotonic(), out.absolute()
    with lock_sweep(out):
        commands = measuring_commands(metrics, evaluation_words)
        gpus = require_machine(executor)
        table = out / TABLE
        runs = with_known_keys(runs, read_table(table) if table.exists() else [], out)
        sweep = Sweep(runs, out, metrics, commands, executor, retry_failed=retry_failed)
        pending = {run.key for run in sweep.pending}
        for sentence in describe_work(runs, sweep.rows, pending, sweep.to_measure, sweep.folder):
            log.info("%s", sentence)
        require_data(sweep.untrained(), elsewhere=executor.kind == "slurm")
        sweep.run_all(_executor(executor, out, gpus))
    rows = [sweep.rows[run.key] for run in runs if run.key in sweep.rows]
    failed = [row for row in rows if row.error]
    if failed:
        raise RunFailedError(_failures(failed, len(runs), folders_of(runs, out)))
    return {
        "done": len(rows),
        "failed": 0,
        "left": len(runs) - len(rows),
        "seconds": round(time.monotonic() - start, 1),
        "table": str(out / TABLE),
    }


def _executor(config: ExecutorConfig, out: Path, gpus: Sequence[str]) -> Executor:
    if config.kind == "local":
        return LocalExecutor(parallel=config.parallel, processes=config.processes, gpus=gpus)
    from dinoscale.scaling.sweep.slurm_jobs import SubmititExecutor  # loads submitit

    try:
        return SubmititExecutor(config, out)
    except ValueError as error:
        raise DinoscaleError(f"executor.slurm: {error}") from error


def _failures(failed: Sequence[Row], number: int, folders: Mapping[str, Path]) -> str:
    lines = [f"{len(failed)} of {number} runs failed; --retry-failed retries them"]
    lines += [f"  {row.name}: {row.error} ({folders[row.key] / LOG})" for row in failed]
    return "\n".join(lines)


@dataclass
class Sweep:
    """The state of each run; the only writer of the table and of job.json."""

    runs: Sequence[PlannedRun]
    out: Path
    metrics: Mapping[str, str]
    commands: Callable[[Path], Mapping[str, Sequence[str]]]
    config: ExecutorConfig
    retry_failed: bool

    def __post_init__(self) -> None:
        """Read the table and find the runs with work left.

        Raises:
            DinoscaleError: the table cannot be read, or a folder holds another run.
        """
        table = self.out / TABLE
        rows = read_table(table) if table.exists() else []
        self.rows = {row.key: row for row in rows}
        self.waiting: deque[PlannedRun] = deque()
        self.running: dict[Path, PlannedRun] = {}
        self.last: Row | None = None  # the run that ended last
        self._folders = folders_of(self.runs, self.out)
        self.pending = [run for run in self.runs if self._is_pending(run)]
        require_own_folders(self.pending, self.folder)

    def folder(self, run: PlannedRun) -> Path:
        """The folder of a run."""
        return self._folders[run.key]

    def untrained(self) -> list[PlannedRun]:
        """Pending runs whose training is not known to be complete."""
        return [run for run in self.pending if not read_result(self.folder(run), run.key).trained]

    def _is_pending(self, run: PlannedRun) -> bool:
        """Whether a run has work left."""
        row = self.rows.get(run.key)
        if row is None:
            return True
        if row.error and self.retry_failed:
            return True
        if row.status == "failed":
            return False
        return bool(self.to_measure(run, row)) and bool(checkpoints(self.folder(run)))

    def to_measure(self, run: PlannedRun, row: Row) -> dict[str, str]:
        """The metrics to measure for a completed run, with the reasons."""
        folder = self.folder(run)
        return to_measure(row, read_result(folder, run.key), self.metrics, self.commands(folder))

    def run_all(self, executor: Executor) -> None:
        """Run everything that is pending.

        Raises:
            DinoscaleError: a file cannot be written or a job not started; jobs have saved.
            PreemptedError: asked to stop.
        """
        self.executor = executor
        ended, total = len(self.runs) - len(self.pending), len(self.runs)
        bar = tqdm(
            total=total, initial=ended, unit="run", disable=None
        )  # elsewhere, lines are enough
        with logging_redirect_tqdm(), bar as self.bar, _stop_signals() as stop:
            try:
                for run in self.pending:
                    self._recover(run)
                refreshed = time.monotonic()
                while (self.waiting or self.running) and not stop:
                    while self.waiting and len(self.running) < self.config.parallel:
                        self._start(self.waiting.popleft())
                    self._poll()
                    if time.monotonic() - refreshed > _REFRESH_S:  # keeps its clock running
                        self.bar.refresh()
                        refreshed = time.monotonic()
                    time.sleep(_POLL_S)
            finally:
                executor.close()
            if stop:
                self._poll()
                raise PreemptedError(self._stop_message(stop[0]))

    def _stop_message(self, reason: str) -> str:
        ended = len(self.runs) - len(self.waiting) - len(self.running)
        text = f"asked to stop ({reason}): {ended} of {len(self.runs)} runs have ended"
        if self.running:
            text += f", jobs that continue by themselves: {len(self.running)}"
        return f"{text}; the same command resumes from there"

    def _recover(self, run: PlannedRun) -> None:
        """Determine what became of a run while no sweep was watching."""
        folder = self.folder(run)
        job = read_job(folder)
        if job is not None and self.retry_failed and run.key in self.rows:
            job = replace(job, forgiven=job.failures)
            self._write(folder, job)
        result = read_result(folder, run.key)
        if job is not None and job.handle and self.executor.adopt(folder, job.handle):
            self.running[folder] = run
        elif job is not None and (job.handle or self._is_complete(result, run)):
            self._finish_job(run, job, result)
        else:
            self.waiting.append(run)

    def _start(self, run: PlannedRun) -> None:
        folder = self.folder(run)
        old = read_job(folder) or Job(run.key)
        config = run.config.model_copy(update={"run_dir": str(folder), "resume": True})
        job = replace(
            old,
            metrics=dict(self.metrics),
            commands=self.commands(folder),
            nodes=self.config.nodes,
            processes=self.config.processes,
            log_begin=_size(folder / LOG),
        )
        result = read_result(folder, run.key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if result.ending:  # of an earlier attempt, which says nothing about this one
                write_record(folder, replace(result, ending="", error=""))
            replace_text(folder / SETTINGS, dump_config(config))
            self._write(folder, job)
            handle = self.executor.start(folder)
        except OSError as error:
            raise DinoscaleError(f"{folder}: the job cannot be started ({error})") from error
        self.running[folder] = run
        self._write(folder, replace(job, handle=handle))
        log.info("%s: started as %s", run.name, handle)
        self._show()

    def _write(self, folder: Path, job: Job) -> None:
        try:
            write_record(folder, job)
        except OSError as error:
            raise DataError(f"{folder}: cannot be written ({error.strerror})") from error

    def _poll(self) -> None:
        for folder, how in self.executor.ended():
            run = self.running.pop(folder)
            job = read_job(folder)
            if job is None:  # its folder was deleted
                log.warning("%s: its folder is gone; it starts from scratch", run.name)
                self.waiting.append(run)
            else:
                self._finish_job(run, job, read_result(folder, run.key), how)

    def _finish_job(self, run: PlannedRun, job: Job, result: Result, how: str = "") -> None:
        """Decide what follows the end of a job.

        Args:
            run: run of the job.
            job: its job.json.
            result: its result.json.
            how: how it ended; empty if no sweep was watching.
        """
        folder = self.folder(run)
        if self._is_complete(result):
            self._append(self._row(run, job, result))
            self._write(folder, replace(job, handle=""))
        elif result.ending in ("done", "stopped") or not (result.ending or how):
            self._write(folder, replace(job, handle=""))
            self.waiting.append(run)
        else:
            output = (
                last_error(folder / LOG, job.log_begin) or last_error(folder / LOG, 0) or "none"
            )
            error = result.error or f"its job ended with {how}; last output: {output}"
            job = replace(job, handle="", failures=job.failures + 1)
            self._failed(run, job, result, error)

    def _is_complete(self, result: Result, run: PlannedRun | None = None) -> bool:
        """Whether no work is left by the result and, if a run is given, by its row."""
        row = None if run is None else self.rows.get(run.key)
        stale = run is not None and row is not None and bool(self.to_measure(run, row))
        return result.trained and result.measured(self.metrics) and not stale

    def _row(self, run: PlannedRun, job: Job, result: Result, error: str = "") -> Row:
        """A row that keeps those metrics of the run's older row that are no longer measured."""
        row = self.rows.get(run.key)
        known = {**dict.fromkeys(self.metrics), **(row.metrics if row else {}), **result.metrics}
        return row_of(
            run,
            job,
            result,
            metrics=known,
            lines={**(row.lines if row else {}), **result.lines},
            prints={**(row.prints if row else {}), **result.prints},
            error=error,
        )

    def _failed(self, run: PlannedRun, job: Job, result: Result, error: str) -> None:
        failures = job.failures - job.forgiven
        hopeless = result.ending == "bad input" and not self.executor.retries_bad_input
        if failures <= self.config.retries and not hopeless:
            log.warning("%s: failed and will be retried: %s", run.name, error)
            self.waiting.append(run)
        else:
            log.error("%s: failed: %s (%s)", run.name, error, self.folder(run) / LOG)
            self._append(self._row(run, job, result, error))
        self._write(self.folder(run), job)

    def _append(self, row: Row) -> None:
        append_row(self.out / TABLE, row)
        self.rows[row.key] = self.last = row
        self.bar.update()
        if not row.error:
            log.info("%s: done, %s", row.name, _numbers(row))
        self._show()

    def _show(self) -> None:
        failed = sum(bool(row.error) for row in self.rows.values())
        parts = [f"{len(self.running)} running"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"last {self.last.name} {_numbers(self.last)}"] if self.last else []
        self.bar.set_postfix_str(", ".join(parts))


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _numbers(row: Row) -> str:
    known = {name: value for name, value in row.metrics.items() if value is not None}
    return " ".join(f"{name} {value:.4g}" for name, value in known.items()) or "no metric"


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """A list that receives the name of the first stop signal; a second signal ends at once."""
    asked: list[str] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def remember(number: int, _frame: object) -> None:
        asked.append(signal.Signals(number).name)
        for each in numbers:
            signal.signal(each, before[each])

    for number in numbers:
        signal.signal(number, remember)
    try:
        yield asked
    finally:
        for number in numbers:
            signal.signal(number, before[number])
