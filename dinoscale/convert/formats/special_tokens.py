"""The forms in which libraries keep a ViT of DINOv2 or DINOv3: class, register and mask tokens.

The reference and transformers store a position for the class token, and none for registers. timm's
models with registers store positions of patches only: that of the class token is added to it. timm
and the graphs have no mask token, which replaces masked patches in training.

Shape letters: P patches, R registers, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dinoscale.convert.card import BackboneShape
from dinoscale.convert.formats.dinov3 import without_masked_bias
from dinoscale.convert.formats.reference import VIT_NAMES, has_gated_mlp, is_dinov2
from dinoscale.convert.formats.timm_dinov3 import as_timm_dinov3
from dinoscale.convert.resize import patch_size_of
from dinoscale.convert.weights import Weights
from dinoscale.errors import ConversionError
from dinoscale.models.zoo import build_backbone

_TIMMS_REGISTERS = 4


def with_class_slot(weights: Weights) -> Weights:
    """A ViT with registers in the reference's form; others as they are."""
    state, shape = weights.backbone, weights.card.backbone
    if "reg_token" not in state or "pos_embed" not in state or shape.registers is not None:
        return weights
    num_patches = (shape.img_size // patch_size_of(weights)) ** 2
    if state["pos_embed"].shape[1] != num_patches:
        return weights
    shape = replace(shape, registers=state["reg_token"].shape[1])
    card = replace(weights.card, backbone=shape)
    return replace(weights, backbone=slot_added(state), card=card)


def as_in_timm(weights: Weights) -> Weights:
    """A ViT of DINOv2 or DINOv3 as a model of timm, without its mask token; others as they are.

    Raises:
        ConversionError: timm has no such model.
    """
    weights = without_mask_token(weights)
    state, shape = weights.backbone, weights.card.backbone
    if weights.is_rotary:
        return as_timm_dinov3(weights)
    layers = ("qkv_bias", "mask_key_bias", "ffn_ratio", "ffn_multiple")
    others = [key for key in layers if getattr(shape, key) is not None]
    if others:
        raise ConversionError(
            f"timm's plain ViTs have no model.{others[0]} as this one has: use --to dino"
        )
    registers = shape.registers or 0
    if shape.registers is None and not (shape.ffn or shape.layer_scale):
        return weights
    if has_gated_mlp(state) or is_dinov2(state):
        shape = _named_as_in_timm(state, shape, registers=registers)
    card = replace(weights.card, backbone=shape)
    return replace(weights, backbone=slot_removed(state) if registers else state, card=card)


def _named_as_in_timm(
    state: Mapping[str, Tensor], shape: BackboneShape, *, registers: int
) -> BackboneShape:
    """The model of timm that has a backbone's layers, with its sizes."""
    if registers not in (0, _TIMMS_REGISTERS) or "blocks.0.ls1.gamma" not in state:
        raise ConversionError(
            f"timm's ViTs of DINOv2 have layer scale and {_TIMMS_REGISTERS} registers or none, and"
            f" this has {'' if 'blocks.0.ls1.gamma' in state else 'no '}layer scale and"
            f" {registers} registers: use --to hf"
        )
    with torch.device("meta"):
        network: Any = build_backbone(**vars(shape))
    family = "vit_giant" if has_gated_mlp(state) else VIT_NAMES.get(network.embed_dim, "vit_small")
    return replace(
        shape,
        name=f"{family}_patch14{'_reg4' if registers else ''}_dinov2",
        patch_size=network.patch_size,
        embed_dim=network.embed_dim,
        depth=network.depth,
        num_heads=network.blocks[0].attn.num_heads,
        layer_scale=None,
        ffn=None,
        registers=None,
    )


def slot_added(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions (1, P, D) become (1, 1 + P, D): that of the class token is zero."""
    positions = state["pos_embed"]
    return {**state, "pos_embed": torch.cat((torch.zeros_like(positions[:, :1]), positions), 1)}


def slot_removed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions (1, 1 + P, D) become (1, P, D): that of the class token is added to it."""
    positions = state["pos_embed"]
    token = state["cls_token"] + positions[:, :1]
    return {**state, "cls_token": token, "pos_embed": positions[:, 1:]}


def without_mask_token(weights: Weights) -> Weights:
    """Weights for libraries that have none, nor a norm of local crops."""
    shape = replace(weights.card.backbone, mask_token=False)
    state = {name: x for name, x in weights.backbone.items() if name != "mask_token"}
    card = replace(weights.card, backbone=shape)
    return without_local_norm(replace(weights, backbone=state, card=card))


def without_local_norm(weights: Weights) -> Weights:
    """Weights without a norm of local crops, which serves in training only."""
    shape = replace(weights.card.backbone, local_norm=False)
    state = {name: x for name, x in weights.backbone.items() if not name.startswith("local_norm.")}
    return replace(weights, backbone=state, card=replace(weights.card, backbone=shape))


def as_in_hf(weights: Weights) -> Weights:
    """A ViT as transformers has it: class token with a position, no bias that does not act."""
    weights = without_local_norm(weights)
    return without_masked_bias(weights) if weights.is_rotary else with_class_slot(weights)
