"""Run a sweep: start what has not ended, keep the results, go on after any interruption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoscale.config.executor import ExecutorConfig
from dinoscale.sweep.runs import PlannedRun


def run_sweep(
    runs: Sequence[PlannedRun],
    *,
    out: Path,
    metrics: Mapping[str, str],
    executor: ExecutorConfig,
    retry_failed: bool,
) -> dict[str, Any]:
    """Run what has not ended and write the table.

    Args:
        runs: of the sweep.
        out: folder of the sweep.
        metrics: what to measure of each run, by name: see `SweepConfig`.
        executor: where, and how many at a time.
        retry_failed: whether runs whose retries are used up are started again.

    Returns:
        JSON-able: numbers of runs done, failed and left, and the path of the table.

    Raises:
        DinoscaleError: nothing could be started, or another process runs the sweep.
        RunFailedError: some runs failed; the others are done.
    """
    raise NotImplementedError
