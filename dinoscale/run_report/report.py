"""The report of a run: curves, collapse, throughput, k-NN, attention, events."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_run_report(run_dir: Path, out: Path, *, attention: bool) -> dict[str, Any]:
    """Write report.html, report.json and plots/*.png of a run into a folder.

    Args:
        run_dir: of a run, finished or not.
        out: the folder.
        attention: whether to draw where the teacher of the newest checkpoint looks.

    Returns:
        JSON-able: the paths and the last numbers.

    Raises:
        DataError: there is no run.
        ConfigError: the report cannot be written.
    """
    raise NotImplementedError
