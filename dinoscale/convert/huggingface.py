"""ViTModel and ViTForImageClassification of Hugging Face's transformers, under our names.

Source: github.com/huggingface/transformers, `models/vit`: names of saved files, and those that
modules have since version 5. Queries, keys and values are three layers there and one here.
Differs: at other image sizes than the position embedding's, transformers resizes it to the size
(`interpolate_pos_encoding=True`), and our forward by the reference's rule.
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
from dinoscale.convert.files import Content
from dinoscale.convert.reference import NO_BACKBONE, guess_shape, reference_card
from dinoscale.convert.weights import Weights
from dinoscale.errors import CheckpointError

log = logging.getLogger(__name__)

DEFAULT_NORM_EPS = 1e-12  # of ViTConfig; the reference and timm have 1e-6

_OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_IN_BLOCK = {
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
}
_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d{1,9})\.(.+)\.(weight|bias)")


def is_huggingface(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of transformers' ViTs, or a config.json says so."""
    names = ("embeddings.cls_token", "vit.embeddings.cls_token")
    return "model_type" in settings or any(name in state for name in names)


def read_huggingface(
    state: Mapping[str, Tensor], content: Content, *, num_heads: int | None
) -> Weights:
    """Rename the tensors of a ViT of transformers, and read how it is built and fed.

    Args:
        state: tensors of the file.
        content: with config.json and preprocessor_config.json if they lie beside it.
        num_heads: None takes what config.json says, else 64 channels a head.

    Raises:
        CheckpointError: it is another model, or config.json asks for what we do not build.
    """
    settings = content.settings or {"layer_norm_eps": DEFAULT_NORM_EPS}
    for key, only in (("model_type", "vit"), ("hidden_act", "gelu")):
        if settings.get(key, only) != only:
            raise CheckpointError(f"has a config.json with {key} {settings[key]!r}, need {only!r}")
    if content.settings is None:
        log.warning(
            "%s has no config.json beside it: taking transformers' layer_norm_eps %g",
            content.name,
            DEFAULT_NORM_EPS,
        )
    backbone, left_out = from_huggingface(state)
    shape = guess_shape(backbone, num_heads=num_heads or settings.get("num_attention_heads"))
    eps = settings.get("layer_norm_eps", DEFAULT_NORM_EPS)
    card = reference_card(replace(shape, norm_eps=eps), source=content.name)
    card = _with_preprocessing(card, content.preprocessing or {})
    return Weights(backbone, None, parse_card(card.to_json()), "hf", left_out)


def from_huggingface(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under our names, and the names of those that are no part of a backbone.

    What has no counterpart keeps its name, so that whoever builds the backbone refuses it.
    """
    renamed: dict[str, Tensor] = {}
    left_out = []
    for full_name, tensor in state.items():
        name = full_name.removeprefix("vit.")
        if name.startswith(NO_BACKBONE):
            left_out.append(full_name)
            continue
        match = _BLOCK.fullmatch(name)
        if match and match[2] in _IN_BLOCK:
            ours = f"blocks.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"
        else:
            ours = _OUTER.get(name, full_name)
        if ours in renamed:
            raise CheckpointError(f"holds {full_name!r} under two names")
        renamed[ours] = tensor
    return _joined(renamed), tuple(left_out)


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join attn.q, attn.k, attn.v of each block to attn.qkv, rows in this order."""
    joined = dict(state)
    for name in state:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if ".attn.q." not in name or not all(part in state for part in parts):
            continue
        try:
            whole = torch.cat([joined.pop(part) for part in parts])
        except RuntimeError as error:
            raise CheckpointError(f"holds q, k and v of other widths at {name}") from error
        joined[name.replace(".attn.q.", ".attn.qkv.")] = whole
    return joined


def _with_preprocessing(card: BackboneCard, told: Mapping[str, Any]) -> BackboneCard:
    """Mean and std of preprocessor_config.json; sizes stay those of the reference's protocol."""
    if "image_mean" not in told or "image_std" not in told:
        return card
    if told["image_mean"] == [0.5] * card.backbone.in_chans:
        log.warning(
            "%s: preprocessor_config.json says mean 0.5. That of the published facebook/dino-vit*"
            " says so too, and they were trained with ImageNet's mean and std: if these are they,"
            " correct image_mean and image_std in it",
            card.source,
        )
    return replace(card, mean=told["image_mean"], std=told["image_std"])
