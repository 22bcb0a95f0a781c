"""Which differences between the weights of a column are more than chance, image by image."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoscale.errors import DataError
from dinoscale.evaluate.classification.paired import SIGNIFICANT, Paired, holm, mcnemar
from dinoscale.evaluate.predictions import read_correct

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairedTest:
    """A test of two weights on the images that both answered.

    Attributes:
        first: label of weights.
        second: label of others.
        paired: how often only one of them is right.
        p: probability, corrected for the number of pairs in the column (Holm).
    """

    first: str
    second: str
    paired: Paired
    p: float

    @property
    def verdict(self) -> str:
        """In words."""
        if self.p >= SIGNIFICANT:
            return "no more than chance"
        won = self.paired.only_first > self.paired.only_second
        return f"{self.first if won else self.second} is better, by more than chance"

    def as_json(self) -> dict[str, object]:
        """Ready for JSON."""
        found = asdict(self.paired) | {"first": self.first, "second": self.second}
        return found | {"p_corrected": self.p, "more_than_chance": self.p < SIGNIFICANT}


def paired_tests(reports: Mapping[str, Mapping[str, Any]]) -> list[PairedTest]:
    """Test all pairs of weights of a column whose predictions were kept, of the same images.

    Args:
        reports: by the label of the weights, in the order of the rows.
    """
    answers = {label: _correct(report) for label, report in reports.items()}
    known = {label: found for label, found in answers.items() if found is not None}
    found = [
        (first, second, mcnemar(known[first][1], known[second][1]))
        for first, second in combinations(known, 2)
        if known[first][0] == known[second][0]
    ]
    corrected: Sequence[float] = holm([paired.p for _, _, paired in found])
    return [PairedTest(*pair, p) for pair, p in zip(found, corrected, strict=True)]


def _correct(report: Mapping[str, Any]) -> tuple[list[str], NDArray[np.bool_]] | None:
    """Images and whether each is answered rightly; None if not kept, lost, or overwritten."""
    file = report.get("predictions")
    digest = report.get("predictions_sha256")
    if not isinstance(file, str):
        return None
    if not isinstance(digest, str):
        log.warning("%s: the report of an older version names no digest of it; measure again", file)
        return None
    try:
        return read_correct(Path(file), sha256=digest)
    except DataError as error:
        log.warning("%s Differences of these weights are not tested.", error)
        return None
