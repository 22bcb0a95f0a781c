"""Which features of an image are written, and how a backbone computes them.

Shape letters: B images, C channels, H, W pixels, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dinoscale.errors import ConfigError
from dinoscale.models.vit import VisionTransformer

CLS, MEAN_PATCH, PATCHES, POOLED = "cls", "mean_patch", "patches", "pooled"
OF_VIT = (CLS, MEAN_PATCH, PATCHES)
_DEFAULT_OF_VIT = (CLS, MEAN_PATCH)


def chosen_features(backbone: nn.Module, asked: Sequence[str]) -> tuple[str, ...]:
    """The names of the features to write, in their own order; without any asked for, the usual.

    Raises:
        ConfigError: the backbone has no such feature.
    """
    known = OF_VIT if isinstance(backbone, VisionTransformer) else (POOLED,)
    usual = _DEFAULT_OF_VIT if isinstance(backbone, VisionTransformer) else (POOLED,)
    for name in asked:
        if name not in known:
            kind = "a ViT" if isinstance(backbone, VisionTransformer) else "a convolutional network"
            raise ConfigError(f"features: {kind} has no {name!r}, only {', '.join(known)}")
    return tuple(name for name in known if name in (asked or usual))


def row_shape(backbone: nn.Module, name: str, *, crop: int) -> tuple[int, ...]:
    """Shape of a feature of one image: (D,), or (P, D).

    Raises:
        ConfigError: an image is not made of whole patches.
    """
    network: Any = backbone
    width = int(network.embed_dim)
    if not isinstance(backbone, VisionTransformer):
        return (width,)
    patch = backbone.patch_size
    if crop % patch:
        lower = crop - crop % patch
        nearest = f"{lower} or {lower + patch}" if lower else f"{patch}"
        raise ConfigError(f"crop: {crop} pixels are not whole patches of {patch}; choose {nearest}")
    return ((crop // patch) ** 2, width) if name == PATCHES else (width,)


def compute(backbone: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The features of images (B, C, H, W) by name, float32: (B, D), or (B, P, D) for patches.

    All are tokens after the last norm; patches go row by row.
    """
    if not isinstance(backbone, VisionTransformer):
        return {POOLED: backbone([images]).float()}
    tokens = backbone.features(images).float()  # (B, 1 + registers + P, D)
    num_patches = (images.shape[2] // backbone.patch_size) * (
        images.shape[3] // backbone.patch_size
    )
    patches = tokens[:, -num_patches:]
    found = {CLS: tokens[:, 0], MEAN_PATCH: patches.mean(dim=1), PATCHES: patches}
    return {name: found[name] for name in names}
