"""Executors start the jobs of runs and report their ends; here as local processes."""

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
    """Starts jobs; only its result.json says whether a job succeeded."""

    retries_bad_input: bool

    def start(self, run_dir: Path) -> str:
        """Start the job of a run; return a handle that finds it after a restart."""
        ...

    def adopt(self, run_dir: Path, handle: str) -> bool:
        """Take over a job that another process started; False if it has ended."""
        ...

    def ended(self) -> list[tuple[Path, str]]:
        """The jobs that have ended since the last call, each with how it ended."""
        ...

    def close(self) -> None:
        """Let jobs that depend on this process save and end, and wait; `ended` lists them."""
        ...


@dataclass
class _Running:
    run_dir: Path
    process: subprocess.Popen[bytes]
    slot: int


class LocalExecutor:
    """Runs jobs in slots of this machine's cores and GPUs; they end with this process."""

    retries_bad_input = False

    def __init__(
        self,
        *,
        parallel: int,
        processes: int,
        gpus: Sequence[str],
        program: Sequence[str] = _JOB,
    ) -> None:
        """Prepare the slots; nothing starts yet.

        Args:
            parallel: maximum number of jobs at a time.
            processes: ranks per job.
            gpus: GPUs of this machine, as in CUDA_VISIBLE_DEVICES; enough for all slots, or none.
            program: command that does the job of the run directory given as its last argument,
                and ends soon after its standard input is closed.
        """
        self._processes, self._gpus, self._program = processes, gpus, program
        self._free_slots = list(range(parallel))
        self._threads = max(1, available_cores() // (parallel * processes))
        self._running: list[_Running] = []

    def start(self, run_dir: Path) -> str:
        """Start a job in a free slot, with its output in job.log.

        Raises:
            OSError: it cannot be started.
        """
        slot = self._free_slots[0]
        with (run_dir / LOG).open("ab") as log:
            process = subprocess.Popen(
                [*self._program, str(run_dir)],
                stdin=subprocess.PIPE,  # closed when this process ends, however it ends
                stdout=log,
                stderr=log,
                env={**os.environ, **self._variables(slot)},
                start_new_session=True,  # Ctrl-C reaches only the sweep, which lets its jobs save
            )
        self._free_slots.remove(slot)
        self._running.append(_Running(run_dir, process, slot))
        return f"process {process.pid}"

    def _variables(self, slot: int) -> dict[str, str]:
        variables = {"OMP_NUM_THREADS": str(self._threads)}
        if not self._gpus:
            return {**variables, "DS_ACCELERATOR": "cpu"}
        own = self._gpus[slot * self._processes : (slot + 1) * self._processes]
        return {**variables, "CUDA_VISIBLE_DEVICES": ",".join(own)}

    def adopt(self, run_dir: Path, handle: str) -> bool:  # noqa: ARG002  # of the Protocol
        """Never: a local job does not outlive its sweep; the next job waits while it saves."""
        return False

    def ended(self) -> list[tuple[Path, str]]:
        """The jobs that have ended; processes that they left behind are terminated."""
        found = [job for job in self._running if job.process.poll() is not None]
        for job in found:
            self._running.remove(job)
            self._free_slots.append(job.slot)
            assert job.process.stdin
            job.process.stdin.close()
            if job.process.returncode < 0:  # killed before it could end its training
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(job.process.pid, signal.SIGTERM)
        return [(job.run_dir, _ending(job.process.returncode)) for job in found]

    def close(self) -> None:
        """Let all jobs save and end."""
        for job in self._running:
            assert job.process.stdin
            job.process.stdin.close()
        for job in self._running:
            job.process.wait()


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
