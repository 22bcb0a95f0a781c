"""Channel normalisation of uint8 images, on whatever device they are."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalize_images(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (x / 255 - mean) / std of uint8 images (N, C, H, W), float32, on their device."""
    mean_, std_ = (images.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
    return (images.float() / 255 - mean_) / std_
