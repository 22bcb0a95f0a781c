"""How far a sweep is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoscale.sweep.runs import PlannedRun


def read_status(runs: Sequence[PlannedRun], *, out: Path) -> dict[str, Any]:
    """Each run with its state, progress, metrics and error, and how long the rest may take."""
    raise NotImplementedError


def as_text(status: dict[str, Any]) -> str:
    """The same for people."""
    raise NotImplementedError
