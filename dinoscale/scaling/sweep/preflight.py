"""Checks of a sweep that fail within seconds, before anything starts."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch

from dinoscale.config.sweep.executor import ExecutorConfig
from dinoscale.config.sweep.file import ONLINE
from dinoscale.errors import ConfigError, DataError, DinoscaleError, UnavailableError
from dinoscale.reports.comparison.scores import NOT_RANKED
from dinoscale.runtime.locks import try_lock
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.sweep.run_files import RUNS, read_job
from dinoscale.scaling.sweep.slurm_jobs import slurm_is_missing
from dinoscale.training.feed import open_images

log = logging.getLogger(__name__)

_LOCK_WAIT_S = 3.0

EvaluationWords = Callable[[str, str], list[str]]


def lock_sweep(out: Path) -> IO[str]:
    """Create the folder of a sweep and lock it while the returned file is open.

    Raises:
        DinoscaleError: the folder cannot be written, or another process runs the sweep.
    """
    end = time.monotonic() + _LOCK_WAIT_S
    try:
        (out / RUNS).mkdir(parents=True, exist_ok=True)
        while (lock := try_lock(out / ".lock")) is None:
            if time.monotonic() > end:
                raise DinoscaleError(
                    f"out: another process runs the sweep in {out}; wait for it or stop it."
                    " `dinoscale sweep FILE status` shows its progress"
                )
            time.sleep(0.1)
    except OSError as error:
        raise DinoscaleError(f"out: cannot write to {out}: {error.strerror}") from error
    return lock


def require_own_folders(runs: Sequence[PlannedRun], folder: Callable[[PlannedRun], Path]) -> None:
    """Refuse folders that hold another run.

    Raises:
        ConfigError: a folder belongs to another run, or to two of these.
    """
    names: dict[str, str] = {}
    for run in runs:
        if names.setdefault(run.name, run.key) != run.key:
            raise ConfigError(f"{folder(run)}: two runs of the sweep share this folder")
        job = read_job(folder(run))
        if job is not None and job.key != run.key:
            raise ConfigError(
                f"{folder(run)}: holds another run, {job.key} instead of {run.key}; move it away,"
                " or set another `out` for the sweep"
            )


def measuring_commands(
    metrics: Mapping[str, str], words: EvaluationWords
) -> Callable[[Path], dict[str, list[str]]]:
    """The commands that measure the run in a folder: metric -> words after `dinoscale`.

    Args:
        metrics: see `SweepConfig`.
        words: turns a line of `dinoscale evaluate` and the weights into words; raises ConfigError
            if the line is invalid.

    Raises:
        ConfigError: a metric cannot be measured.
    """
    lines = {name: line for name, line in metrics.items() if line != ONLINE}

    def commands(run_dir: Path) -> dict[str, list[str]]:
        return {name: words(line, str(run_dir)) for name, line in lines.items()}

    for name, line in lines.items():
        try:
            task = words(line, "WEIGHTS")[1]
        except ConfigError as error:
            raise ConfigError(f"metrics.{name}: {error}") from error
        if task in NOT_RANKED:
            raise ConfigError(
                f"metrics.{name}: {task!r} measures no quality, so it cannot rank runs"
            )
    return commands


def require_machine(executor: ExecutorConfig) -> list[str]:
    """Refuse an executor that cannot work on this machine.

    Returns:
        The GPUs of this machine, as in CUDA_VISIBLE_DEVICES.

    Raises:
        ConfigError: something is missing.
    """
    if executor.kind == "slurm":
        if missing := slurm_is_missing():
            raise ConfigError(f"executor.kind: slurm needs {missing}, which this machine lacks")
        return []
    if executor.nodes > 1:
        raise ConfigError(
            f"executor.nodes: {executor.nodes} nodes need executor.kind slurm, not {executor.kind}"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    needed = executor.processes * (executor.parallel if executor.kind == "local" else 1)
    if count and needed > count:
        raise ConfigError(
            f"executor.parallel: {executor.parallel} runs of {executor.processes} processes need"
            f" {needed} GPUs, but this machine has {count}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def require_data(runs: Sequence[PlannedRun], *, elsewhere: bool) -> None:
    """Open the images of every distinct data configuration.

    Args:
        runs: runs to train.
        elsewhere: whether they train on other machines; missing images are then only a warning.

    Raises:
        DinoscaleError: the images cannot be opened, or none are named.
    """
    distinct = {json.dumps(run.config.data.model_dump(mode="json")): run for run in runs}
    for run in distinct.values():
        try:
            open_images(run.config)
        except DataError as error:  # noqa: PERF203  # opening takes longer
            if not elsewhere:
                kind = UnavailableError if isinstance(error, UnavailableError) else DataError
                raise kind(f"run {run.name}: {error}") from error
            log.warning("run %s, on this machine: %s", run.name, error)
