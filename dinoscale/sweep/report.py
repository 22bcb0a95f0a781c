"""The report of a sweep: a page, its plots, its numbers, and the preset to train next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoscale.scaling.laws import MetricFit
from dinoscale.sweep.table import Row


def write_report(rows: Sequence[Row], fits: Sequence[MetricFit], out: Path) -> dict[str, Any]:
    """Write report.html, report.json, recommended.yaml and plots/*.png into a folder.

    Returns:
        JSON-able: the paths and the recommendation.

    Raises:
        ConfigError: they cannot be written.
    """
    raise NotImplementedError
