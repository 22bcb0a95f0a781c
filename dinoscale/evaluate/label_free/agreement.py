"""Agreement of two networks: how many nearest neighbours of an image they share.

Shape letters: S images of the set, N of them readable, D width, k neighbours.
Source: mutual nearest neighbours of Huh et al. 2024 (arXiv:2405.07987), section 3, with k = 10.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 10
_CHUNK = 1024  # images whose cosines with all others are in memory at a time


def nearest(features: Tensor, numbers: Tensor, *, num_images: int) -> Tensor:
    """Numbers of each image's nearest others by cosine.

    Args:
        features: (N, D), any float dtype and norm, N >= 2; cosines run in float32.
        numbers: of their images in the set, (N,) int64.
        num_images: S.

    Returns:
        (S, k) int64, k = min(10, N - 1), in no order; rows of -1 for images that were not read.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"an image has a nearest other among two or more, got {len(features)}")
    units = F.normalize(features.float(), dim=1)
    k = min(NEIGHBOURS, len(units) - 1)
    table = torch.full((num_images, k), -1, dtype=torch.int64, device=features.device)
    for first in range(0, len(units), _CHUNK):
        cosines = units[first : first + _CHUNK] @ units.T  # (chunk, N)
        rows = torch.arange(len(cosines), device=units.device)
        cosines[rows, first + rows] = -torch.inf  # no image is its own neighbour
        table[numbers[first : first + _CHUNK]] = numbers[cosines.topk(k, dim=1).indices]
    return table


def agreement(first: Tensor, second: Tensor) -> float:
    """Mean fraction of neighbours that two tables of `nearest` share, over images in both.

    1 where all are the same; about k / (N - 1) where they have nothing to do with each other.

    Raises:
        ValueError: the tables are of different sets, or share no image.
    """
    if len(first) != len(second):
        raise ValueError(f"neighbours among {len(first)} and {len(second)} images")
    both = (first[:, 0] >= 0) & (second[:, 0] >= 0)
    if not both.any():
        raise ValueError("no image has neighbours in both")
    shared = (first[both][:, :, None] == second[both][:, None, :]).any(dim=2)  # (N, k)
    return float(shared.double().mean())
