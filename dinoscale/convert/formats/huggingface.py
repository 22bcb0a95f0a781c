"""Read ViTs of Hugging Face's transformers: ViT, Dinov2, Dinov2WithRegisters.

Source: github.com/huggingface/transformers, `models/vit`, `models/dinov2`,
`models/dinov2_with_registers`: tensor names of saved files, and of modules since version 5.
Queries, keys and values are three layers there and one here; so are, in modules, the gate and the
values of SwiGLU MLPs.
Differs: at image sizes other than the position embedding's, transformers interpolates it to the
target size (`interpolate_pos_encoding=True`), and our forward by the reference's scale factor; with
registers both do the same.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dinoscale.convert.card import BackboneCard, parse_card
from dinoscale.convert.formats.reference import (
    guess_shape,
    has_gated_mlp,
    is_outside,
    reference_card,
)
from dinoscale.convert.read_files import Content
from dinoscale.convert.weights import Weights
from dinoscale.errors import CheckpointError

log = logging.getLogger(__name__)

# The library's defaults for entries that a config.json omits: layer_norm_eps by model_type.
_NORM_EPS = {"vit": 1e-12, "dinov2": 1e-6, "dinov2_with_registers": 1e-6}
_NUM_HEADS = 12
_BICUBIC = 3  # as Pillow numbers it

_PREFIX = re.compile(r"(vit|dinov2|dinov2_with_registers)\.")  # of a backbone in a classifier
_OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "layernorm_before": "norm1",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.fc2",
}
_JOINED = {  # layers of one of ours, rows in this order
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "mlp.fc1": ("mlp.gate", "mlp.up"),
}
_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d{1,9})\.(.+)\.(weight|bias|lambda1)")
_SCALES = {"layer_scale1": "ls1.gamma", "layer_scale2": "ls2.gamma"}


def is_huggingface(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of transformers' ViTs, or a config.json says so."""
    return "model_type" in settings or any(
        _PREFIX.sub("", name, count=1) == "embeddings.cls_token" for name in state
    )


def read_huggingface(
    state: Mapping[str, Tensor], content: Content, *, num_heads: int | None
) -> Weights:
    """Rename the tensors of a ViT of transformers, and read its architecture and preprocessing.

    Args:
        state: tensors of the file.
        content: with config.json and preprocessor_config.json if they are beside it.
        num_heads: used where there is no config.json; None takes 64 channels a head.

    Raises:
        CheckpointError: it is another model, or config.json has options that we do not build.
    """
    backbone, left_out = from_huggingface(state)
    settings = content.settings or {}
    scaled = "blocks.0.ls1.gamma" in backbone  # layer scale
    kinds = [kind for kind in _NORM_EPS if scaled == kind.startswith("dinov2")]
    kind = settings.get("model_type", kinds[0])
    if kind not in kinds:
        need = " or ".join(map(repr, kinds))
        raise CheckpointError(f"has a config.json with model_type {kind!r}, need {need}")
    for key, only in (("hidden_act", "gelu"), ("use_swiglu_ffn", has_gated_mlp(backbone))):
        if settings.get(key, only) != only:
            raise CheckpointError(f"has a config.json with {key} {settings[key]!r}, need {only!r}")
    eps, heads = settings.get("layer_norm_eps", _NORM_EPS[kind]), None
    if content.settings is None:
        log.warning(
            "%s has no config.json beside it: taking transformers' layer_norm_eps %g",
            content.name,
            eps,
        )
    else:
        heads = settings.get("num_attention_heads", _NUM_HEADS)
    shape = guess_shape(backbone, num_heads=heads or num_heads)
    card = reference_card(replace(shape, norm_eps=eps), source=content.name)
    return Weights(backbone, None, completed(card, content), "hf", left_out)


def completed(card: BackboneCard, content: Content) -> BackboneCard:
    """A card with what the files beside the weights say.

    Raises:
        CheckpointError: entries of other types than theirs.
    """
    card = parse_card(_with_preprocessing(card, content.preprocessing or {}).to_json())
    if content.card is None:
        return card
    # The one entry that the library's files cannot store.
    return replace(card, max_pixel_value=parse_card(content.card).max_pixel_value)


def from_huggingface(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under our names, and the names of those outside the backbone.

    A tensor without a counterpart keeps its name, so that `weights_file.build` refuses it.
    """
    renamed: dict[str, Tensor] = {}
    left_out = []
    for full_name, tensor in state.items():
        name = _PREFIX.sub("", full_name, count=1)
        outer = _OUTER.get(name, full_name)
        if is_outside(name, tensor) or is_outside(outer, tensor):
            left_out.append(full_name)
            continue
        match = _BLOCK.fullmatch(name)
        if match and match[2] in _SCALES:
            ours = f"blocks.{match[1]}.{_SCALES[match[2]]}"
        elif match and match[2] in _IN_BLOCK:
            ours = f"blocks.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"
        else:
            ours = outer
        if ours in renamed:
            raise CheckpointError(f"holds {full_name!r} under two names")
        renamed[ours] = tensor
    tokens = renamed.get("reg_token")
    if tokens is not None and not tokens.numel():
        del renamed["reg_token"]
    return _joined(renamed), tuple(left_out)


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the layers of each block that are one of ours."""
    joined = dict(state)
    for whole, layers in _JOINED.items():
        first = f".{layers[0]}."
        for name in state:
            parts = [name.replace(first, f".{layer}.") for layer in layers]
            if first not in name or not all(part in state for part in parts):
                continue
            try:
                rows = torch.cat([joined.pop(part) for part in parts])
            except RuntimeError as error:
                *others, last = (layer.split(".")[1] for layer in layers)
                what = f"{', '.join(others)} and {last}"
                raise CheckpointError(f"holds {what} of different widths at {name}") from error
            joined[name.replace(first, f".{whole}.")] = rows
    return joined


def _with_preprocessing(card: BackboneCard, config: Mapping[str, Any]) -> BackboneCard:
    """A card with preprocessor_config.json; without a center crop the reference's sizes stay."""
    if config.get("image_mean") == [0.5] * card.backbone.in_chans:
        log.warning(
            "%s: preprocessor_config.json has mean 0.5, as in the published facebook/dino-vit*,"
            " which were trained with ImageNet's mean and std: if these are those weights, correct"
            " image_mean and image_std in it",
            card.source,
        )
    if config.get("resample", _BICUBIC) != _BICUBIC:
        log.warning(
            "%s asks for Pillow's resampling filter %s; dinoscale evaluates with bicubic",
            card.source,
            config["resample"],
        )
    if config.get("do_normalize", True) is False:
        zeros, ones = [0.0] * len(card.mean), [1.0] * len(card.std)
        config = {**config, "image_mean": zeros, "image_std": ones}
    found = {"mean": config.get("image_mean"), "std": config.get("image_std"), **_sizes(config)}
    return replace(card, **{key: value for key, value in found.items() if value is not None})


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Short side and crop in pixels, if our preprocessing can do the same."""
    size, crop = config.get("size"), config.get("crop_size")
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    if isinstance(crop, dict):
        crop = crop.get("height") if crop.get("height") == crop.get("width") else None
    if not config.get("do_center_crop", False) or size is None or crop is None:
        return {}
    return {"resize": size, "crop": crop}
