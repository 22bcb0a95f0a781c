"""Features of a square grid of patches, resized to the grid of another network's patches."""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses.prototypes import at_least_float32

Interpolation = Literal["bicubic", "bilinear"]


def resized(features: Tensor, *, num_patches: int, interpolation: Interpolation) -> Tensor:
    """Features of a square grid of patches, resized to another one.

    Args:
        features: (N, Q, D), any float dtype.
        num_patches: P.
        interpolation: bicubic is without antialias, as DINOv3's authors resize the features of a
            Gram network, before they are normalised. Bilinear is with it: each patch of a coarser
            grid is a mean of those that it covers.

    Returns:
        (N, P, D) in at least float32; `features` if Q is P.

    Raises:
        ValueError: Q or P is not a square.
    """
    found, wanted = (math.isqrt(count) for count in (features.shape[1], num_patches))
    if (found**2, wanted**2) != (features.shape[1], num_patches):
        raise ValueError(f"need square grids, got {features.shape[1]} and {num_patches} patches")
    if found == wanted:
        return features
    maps = features.to(at_least_float32(features)).mT.unflatten(2, (found, found))
    size, antialias = (wanted, wanted), interpolation == "bilinear"
    return F.interpolate(maps, size, mode=interpolation, antialias=antialias).flatten(2).mT
