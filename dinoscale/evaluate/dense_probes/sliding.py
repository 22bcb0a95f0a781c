"""Scores of an image of any size from windows that overlap.

Shape letters: N images, C channels, H, W pixels, K scores of a pixel, R, S rows and columns of
patches.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F


def window_starts(length: int, *, window: int, stride: int) -> list[int]:
    """First pixels of the windows along a side; the last window ends with the side."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def slide(
    images: Tensor,
    score: Callable[[Tensor], Tensor],
    *,
    patch: int,
    window: int,
    stride: int,
    batch_size: int,
) -> Tensor:
    """Score windows, enlarge their scores to pixels, and average where windows overlap.

    Args:
        images: (N, C, H, W); a side shorter than the window is scored as a whole.
        score: maps (M, C, h, w) to (M, K, ceil(h / patch), ceil(w / patch)).
        patch: in pixels.
        window: side in pixels.
        stride: pixels from one window to the next, 1 to `window`.
        batch_size: windows of one forward.

    Returns:
        (N, K, H, W).
    """
    height, width = images.shape[2:]
    tall, wide = min(height, window), min(width, window)
    starts = [window_starts(side, window=window, stride=stride) for side in (height, width)]
    corners = list(product(range(len(images)), *starts))
    total: Tensor | None = None
    covered = images.new_zeros(height, width)
    for first in range(0, len(corners), batch_size):
        some = corners[first : first + batch_size]
        cut = torch.stack([images[n, :, y : y + tall, x : x + wide] for n, y, x in some])
        scores = to_pixels(score(cut), patch=patch, height=tall, width=wide)
        if total is None:
            total = scores.new_zeros(len(images), scores.shape[1], height, width)
        for (n, y, x), one in zip(some, scores, strict=True):
            total[n, :, y : y + tall, x : x + wide] += one
            if n == 0:
                covered[y : y + tall, x : x + wide] += 1
    assert total is not None  # there is one window at least
    return total / covered


def to_pixels(scores: Tensor, *, patch: int, height: int, width: int) -> Tensor:
    """Enlarge scores of patches bilinearly to pixels, and cut off those that fill up patches.

    Args:
        scores: (N, K, R, S).
        patch: in pixels.
        height: at most R patch.
        width: at most S patch.

    Returns:
        (N, K, height, width).
    """
    size = [side * patch for side in scores.shape[2:]]
    enlarged = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    return enlarged[:, :, :height, :width]
