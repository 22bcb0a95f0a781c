"""Places found again by the nearest patch features, and how many are found (PCK).

Places are (x, y) in 0..1, as fractions of the width and height of their picture.

Shape letters: K places, R, C rows and columns of patches (S, T of the target), D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

PLACES_AT_ONCE = 1024  # whose similarities to all patches are in memory together

Array = NDArray[np.float64]


def find_places(source: Tensor, target: Tensor, places: Array) -> Array:
    """Find places of one picture in another: the center of the patch of the highest cosine.

    The feature of a place is interpolated bilinearly between the centers of patches. Of patches
    with equal cosines the first wins.

    Args:
        source: features (R, C, D).
        target: features (S, T, D), on the same device.
        places: (K, 2) in the source.

    Returns:
        (K, 2), in the target.
    """
    at = torch.from_numpy(2 * places - 1).to(source)  # from -1 to 1
    whole = source.permute(2, 0, 1)[None]
    wanted = F.grid_sample(whole, at[None, None], padding_mode="border", align_corners=False)
    wanted = F.normalize(wanted[0, :, 0].T, dim=1)  # (K, D)
    patches = F.normalize(target.flatten(0, 1), dim=1)
    best = [(part @ patches.T).argmax(1) for part in wanted.split(PLACES_AT_ONCE)]
    centers = patch_centers(*target.shape[:2])
    return np.asarray(centers[torch.cat(best).cpu().numpy()])


def patch_centers(rows: int, columns: int) -> Array:
    """Places of the centers of patches, row by row, (R C, 2)."""
    y, x = np.mgrid[:rows, :columns]
    return np.stack([(x + 0.5) / columns, (y + 0.5) / rows], axis=-1).reshape(-1, 2)


def nearest_centers(rows: int, columns: int, places: Array) -> Array:
    """The center of the patch that holds each place, (K, 2): what no match can be better than."""
    grid = np.array([columns, rows])
    return np.asarray((np.clip(np.floor(places * grid), 0, grid - 1) + 0.5) / grid)


def pck(errors: Sequence[Array], alpha: float) -> float:
    """Percentage of correct key points: the share of a pair's, then the mean over pairs.

    Args:
        errors: of each pair (K,), as fractions of the length that the threshold refers to.
        alpha: the threshold; a point is correct if its error is not above it.
    """
    return float(100 * np.mean([np.mean(of_pair <= alpha) for of_pair in errors]))
