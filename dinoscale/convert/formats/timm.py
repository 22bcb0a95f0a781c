"""Read checkpoints of timm's ViTs: the reference's names, and in a hub folder a config.json.

Source: github.com/huggingface/pytorch-image-models, `timm.models._hub.save_for_hf` (`architecture`,
`model_args`, `pretrained_cfg`; in older folders the latter's keys are beside `architecture`).
Differs: at image sizes other than the position embedding's, timm interpolates it to the target size
with antialiasing, and our forward by the reference's rule (`models.vit.resize_pos_embed`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from dinoscale.config.sections.convnets import named_convnet
from dinoscale.convert.card import BackboneCard, parse_card
from dinoscale.convert.formats.dinov3 import dinov3_card
from dinoscale.convert.formats.reference import guess_shape, reference_card
from dinoscale.convert.formats.timm_dinov3 import (
    BASE,
    KNOWN_ARGS,
    NORM_EPS,
    timm_dinov3_shape,
)
from dinoscale.convert.read_files import Content
from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.models.zoo import own_num_heads

log = logging.getLogger(__name__)

_CROP_PCT = 0.875  # timm's default
_KNOWN_ARGS = {  # model_args that the shapes of the tensors show, or that change no feature
    *("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads"),
    *("num_classes", "global_pool", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"),
    *("init_values", "mlp_ratio"),  # of layer scale, and of an MLP
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init"),
}


def is_timm(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Whether a backbone state is timm's and not the reference's."""
    if "architecture" in settings:
        return True
    only_timms = ("reg_token", "blocks.0.ls1.gamma", "stem.0.weight")
    return "mask_token" not in state and any(name in state for name in only_timms)


def timm_card(
    state: Mapping[str, Tensor],
    content: Content,
    *,
    num_heads: int | None,
    of_dinov3: bool = False,
) -> BackboneCard:
    """Card of a timm checkpoint: sizes from its tensors, the rest from config.json if it has one.

    Args:
        state: the backbone's tensors, under our names.
        content: with the settings.
        num_heads: used where there is no config.json; one that names the architecture tells it.
        of_dinov3: whether it is a network of DINOv3, see `timm_dinov3`.

    Raises:
        CheckpointError: config.json has entries of wrong types, or options that we do not build.
    """
    settings = content.settings or {}
    if "architecture" not in settings and of_dinov3:
        log.warning(
            "%s has no config.json beside it that names the architecture: taking timm's epsilon of"
            " layer norms %g and rope_temperature %g",
            *(content.name, NORM_EPS, BASE),
        )
        shape = timm_dinov3_shape(state, settings, num_heads=num_heads)
        return dinov3_card(shape, source=content.name)
    if "architecture" not in settings:
        return reference_card(guess_shape(state, num_heads=num_heads), source=content.name)
    args, config = settings.get("model_args") or {}, settings.get("pretrained_cfg", settings)
    if not isinstance(args, dict) or not isinstance(config, dict):
        raise CheckpointError("has a config.json whose model_args, pretrained_cfg are no mappings")
    unknown = sorted(args.keys() - (_KNOWN_ARGS | KNOWN_ARGS if of_dinov3 else _KNOWN_ARGS))
    if unknown:
        raise CheckpointError(f"has a config.json with model_args {unknown}, which we do not build")
    if of_dinov3:
        shape = timm_dinov3_shape(state, settings, num_heads=num_heads)
    else:
        # The number of heads in the guess is replaced by that of config.json or the architecture.
        # The tensors show the other sizes.
        shape = replace(
            guess_shape(state, num_heads=num_heads or 1),
            name=settings["architecture"],
            num_heads=args.get("num_heads") or _own_num_heads(settings, asked=num_heads),
            layer_scale=args.get("init_values"),
            ffn=None,
            registers=None,
        )
    crop = _image_side(config, default=shape.img_size)
    share = config.get("crop_pct") or _CROP_PCT
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise CheckpointError(f"has a config.json with crop_pct {share!r}, not in 0..1")
    for key, only in (("interpolation", "bicubic"), ("crop_mode", "center")):
        if (config.get(key) or only) != only:
            log.warning(
                "%s asks for %s %r; dinoscale evaluates with %r",
                content.name,
                key,
                config[key],
                only,
            )
    if of_dinov3:  # of any size
        patch_size = shape.patch_size or 1
        shape = replace(shape, img_size=max(1, crop // patch_size) * patch_size)
    card = replace(
        reference_card(shape, source=content.name), crop=crop, resize=math.floor(crop / share)
    )
    card = replace(card, **{key: config[key] for key in ("mean", "std") if config.get(key)})
    return parse_card(card.to_json())  # checks the types of the values from config.json


def _own_num_heads(settings: Mapping[str, Any], *, asked: int | None) -> int | None:
    """Heads of an architecture, with which those that are asked for are compared; else None."""
    if asked is None or named_convnet(str(settings["architecture"])) is not None:
        return None
    try:
        return own_num_heads(settings["architecture"])
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _image_side(config: Mapping[str, Any], *, default: int) -> int:
    """H of the `input_size` (C, H, H)."""
    size = config.get("input_size", [0, default, default])
    if not isinstance(size, list) or len(size) != 3 or type(size[1]) is not int or size[1] < 1:
        raise CheckpointError(f"has a config.json with input_size {size!r}, not [C, H, W]")
    if size[2] != size[1]:
        raise CheckpointError(f"has a config.json with input_size {size!r}, which is no square")
    return size[1]
