"""Features of an image at several scales, averaged.

Source: Caron et al. 2021 (arXiv:2104.14294), section 4.2.1, and its published evaluation code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (1.0, 1 / math.sqrt(2), 0.5)  # of the height and width


class MultiScale(nn.Module):
    """A backbone whose features are the mean of those at three scales."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Return the mean of the features (N, D), not normalised, of images of one size.

        Args:
            crops: one tensor (N, C, H, W), normalised pixels; shrunk bilinearly.
        """
        (images,) = crops
        found = [self.backbone([_scaled(images, scale)]) for scale in SCALES]
        return torch.stack(found).mean(dim=0)


def _scaled(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)


def least_side(network: nn.Module) -> int:
    """Minimum height and width of an image in pixels, so that every scale holds a patch."""
    if isinstance(network, MultiScale):
        return math.ceil(least_side(network.backbone) / min(SCALES))
    return int(getattr(network, "patch_size", 1))
