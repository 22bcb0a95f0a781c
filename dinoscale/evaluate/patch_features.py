"""Features of the patches of one picture, of any size: keys, output tokens, or the pixels alone.

Shape letters: R, C rows and columns of patches, D width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from dinoscale.errors import ConfigError
from dinoscale.evaluate.any_size import find_patch_size, to_input
from dinoscale.evaluate.features import require_finite
from dinoscale.evaluate.frozen_backbone import LoadedBackbone
from dinoscale.models.vit import patchify

PatchFeatures = Literal["keys", "patches"]

IN_WORDS = {
    "keys": "keys of the last block, all heads, before they rotate",
    "patches": "patch tokens of the last block through the final norm",
}


def check_features(features: str) -> None:
    """Refuse an unknown kind of features.

    Raises:
        ConfigError: it is one.
    """
    if features not in get_args(PatchFeatures):
        raise ConfigError(
            f"features: need one of {', '.join(get_args(PatchFeatures))}, got {features!r}"
        )


def patch_features(
    loaded: LoadedBackbone, image: Image.Image, *, features: PatchFeatures
) -> Tensor:
    """Features of the patches of a picture, as the network gives them.

    Args:
        loaded: a ViT.
        image: of whole patches.
        features: which.

    Returns:
        (R, C, D) float32, on the device of the backbone.

    Raises:
        NonFiniteError: a feature is not a finite number.
    """
    backbone, patch = loaded.backbone, find_patch_size(loaded.backbone)
    rows, columns = image.height // patch, image.width // patch
    pixels = to_input(image, backbone, mean=loaded.card.mean, std=loaded.card.std)
    with torch.no_grad():
        of_tokens = backbone.last_keys if features == "keys" else backbone.features
        tokens: Tensor = of_tokens(pixels)  # type: ignore[operator]  # a ViT
    found = require_finite(tokens[0, -rows * columns :].float())
    return torch.unflatten(found, 0, (rows, columns))


def patch_pixels(loaded: LoadedBackbone, image: Image.Image) -> Tensor:
    """The normalised pixels of each patch, (R, C, D): what the colors alone tell."""
    patch = find_patch_size(loaded.backbone)
    pixels = to_input(image, loaded.backbone, mean=loaded.card.mean, std=loaded.card.std)
    grid = image.height // patch, image.width // patch
    return torch.unflatten(patchify(pixels.float(), patch_size=patch), 0, grid)
