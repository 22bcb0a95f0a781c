"""From the file of a sweep to its runs."""

from __future__ import annotations

from dinoscale.config.sweep import SweepConfig
from dinoscale.sweep.runs import PlannedRun


def plan_runs(sweep: SweepConfig) -> list[PlannedRun]:
    """All runs, those first that cost least.

    Raises:
        ConfigError: one of them is impossible, or two are the same.
    """
    raise NotImplementedError
