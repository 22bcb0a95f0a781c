"""What a sweep would cost, on paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dinoscale.config.sweep import SweepConfig
from dinoscale.sweep.runs import PlannedRun


def make_plan(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Every run with parameters, FLOPs, images, steps, memory and hours, and the sum; JSON-able."""
    raise NotImplementedError


def as_text(plan: dict[str, Any]) -> str:
    """The same for people."""
    raise NotImplementedError
