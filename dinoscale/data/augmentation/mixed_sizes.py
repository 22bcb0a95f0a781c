"""Crops whose sizes differ from step to step, as in DINOv3's high-resolution phase.

A step has the same sizes on all ranks and in all micro-batches. Boxes and colours of an image are
drawn as for one size: only what they are resized to differs.
Source: code of Simeoni et al. 2025 (arXiv:2508.10104).
"""

from collections.abc import Sequence

import numpy as np

from dinoscale.data.augmentation.multi_crop import MultiCrop
from dinoscale.data.seeding import Stream, generator


def drawn_size(weights: Sequence[float], *, seed: int, step: int) -> int:
    """Index of the sizes of a step, a function of (seed, step); each has its weight as chance.

    Args:
        weights: at least one, above 0.
        seed: of the run.
        step: zero-based optimizer step.
    """
    if len(weights) == 1:
        return 0
    ends = np.cumsum(weights)
    uniform = generator(seed, Stream.SIZES, step).random()
    drawn = int(np.searchsorted(ends, uniform * ends[-1], side="right"))
    return min(drawn, len(weights) - 1)  # if the product was rounded up to the end


class MixedSizes:
    """Augmentations that differ in the sizes of their crops, of which a step has one."""

    def __init__(self, crops: Sequence[MultiCrop], weights: Sequence[float]) -> None:
        """Keep them; the weights are as in `drawn_size`, one for each."""
        self._crops, self._weights = tuple(crops), tuple(weights)

    def of_step(self, step: int, *, seed: int) -> MultiCrop:
        """The augmentation of all images of a step."""
        return self._crops[drawn_size(self._weights, seed=seed, step=step)]
