"""Jobs that submitit submits to Slurm, or runs on this machine in its local mode."""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import psutil
import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from dinoscale.config.sweep.executor import ExecutorConfig
from dinoscale.scaling.sweep.job import JobAttempt, training_command, warning_blocked

log = logging.getLogger(__name__)

_FOLDER = "submitit"
_WARNING_S = 180  # before the time limit of a job, as in launchers/slurm.sbatch
_REQUEUES = 10_000  # in effect unlimited
_POLL_S = {"slurm": 10.0, "local": 0.5}

Alive = Callable[[Collection[str]], set[str]]


class SubmittedJob:
    """The job of a run on one of its nodes; the first node measures, the others only train."""

    def __init__(self, run_dir: str) -> None:
        """`run_dir` lies on a file system that all nodes share."""
        self._run_dir = run_dir
        self._attempt: JobAttempt | None = None

    def __call__(self) -> None:
        """Do the job; result.json records how it ended."""
        if "DS_ACCELERATOR" not in os.environ and not _has_gpu():
            os.environ["DS_ACCELERATOR"] = "cpu"
        attempt = JobAttempt(Path(self._run_dir))
        if submitit.JobEnvironment().global_rank == 0:
            self._attempt = attempt
            attempt.run()
        else:
            with warning_blocked():
                training = subprocess.Popen(
                    training_command(attempt.job, attempt.run_dir, os.environ)
                )
            training.wait()

    def checkpoint(self) -> DelayedSubmission:
        """Save and resubmit; submitit calls it shortly before the time limit."""
        if self._attempt is not None:
            self._attempt.stop_now()
        return DelayedSubmission(SubmittedJob(self._run_dir))


def _has_gpu() -> bool:
    import torch  # here, as it is that of the node the job runs on

    return torch.cuda.is_available()


class SubmititExecutor:
    """Submits one job per run; jobs outlive the sweep process."""

    retries_bad_input = True  # another node may have the data

    def __init__(self, config: ExecutorConfig, out: Path) -> None:
        """Prepare the executor; nothing is submitted yet.

        Raises:
            ValueError: submitit refuses an option.
        """
        self._cluster = "slurm" if config.kind == "slurm" else "local"
        self._executor: Any = submitit.AutoExecutor(
            folder=out / _FOLDER / "%j",
            cluster=self._cluster,
            **{f"{self._cluster}_max_num_timeout": _REQUEUES},
        )
        self._executor.update_parameters(**_parameters(config))
        self._alive: Alive = _in_queue if self._cluster == "slurm" else _processes
        self._running: dict[str, Path] = {}
        self._polled_at = 0.0

    def start(self, run_dir: Path) -> str:
        """Submit a job; return its number.

        Raises:
            OSError: it could not be submitted.
        """
        try:
            job = self._executor.submit(SubmittedJob(str(run_dir)))
        except (FailedJobError, FailedSubmissionError) as error:
            raise OSError(f"sbatch refused the job: {error}") from error
        self._running[job.job_id] = run_dir
        return str(job.job_id)

    def adopt(self, run_dir: Path, handle: str) -> bool:
        """Take over a job that is queued or running."""
        if handle not in self._alive({handle}):
            return False
        self._running[handle] = run_dir
        return True

    def ended(self) -> list[tuple[Path, str]]:
        """The jobs that have left the queue, which is polled every ten seconds."""
        if not self._running or time.monotonic() - self._polled_at < _POLL_S[self._cluster]:
            return []
        self._polled_at = time.monotonic()
        gone = set(self._running) - self._alive(self._running)
        return [
            (self._running.pop(job), f"job {job} (see {_FOLDER}/{job})") for job in sorted(gone)
        ]

    def close(self) -> None:
        """Leave all jobs queued or running."""


def _parameters(config: ExecutorConfig) -> dict[str, Any]:
    """Parameters of submitit's AutoExecutor: one task per node, which starts its ranks."""
    slurm = config.slurm
    minutes = math.ceil(slurm.hours * 60)
    if config.kind != "slurm":
        return {"timeout_min": minutes, "gpus_per_node": config.processes if _has_gpu() else 0}
    # Options in submitit's spelling override its other parameters.
    options = {name.replace("-", "_"): value for name, value in slurm.options.items()}
    cpus = options.get("cpus_per_task", slurm.cpus_per_process * config.processes)
    parameters = {
        "timeout_min": minutes,
        "name": "dinoscale",
        "nodes": config.nodes,
        "tasks_per_node": 1,
        "gpus_per_node": config.processes,
        "slurm_partition": slurm.partition,
        "slurm_account": slurm.account,
        "slurm_signal_delay_s": _WARNING_S,
        "slurm_setup": list(slurm.setup) or None,
        "slurm_srun_args": [
            f"--cpus-per-task={cpus}"
        ],  # not inherited from sbatch since Slurm 22.05
    }
    additional = {"requeue": True, **options, "cpus_per_task": cpus}
    return {**parameters, "slurm_additional_parameters": additional}


def _in_queue(jobs: Collection[str]) -> set[str]:
    """The jobs that are queued or running; all of them while Slurm does not answer."""
    command = ["squeue", "--noheader", "--format=%A", "--user", str(os.getuid())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("squeue failed, so all jobs are assumed to be running: %s", error)
        return set(jobs)
    return set(jobs) & set(done.stdout.split())


def _processes(jobs: Collection[str]) -> set[str]:
    """The jobs whose process is alive on this machine."""
    return {job for job in jobs if job.isdecimal() and _is_submitit(int(job))}


def _is_submitit(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        alive = process.status() != psutil.STATUS_ZOMBIE
        return alive and any("submitit" in word for word in process.cmdline())
    except psutil.Error:
        return False


def slurm_is_missing() -> str:
    """The first missing program of Slurm; empty if there is none."""
    programs = ("sbatch", "srun", "squeue")
    return next((name for name in programs if shutil.which(name) is None), "")
