"""Weights for another image size, with position embeddings resized by the rule of the training."""

from __future__ import annotations

from dataclasses import replace

from dinoscale.convert.weights import Weights
from dinoscale.errors import ConversionError
from dinoscale.models.vit import position_rule, resize_pos_embed


def patch_size_of(weights: Weights) -> int:
    """Patch size of a ViT in pixels; 1 for a ResNet, which takes images of any size."""
    projection = weights.backbone.get("patch_embed.proj.weight")
    return 1 if projection is None else projection.shape[-1]


def at_size(weights: Weights, *, img_size: int) -> Weights:
    """Resize the position embedding for images of another size, and the preprocessing with it.

    Args:
        weights: of any backbone.
        img_size: side of the images in pixels.

    Returns:
        The weights with float32 positions resized; resize and crop of the card are in proportion.

    Raises:
        ConversionError: the size is not a multiple of the patch size.
    """
    card, shape = weights.card, weights.card.backbone
    card = replace(
        card,
        backbone=replace(shape, img_size=img_size),
        resize=round(card.resize * img_size / card.crop),
        crop=img_size,
    )
    patch_size = patch_size_of(weights)
    if img_size < 1 or img_size % patch_size:
        raise ConversionError(f"--size {img_size} is not a multiple of the patch size {patch_size}")
    # A ResNet and rotary positions take any size.
    if "pos_embed" not in weights.backbone or img_size == shape.img_size:
        return replace(weights, card=card)
    positions = weights.backbone["pos_embed"]
    resized = resize_pos_embed(
        positions.float(),
        image_size=(img_size, img_size),
        patch_size=patch_size,
        num_prefix=positions.shape[1] - (shape.img_size // patch_size) ** 2,
        rule=position_rule(shape.position_resize, registers="reg_token" in weights.backbone),
    )
    return replace(weights, card=card, backbone={**weights.backbone, "pos_embed": resized})
