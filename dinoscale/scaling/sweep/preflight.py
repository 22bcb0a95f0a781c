"""What would fail in seconds fails before anything starts."""

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
    """Make the folder of a sweep and keep others out of it while the result is open.

    Raises:
        DinoscaleError: it cannot be written, or another process runs the sweep.
    """
    end = time.monotonic() + _LOCK_WAIT_S
    try:
        (out / RUNS).mkdir(parents=True, exist_ok=True)
        while (lock := try_lock(out / ".lock")) is None:
            if time.monotonic() > end:
                raise DinoscaleError(
                    f"out: another process runs the sweep in {out}; wait for it or end it."
                    " `dinoscale sweep FILE status` tells how far it is"
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
            raise ConfigError(f"{folder(run)}: two runs of the sweep have this folder")
        job = read_job(folder(run))
        if job is not None and job.key != run.key:
            raise ConfigError(
                f"{folder(run)}: holds another run, {job.key}, and not {run.key}; move it away, or"
                " give the sweep another `out`"
            )


def measuring_commands(
    metrics: Mapping[str, str], words: EvaluationWords
) -> Callable[[Path], dict[str, list[str]]]:
    """How to measure a run in a folder: the words after `dinoscale`, by name of the metric.

    Args:
        metrics: see `SweepConfig`.
        words: of a line of `dinoscale evaluate` and the weights; ConfigError if it is wrong.

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
            raise ConfigError(f"metrics.{name}: the number of {task!r} is neither good nor bad")
    return commands


def require_machine(executor: ExecutorConfig) -> list[str]:
    """Refuse an executor that cannot work here.

    Returns:
        This machine's GPUs, as CUDA_VISIBLE_DEVICES names them.

    Raises:
        ConfigError: something is missing.
    """
    if executor.kind == "slurm":
        if missing := slurm_is_missing():
            raise ConfigError(f"executor.kind: slurm needs {missing}, which is not on this machine")
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
            f" {needed} GPUs, and this machine has {count}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def require_data(runs: Sequence[PlannedRun], *, elsewhere: bool) -> None:
    """Open the images of every distinct configuration.

    Args:
        runs: that are to be trained.
        elsewhere: they train on other machines; then what is missing here is only told.

    Raises:
        DinoscaleError: they cannot be opened, or none are named.
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
