"""Fit the results of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dinoscale.sweep.laws import MetricFit
from dinoscale.sweep.table import Row

CONFIDENCE = 0.9
SAMPLES = 500  # bootstrap


def fit_rows(
    rows: Sequence[Row],
    *,
    metrics: Sequence[str] = (),
    budgets: Sequence[float] = (),
    confidence: float = CONFIDENCE,
    samples: int = SAMPLES,
) -> list[MetricFit]:
    """Fit every metric on its own.

    Args:
        rows: of the table.
        metrics: names; none for all in the table.
        budgets: FLOPs to find the best model and number of images for; none for 2 and 10 times
            the largest that was run.
        confidence: of the intervals.
        samples: of the bootstrap.

    Raises:
        DataError: no run has a metric.
        ConfigError: an argument is out of range, or a metric is not in the table.
    """
    raise NotImplementedError


def as_json(fits: Sequence[MetricFit]) -> dict[str, Any]:
    """All fits by metric, JSON-able; infinite ends are null."""
    raise NotImplementedError


def as_text(fits: Sequence[MetricFit]) -> str:
    """The same for people, with what cannot be trusted."""
    raise NotImplementedError
