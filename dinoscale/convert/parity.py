"""Proof that a written target gives the features of its source, on fixed images.

Shape letters: N images, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.convert.coverage import Coverage
from dinoscale.models.resnet import ResNet50
from dinoscale.models.vit import VisionTransformer

# Largest difference over largest feature, between two programs that compute the same in float32.
MAX_DIFFERENCE = 1e-5
MIN_COSINE = 0.9999
# Cosine of every token with that of the float32 source, after rounding the weights to 16 bit.
MIN_COSINE_ROUNDED = 0.99

LOCAL_CROP = 96 / 224  # the second size, in proportion to the first: that of the local crops
_SEED = 0

Outputs = Mapping[str, Tensor]  # "cls" (N, D), "patches" (N, P, D); a part may be absent
Forward = Callable[[Tensor], Outputs]


@dataclass(frozen=True, eq=False)
class Reopened:
    """A target as its own library opens it.

    Attributes:
        forward: images (N, C, H, W) to outputs, float32.
        coverage: what of the library's model the files cover.
    """

    forward: Forward
    coverage: Coverage


@dataclass(frozen=True)
class Agreement:
    """How far two forwards are apart on the same images.

    Attributes:
        size: height and width of the images in pixels.
        max_difference: of any feature, over the largest feature.
        cosine: the smallest of any token.
    """

    size: tuple[int, int]
    max_difference: float
    cosine: float

    @property
    def equal(self) -> bool:
        """Whether the difference is that of rounding; never so for numbers that are not finite."""
        return self.max_difference <= MAX_DIFFERENCE and self.cosine >= MIN_COSINE


def our_forward(backbone: VisionTransformer | ResNet50) -> Forward:
    """Outputs of one of our backbones."""

    def forward(images: Tensor) -> Outputs:
        if isinstance(backbone, ResNet50):
            return {"cls": backbone([images])}
        tokens = backbone.features(images)
        p = backbone.patch_size
        num_patches = (images.shape[2] // p) * (images.shape[3] // p)
        return {"cls": tokens[:, 0], "patches": tokens[:, -num_patches:]}

    return forward


def second_size(img_size: int, *, patch_size: int) -> int:
    """Another size to compare at, in pixels: a multiple of the patch that is not `img_size`."""
    patches = max(1, round(img_size * LOCAL_CROP / patch_size))
    return (patches if patches * patch_size != img_size else patches + 1) * patch_size


def compare(
    ours: Forward, theirs: Forward, *, in_chans: int, size: int, num_images: int = 2
) -> Agreement:
    """Run both on the same seeded images, square with a side of `size` pixels."""
    generator = torch.Generator().manual_seed(_SEED)
    images = torch.randn(num_images, in_chans, size, size, generator=generator)
    with torch.inference_mode():
        expected, found = ours(images), theirs(images)
    differences, cosines = [], []
    for name in expected.keys() & found.keys():
        ours_, theirs_ = expected[name], found[name]
        if ours_.shape != theirs_.shape:
            return Agreement((size, size), float("inf"), float("nan"))
        differences.append(float((ours_ - theirs_).abs().max() / ours_.abs().max()))
        cosines.append(float(F.cosine_similarity(ours_, theirs_, dim=-1).min()))
    worst = torch.tensor([differences, cosines])  # max and min of tensors keep a NaN
    return Agreement((size, size), float(worst[0].max()), float(worst[1].min()))
