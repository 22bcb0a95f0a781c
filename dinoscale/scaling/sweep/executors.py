"""What starts the job of a run and tells when it has ended; here as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dinoscale.runtime.cores import available_cores
from dinoscale.scaling.sweep.run_files import LOG

_JOB = (sys.executable, "-m", "dinoscale.scaling.sweep.job")


class Executor(Protocol):
    """Starts jobs; whether each did what it should is told by its result.json alone."""

    retries_bad_input: bool

    def start(self, run_dir: Path) -> str:
        """Start the job of a run; what it can be found by after a restart."""
        ...

    def adopt(self, run_dir: Path, handle: str) -> bool:
        """Take over a job that another process has started; false if it has ended."""
        ...

    def ended(self) -> list[tuple[Path, str]]:
        """Jobs that have ended since the last call, and how, in words."""
        ...

    def close(self) -> None:
        """Let jobs that cannot live alone save and end, and wait for them; `ended` tells which."""
        ...


@dataclass
class _Running:
    run_dir: Path
    process: subprocess.Popen[bytes]
    place: int


class LocalExecutor:
    """Jobs that end with this process, on parts of this machine's cores and GPUs."""

    retries_bad_input = False

    def __init__(
        self,
        *,
        parallel: int,
        processes: int,
        gpus: Sequence[str],
        program: Sequence[str] = _JOB,
    ) -> None:
        """Start nothing yet.

        Args:
            parallel: jobs at a time, at most.
            processes: ranks of a job.
            gpus: of this machine, as CUDA_VISIBLE_DEVICES names them; enough for all, or none.
            program: does the job of the run directory that is its last argument, and ends soon
                after its standard input.
        """
        self._processes, self._gpus, self._program = processes, gpus, program
        self._places = list(range(parallel))
        self._threads = max(1, available_cores() // (parallel * processes))
        self._running: list[_Running] = []

    def start(self, run_dir: Path) -> str:
        """Start it in a free place, its output in job.log.

        Raises:
            OSError: it cannot be started.
        """
        place = self._places[0]
        with (run_dir / LOG).open("ab") as log:
            process = subprocess.Popen(
                [*self._program, str(run_dir)],
                stdin=subprocess.PIPE,  # which ends when this process does, however that happens
                stdout=log,
                stderr=log,
                env={**os.environ, **self._variables(place)},
                start_new_session=True,  # Ctrl-C is for the sweep, which lets its jobs save
            )
        self._places.remove(place)
        self._running.append(_Running(run_dir, process, place))
        return f"process {process.pid}"

    def _variables(self, place: int) -> dict[str, str]:
        variables = {"OMP_NUM_THREADS": str(self._threads)}
        if not self._gpus:
            return {**variables, "DS_ACCELERATOR": "cpu"}
        own = self._gpus[place * self._processes : (place + 1) * self._processes]
        return {**variables, "CUDA_VISIBLE_DEVICES": ",".join(own)}

    def adopt(self, run_dir: Path, handle: str) -> bool:  # noqa: ARG002  # of the Protocol
        """None outlives who started it; the next job waits while it saves."""
        return False

    def ended(self) -> list[tuple[Path, str]]:
        """Ended jobs; what they have left running is ended, too."""
        found = [job for job in self._running if job.process.poll() is not None]
        for job in found:
            self._running.remove(job)
            self._places.append(job.place)
            assert job.process.stdin
            job.process.stdin.close()
            if job.process.returncode < 0:  # killed, and could not end its training
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(job.process.pid, signal.SIGTERM)
        return [(job.run_dir, _in_words(job.process.returncode)) for job in found]

    def close(self) -> None:
        """Let all save and end."""
        for job in self._running:
            assert job.process.stdin
            job.process.stdin.close()
        for job in self._running:
            job.process.wait()


def _in_words(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
