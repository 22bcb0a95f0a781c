"""How far depths are off: threshold accuracies and errors, means over images.

Shape letters: H, W pixels.
Source: Eigen et al. 2014 (arXiv:1406.2283), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dinoscale.evaluate.depth.depth_files import HOLE, Depths

THRESHOLD = 1.25  # of the ratio of found and true depth; its powers for delta2 and delta3
DELTAS = ("delta1", "delta2", "delta3")


@dataclass
class DepthErrors:
    """The errors of some images, each with at least one known depth."""

    images: list[dict[str, float]] = field(default_factory=list)

    def add(self, found: Depths, truth: Depths) -> None:
        """Count an image: metres (H, W), `truth` with holes; without a known depth it is left out.

        Args:
            found: > 0.
            truth: HOLE where unknown.
        """
        known = truth > HOLE
        if known.any():
            self.images.append(
                _errors(found[known].astype(np.float64), truth[known].astype(np.float64))
            )

    def deltas(self) -> dict[str, float]:
        """Share of the pixels whose depth is right within 1.25, 1.25^2, 1.25^3; percent."""
        return {name: 100 * value for name, value in self._means(DELTAS).items()}

    def errors(self) -> dict[str, float]:
        """`rmse` in metres, `abs_rel`, `log10` and `rmse_log`: the lower, the better."""
        return self._means([name for name in self.images[0] if name not in DELTAS])

    def _means(self, names: Sequence[str]) -> dict[str, float]:
        return {name: float(np.mean([one[name] for one in self.images])) for name in names}


def _errors(found: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, float]:
    """Of the known pixels of an image, (P,) each."""
    ratio = np.maximum(found / truth, truth / found)
    logs = np.log(found) - np.log(truth)
    within = {
        name: float((ratio < THRESHOLD**power).mean()) for power, name in enumerate(DELTAS, start=1)
    }
    return {
        **within,
        "rmse": float(np.sqrt(np.square(found - truth).mean())),
        "abs_rel": float((np.abs(found - truth) / truth).mean()),
        "log10": float(np.abs(logs).mean() / np.log(10)),
        "rmse_log": float(np.sqrt(np.square(logs).mean())),
    }
