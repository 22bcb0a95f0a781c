"""Scores of a segmentation: intersection over union of each class, and pixel accuracy.

Shape letters: K classes, R, C rows and columns of scores, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinoscale.evaluate.segmentation.index_masks import VOID

_SCORES_AT_ONCE = 2**24  # 64 MiB of float32


class Confusion:
    """How many pixels of each class were found to be of each class; void pixels do not count.

    Attributes:
        images: number of those that were added.
        counts: (K, K) int64; true classes are rows, found ones columns.
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self.images = 0
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, found: Tensor, truth: Tensor) -> None:
        """Count the pixels of an image: class numbers of one shape, of `truth` also VOID."""
        self.images += 1
        pairs = (truth.long() * self._num_classes + found.long()).add_(1)
        pairs.masked_fill_(truth == VOID, 0)  # a choice of the others would wait for the device
        counts = torch.bincount(pairs.flatten(), minlength=1 + self.counts.numel())
        assert len(counts) == 1 + self.counts.numel(), "a mask holds a number that is no class"
        self.counts += counts[1:].view_as(self.counts).cpu()

    def iou(self) -> list[float | None]:
        """Intersection over union of each class in percent; None where both are empty."""
        both = self.counts.diag()
        either = self.counts.sum(dim=0) + self.counts.sum(dim=1) - both
        pairs = zip(both.tolist(), either.tolist(), strict=True)
        return [100 * one / any_ if any_ else None for one, any_ in pairs]

    def score(self) -> dict[str, float]:
        """In percent: the mean of `iou` over classes that are in the masks or were found, and the
        share of the pixels that are right.
        """  # noqa: D205
        known = [value for value in self.iou() if value is not None]
        pixels = int(self.counts.sum())
        return {
            "miou": sum(known) / len(known),
            "pixel_accuracy": 100 * int(self.counts.diag().sum()) / pixels,
        }

    def missing(self) -> list[int]:
        """Classes without a pixel in the masks."""
        return torch.nonzero(self.counts.sum(dim=1) == 0).flatten().tolist()


def all_of_one_class(pixels: Sequence[int], chosen: int) -> Confusion:
    """The confusion of finding one class everywhere; `pixels` of each class in the masks."""
    confusion = Confusion(len(pixels))
    confusion.counts[:, chosen] = torch.tensor(pixels)
    return confusion


def enlarged_argmax(scores: Tensor, *, height: int, width: int) -> Tensor:
    """Enlarge scores bilinearly, and take the best class of each pixel, a few rows at a time.

    As `F.interpolate` without antialiasing and without aligned corners, in bounded memory.

    Args:
        scores: (K, R, C).
        height: H.
        width: W.

    Returns:
        (H, W) int64.
    """
    left, right, beside = _taps(scores.shape[2], width, scores)
    wide = torch.lerp(scores[..., left], scores[..., right], beside)  # (K, R, W)
    upper, lower, below = _taps(scores.shape[1], height, scores)
    at_once = max(1, _SCORES_AT_ONCE // (len(scores) * width))
    parts = zip(upper.split(at_once), lower.split(at_once), below.split(at_once), strict=True)
    found = [
        torch.lerp(wide[:, up], wide[:, low], share[:, None]).argmax(dim=0)
        for up, low, share in parts
    ]
    return torch.cat(found)


def _taps(stored: int, wanted: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each wanted place the two stored ones around it, and the share of the second."""
    places = torch.arange(wanted, device=like.device, dtype=like.dtype)
    at = ((places + 0.5) * (stored / wanted) - 0.5).clamp(min=0)
    first = at.long().clamp(max=stored - 1)
    return first, (first + 1).clamp(max=stored - 1), at - first
