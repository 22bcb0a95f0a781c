"""The job of one run, `python -m dinoscale.scaling.sweep.job RUN_DIR`: train, then measure.

It trains through the launchers, in a process of its own, and continues from what an earlier attempt
left. It saves and ends when its standard input closes, so it never outlives its parent.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from dinoscale.checkpoint.layout import checkpoints
from dinoscale.cluster.launch.commands import by_torchrun
from dinoscale.config.sweep.file import ONLINE
from dinoscale.errors import DinoscaleError, PreemptedError, RunFailedError
from dinoscale.runtime import logs
from dinoscale.runtime.launcher_env import first_host, on_this_node
from dinoscale.runtime.locks import try_lock
from dinoscale.runtime.versions import versions
from dinoscale.scaling.sweep.measured_on import changed_input, measurement_fingerprint
from dinoscale.scaling.sweep.run_files import (
    HEARTBEAT_S,
    LOG,
    SETTINGS,
    Ending,
    Job,
    read_job,
    read_result,
    write_record,
)
from dinoscale.scaling.sweep.run_logs import (
    METRICS,
    images_of,
    last_error,
    online_metric,
    read_points,
    thin,
)
from dinoscale.training.hooks.events import count_events

log = logging.getLogger(__name__)

_POLL_S = 0.1
_JOB_LOCK, _TRAINING_LOCK = ".job.lock", ".lock"
# SIGTERM may kill a launcher while its ranks still save.
_STOPPED = (PreemptedError.exit_code, -signal.SIGTERM, 128 + signal.SIGTERM)
_EXIT_CODES: dict[Ending, int] = {"done": 0, "failed": 1, "bad input": 2, "stopped": 75}


class JobAttempt:
    """One attempt at a job."""

    def __init__(self, run_dir: Path) -> None:
        """`run_dir` holds job.json and settings.yaml."""
        job = read_job(run_dir)
        if job is None:
            raise DinoscaleError(f"{run_dir}: has no job.json of a sweep")
        self.run_dir, self.job = run_dir, job
        self.stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> Ending:
        """Do what is left of the job; return how it ended, which result.json records as well.

        Raises:
            OSError: the folder cannot be written.
        """
        try:
            with self._exclusive(), (self.run_dir / LOG).open("ab") as output:
                self._result = read_result(self.run_dir, self.job.key)
                self._update(ending="", error="")
                ending, error = self._run(output)
                self._update(ending=ending, error=error)
        except PreemptedError:  # before it started
            return "stopped"
        return ending

    def stop_now(self) -> None:
        """Let the training save and end, and record it; for a signal handler."""
        self.stop.set()
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            self._child.wait()
            self._wait_for_ranks()
        self._update(ending="stopped")

    def _run(self, output: IO[bytes]) -> tuple[Ending, str]:
        try:
            if not (self._result.trained and checkpoints(self.run_dir)):
                self._train(output)
            self._measure(output)
        except PreemptedError:
            return "stopped", ""
        except DinoscaleError as error:
            bad_input = error.exit_code == DinoscaleError.exit_code
            return "bad input" if bad_input else "failed", str(error)
        return "done", ""

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Wait for a job of the same run whose sweep was killed, while it saves and ends."""
        with self._lock(_JOB_LOCK):
            yield

    def _lock(self, name: str) -> IO[str]:
        while (lock := try_lock(self.run_dir / name)) is None:
            self._pause()
        return lock

    def _wait_for_ranks(self) -> None:
        """Wait for ranks that still save after their launcher has ended."""
        while (lock := try_lock(self.run_dir / _TRAINING_LOCK)) is None:
            time.sleep(_POLL_S)
        lock.close()

    def _pause(self) -> None:
        if self.stop.is_set():
            raise PreemptedError("asked to stop")
        time.sleep(_POLL_S)

    def _update(self, **changes: object) -> None:
        self._result = replace(self._result, **changes)  # type: ignore[arg-type]
        write_record(self.run_dir, self._result)

    def _train(self, output: IO[bytes]) -> None:
        """Complete the training, or raise a DinoscaleError."""
        self._lock(_TRAINING_LOCK).close()  # held by ranks whose job was killed
        preempted = count_events(self.run_dir).get("preempted", 0)
        command = training_command(self.job, self.run_dir, os.environ)
        code, error = self._call(command, output, output, trains=True)
        self._wait_for_ranks()
        if code == 0:
            curves = thin(read_points(self.run_dir / METRICS))
            self._update(
                trained=True,
                curves=curves,
                versions=versions(),
                events=count_events(self.run_dir),
                num_images=images_of(self.run_dir),
            )
        elif code in _STOPPED or count_events(self.run_dir).get("preempted", 0) > preempted:
            raise PreemptedError("the training was asked to stop, and saved")
        else:
            raise _failure(code, error)

    def _measure(self, output: IO[bytes]) -> None:
        """Measure each missing metric; if one fails, the others are measured all the same."""
        failures: list[DinoscaleError] = []
        for name, line in self.job.metrics.items():
            now = measurement_fingerprint(line, self.job.commands.get(name, ()))
            if self._result.lines.get(name) == line and not changed_input(
                self._result.prints.get(name), now
            ):
                continue
            try:
                value = self._value(name, line, output)
            except PreemptedError:
                raise
            except DinoscaleError as error:
                failures.append(type(error)(f"metric {name}: {error}"))
                continue
            metrics, lines, prints = self._result.metrics, self._result.lines, self._result.prints
            self._update(
                metrics={**metrics, name: value},
                lines={**lines, name: line},
                prints={**prints, name: now},
            )
        if failures:
            raise failures[0]

    def _value(self, name: str, line: str, output: IO[bytes]) -> float | None:
        if line == ONLINE:
            return online_metric(read_points(self.run_dir / METRICS), name)
        command = [sys.executable, "-m", "dinoscale", *self.job.commands[name]]
        report = self.run_dir / ".report.part"
        with report.open("wb") as file:
            code, error = self._call(command, file, output, trains=False)
        if code:
            raise _failure(code, error)
        text = report.read_text(errors="replace")
        report.unlink()
        return headline_error(text)

    def _call(
        self, command: Sequence[str], stdout: IO[bytes], stderr: IO[bytes], *, trains: bool
    ) -> tuple[int, str]:
        """Run a program to its end; return its exit code and the last error that it printed.

        Raises:
            PreemptedError: the job was asked to stop, and the program has ended.
        """
        self._pause()
        start, before, beat = time.monotonic(), self._result.seconds, time.monotonic()
        log_start = stderr.seek(0, os.SEEK_END)
        log.info("%s", " ".join(command))
        with warning_blocked():
            self._child = child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=_environment(os.environ, trains=trains),
            )
        asked = False
        try:
            while child.poll() is None:
                if self.stop.is_set() and not asked:
                    child.terminate()
                    asked = True
                if time.monotonic() - beat > HEARTBEAT_S:
                    beat = time.monotonic()
                    self._update(seconds=before + (beat - start) * trains)
                time.sleep(_POLL_S)
        finally:
            if child.poll() is None:  # the folder is no longer writable
                child.terminate()
                child.wait()
        self._update(seconds=before + (time.monotonic() - start) * trains)
        if asked and child.returncode:
            self._wait_for_ranks()
            raise PreemptedError("asked to stop")
        return child.returncode, last_error(self.run_dir / LOG, log_start)


def training_command(job: Job, run_dir: Path, environ: Mapping[str, str]) -> list[str]:
    """The command line that trains on this node.

    One process needs no launcher. Several processes on one node use DeepSpeed's launcher; on
    several nodes each starts torchrun, with its rank taken from Slurm's variables.
    """
    training = ["train", str(run_dir / SETTINGS)]
    if job.nodes > 1:
        return by_torchrun(
            training,
            nodes=job.nodes,
            node_rank=int(environ["SLURM_NODEID"]),
            per_node=job.processes,
            address=first_host(environ["SLURM_JOB_NODELIST"]),
            port=20000 + int(environ["SLURM_JOB_ID"]) % 20000,
            options=(),
        )
    if job.processes == 1:
        return [sys.executable, "-m", "dinoscale", *training]
    from dinoscale.runtime.distributed import (
        free_port,  # with torch, which one process can do without
    )

    return on_this_node(training, processes=job.processes, port=free_port(), environ=environ)


def headline_error(text: str) -> float | None:
    """1 - the headline score of a report printed by `dinoscale evaluate`.

    Raises:
        RunFailedError: the report has no score.
    """
    try:
        score = json.loads(text.strip().splitlines()[-1])["score"]
        headline = float(next(iter(score.values())))
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        raise RunFailedError(f"the task printed no score; it ended with {text[-200:]!r}") from None
    return 1 - headline / 100 if abs(headline) < float("inf") else None


def _failure(code: int, error: str) -> DinoscaleError:
    if code == DinoscaleError.exit_code:
        return DinoscaleError(error)
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps out of memory" if code == -signal.SIGKILL else ""
        return RunFailedError(f"killed by {name}{hint}; last output: {error}")
    return RunFailedError(error)


def _environment(environ: Mapping[str, str], *, trains: bool) -> dict[str, str]:
    """The environment of a program; measuring takes one process, so it sees no Slurm tasks."""
    return {
        name: value for name, value in environ.items() if trains or not name.startswith("SLURM_")
    }


@contextmanager
def warning_blocked() -> Iterator[None]:
    """Block SIGUSR2 for programs started within; Slurm warns submitit by it of the time limit.

    Slurm sends it to all processes of a job, and it would kill those without a handler.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main() -> None:
    """Do the job of a run; exit codes are those of `dinoscale train`."""
    logs.shield_terminal()
    logging.basicConfig(level=logging.INFO, format="job %(asctime)s %(message)s")
    try:
        attempt = JobAttempt(Path(sys.argv[1]))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: attempt.stop.set())
        threading.Thread(target=_stop_at_end_of_input, args=(attempt.stop,), daemon=True).start()
        ending = attempt.run()
    except (OSError, DinoscaleError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(_EXIT_CODES[ending])


def _stop_at_end_of_input(stop: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    stop.set()


if __name__ == "__main__":
    main()
