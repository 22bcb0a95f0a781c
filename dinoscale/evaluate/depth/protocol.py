"""How depth is learned and measured, with published numbers (DINOv3, arXiv:2508.10104)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dinoscale.errors import ConfigError
from dinoscale.evaluate.dense_probes.linear_head import Recipe
from dinoscale.evaluate.depth.bins import BINS, LEAST, SHARE
from dinoscale.evaluate.depth.depth_files import DepthRange

RANGE = DepthRange()
RECIPE = Recipe(
    iterations=38_400, batch_size=16, lr=3e-4, weight_decay=1e-4, warmup=1 / 3, clip=35.0
)


@dataclass(frozen=True)
class DepthProtocol:
    """How depth is learned and measured; the published numbers are the defaults.

    Attributes:
        scale: numbers of a depth picture in a metre.
        range: of the bins, and of the depths that count.
        bins: number of bins.
        size: short side of an image in pixels; None keeps images as they are.
        crop: height and width of a train crop, pixels.
        eigen_crop: score only the middle part of NYUv2's pictures.
        recipe: of the optimizer.
    """

    scale: float = 1000.0
    range: DepthRange = RANGE
    bins: int = BINS
    size: int | None = None
    crop: tuple[int, int] = (416, 544)
    eigen_crop: bool = False
    recipe: Recipe = RECIPE

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ConfigError(f"bins: need at least 2, got {self.bins}")

    @classmethod
    def of(cls, protocol: Mapping[str, Any]) -> DepthProtocol:
        """That of which `protocol` has said all; KeyError, TypeError or ValueError if not."""
        height, width = protocol["crop"]
        return cls(
            scale=float(protocol["depth_scale"]),
            range=DepthRange(protocol["min_depth"], protocol["max_depth"]),
            bins=int(protocol["bins"]),
            size=None if protocol["size"] is None else int(protocol["size"]),
            crop=(height, width),
            eigen_crop=bool(protocol["eigen_crop"]),
            recipe=Recipe.of(protocol),
        )

    def protocol(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        return {
            "depth_scale": self.scale,
            "min_depth": self.range.low,
            "max_depth": self.range.high,
            "bins": self.bins,
            "size": self.size,
            "crop": list(self.crop),
            "eigen_crop": self.eigen_crop,
            **self.recipe.protocol(),
            "head": f"batch norm, 1 x 1 convolution; mean of bins with weights relu + {LEAST}",
            "loss": f"SigLoss, sqrt(mean(g^2) - {SHARE} mean(g)^2)",
            "train_images": "random crop, mirrored half of the time; the published training also"
            " changes the brightness (0.9 to 1.1) and rotates (by up to 2.5 degrees)",
            "test_images": "whole; depth enlarged bilinearly to that of the depth picture",
            "test_time_augmentation": "mean with the mirrored image; `single` is without",
            "means": "of each image, then over images; zeros and other depths are holes",
        }
