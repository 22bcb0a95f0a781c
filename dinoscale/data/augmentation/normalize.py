"""Channel normalisation of uint8 images, on whatever device they are."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def normalize_images(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (x / 255 - mean) / std of uint8 images (N, C, H, W), float32, on their device."""
    mean_, std_ = _of_channels(tuple(mean), tuple(std), images.device)
    return (images.float() / 255 - mean_) / std_


@functools.cache  # each copy of Python numbers waits for all that the device has to do
def _of_channels(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Both on the device, (C, 1, 1) each."""
    both = torch.tensor([mean, std], dtype=torch.float32, device=device)
    return both[0, :, None, None], both[1, :, None, None]
