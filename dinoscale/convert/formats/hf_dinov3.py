"""ViTs of DINOv3 in Hugging Face's transformers, `DINOv3ViTModel`: both directions.

Source: github.com/huggingface/transformers, `models/dinov3_vit`: tensor names of saved files, and
of modules since version 5, which add `model.`. Queries, keys and values are three layers there and
one here, the keys without a bias in released models; so are the gate and the values of a SwiGLU.
Positions follow from `rope_theta`, at any size of image.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.convert.formats.dinov3 import (
    dinov3_card,
    key_bias_is_masked,
    rotary_shape,
    unlike_libraries,
)
from dinoscale.convert.formats.huggingface import completed
from dinoscale.convert.formats.reference import NO_BACKBONE, has_gated_mlp
from dinoscale.convert.read_files import Content
from dinoscale.convert.weights import Weights
from dinoscale.errors import CheckpointError
from dinoscale.models.export import RotaryViT
from dinoscale.models.rope import Rope

log = logging.getLogger(__name__)

_MODEL_TYPE = "dinov3_vit"
_PATCHES = "embeddings.patch_embeddings.weight"  # of no other ViT of the library
# The library's defaults for entries that a config.json omits.
_NORM_EPS, _BASE, _NUM_HEADS, _IMAGE_SIZE = 1e-5, 100.0, 6, 224

_OUTER = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj.weight": _PATCHES,
    "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
}
_OURS = {theirs: ours for ours, theirs in _OUTER.items()}
_IN_BLOCK = {  # parts of a block under our names
    "norm1": "norm1",
    "attn.proj": "attention.o_proj",
    "norm2": "norm2",
    "mlp.fc2": "mlp.down_proj",
}
_ATTENTION = tuple(f"attention.{role}_proj" for role in "qkv")  # rows of attn.qkv in this order
_GATE, _UP = "mlp.gate_proj", "mlp.up_proj"  # rows of mlp.fc1; without a gate it is the second
_BLOCK = re.compile(r"(?:model\.)?layer\.(\d{1,9})\.(.+)\.(weight|bias|lambda1)")


def is_hf_dinov3(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of a DINOv3ViTModel, or a config.json says so."""
    return settings.get("model_type") == _MODEL_TYPE or _PATCHES in state


def read_hf_dinov3(
    state: Mapping[str, Tensor], content: Content, *, num_heads: int | None
) -> Weights:
    """Rename the tensors of a DINOv3ViTModel, and read its architecture and preprocessing.

    Args:
        state: tensors of the file.
        content: with config.json and preprocessor_config.json if they are beside it.
        num_heads: used where there is no config.json; None guesses those of the released model of
            this width, else 64 channels a head, with a warning.

    Raises:
        CheckpointError: it is another model, nothing tells the number of heads, or config.json has
            options that we do not build.
    """
    keys_have_bias = any(name.endswith(f"{_ATTENTION[1]}.bias") for name in state)
    backbone, left_out = from_hf_dinov3(state)
    settings = content.settings or {}
    kind = settings.get("model_type", _MODEL_TYPE)
    if kind != _MODEL_TYPE:
        raise CheckpointError(f"has a config.json with model_type {kind!r}, need {_MODEL_TYPE!r}")
    gated = has_gated_mlp(backbone)
    activation = "silu" if gated else "gelu"
    for key, only in (("use_gated_mlp", gated), ("hidden_act", activation)):
        if settings.get(key, only) != only:
            raise CheckpointError(f"has a config.json with {key} {settings[key]!r}, need {only!r}")
    if content.settings is None:
        log.warning(
            "%s has no config.json beside it: taking transformers' layer_norm_eps %g and"
            " rope_theta %g",
            *(content.name, _NORM_EPS, _BASE),
        )
    else:
        num_heads = settings.get("num_attention_heads", _NUM_HEADS)
    base = settings.get("rope_theta", _BASE)
    if type(base) not in (int, float) or not base > 0:
        raise CheckpointError(f"has a config.json with rope_theta {base!r}, need a number above 0")
    shape = rotary_shape(
        backbone,
        rope=Rope(float(base)),
        mask_key_bias="blocks.0.attn.qkv.bias" in backbone and not keys_have_bias,
        num_heads=num_heads,
    )
    eps = settings.get("layer_norm_eps", _NORM_EPS)
    side = settings.get("image_size", _IMAGE_SIZE)
    shape = replace(shape, norm_eps=eps, img_size=_whole_patches(side, shape))
    card = dinov3_card(shape, source=content.name)
    return Weights(backbone, None, completed(card, content), "hf", left_out)


def _whole_patches(given: object, shape: BackboneShape) -> int:
    """The side of images in pixels, which positions do not need, as a multiple of the patch.

    Raises:
        CheckpointError: `image_size` is neither a side nor a list of two equal ones.
    """
    sides = given if isinstance(given, list) else [given, given]
    side = sides[0] if sides else None
    if sides != [side, side] or type(side) is not int or side < 1:
        raise CheckpointError(
            f"has a config.json with image_size {given!r}, need pixels of a square, such as 224"
        )
    patch_size = shape.patch_size or 1
    return max(1, side // patch_size) * patch_size


def from_hf_dinov3(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors under our names, and the names of those outside the backbone.

    A tensor without a counterpart keeps its name, so that `weights_file.build` refuses it.

    Raises:
        CheckpointError: layers that are one of ours do not fit together, or one is there twice.
    """
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}  # of a block: names without it
    left_out = []
    for name, tensor in state.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            if name.startswith(NO_BACKBONE):
                left_out.append(name)
            else:
                ours[_OURS.get(name, name)] = tensor
            continue
        block = parts.setdefault(match[1], {})
        if block.setdefault(f"{match[2]}.{match[3]}", tensor) is not tensor:
            raise CheckpointError(f"holds {name!r} under two names")
    for index, block in parts.items():
        ours |= {f"blocks.{index}.{name}": tensor for name, tensor in _our_block(block)}
    token, registers = ours.get("mask_token"), ours.get("reg_token")
    if token is not None and token.ndim == 3:
        ours["mask_token"] = token.flatten(0, 1)
    if registers is not None and not registers.numel():
        del ours["reg_token"]
    return ours, tuple(left_out)


def _our_block(block: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a block under our names in it."""
    left = dict(block)
    for kind in ("weight", "bias"):
        names = [f"{layer}.{kind}" for layer in _ATTENTION]
        rows = [left.pop(name, None) for name in names]
        yield from _joined(f"attn.qkv.{kind}", names, rows, zeros=kind == "bias")
        names = [f"{layer}.{kind}" for layer in (_GATE, _UP)]
        gated = names[0] in left
        rows = [left.pop(name, None) for name in (names if gated else names[1:])]
        yield from _joined(f"mlp.fc1.{kind}", names, rows, zeros=False)
        for ours, theirs in _IN_BLOCK.items():
            if (tensor := left.pop(f"{theirs}.{kind}", None)) is not None:
                yield f"{ours}.{kind}", tensor
    for number in "12":
        if (tensor := left.pop(f"layer_scale{number}.lambda1", None)) is not None:
            yield f"ls{number}.gamma", tensor
    yield from left.items()


def _joined(
    ours: str, names: list[str], rows: list[Tensor | None], *, zeros: bool
) -> Iterator[tuple[str, Tensor]]:
    """Rows of layers as one tensor of ours; missing ones are zero, or each keeps its name."""
    there = [each for each in rows if each is not None]
    if not there:
        return
    if len({each.shape for each in there}) > 1:
        raise CheckpointError(f"holds {', '.join(names)} of different shapes")
    if len(there) < len(rows) and not zeros:
        for name, each in zip(names, rows, strict=True):
            if each is not None:
                yield name, each
        return
    yield ours, torch.cat([torch.zeros_like(there[0]) if x is None else x for x in rows])


def unlike_hf_dinov3(model: RotaryViT) -> str | None:
    """Why a DINOv3ViTModel has no such positions, or None."""
    head_dim = 4 * len(model.periods)
    if len(torch.arange(0, 1, 4 / head_dim)) != head_dim // 4:  # as the library counts periods
        return f"its heads have {head_dim} channels, for which the library miscounts the periods"
    return unlike_libraries(model.rope)


def hf_dinov3_config(model: RotaryViT, card: BackboneCard) -> dict[str, Any]:
    """Content of config.json."""
    block, projection = model.blocks[0], model.patch_embed.proj
    qkv, mlp = block.get_submodule("attn.qkv"), block.get_submodule("mlp")
    gated = type(mlp).__name__ == "GluMlp"
    biased = qkv.bias is not None
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": _MODEL_TYPE,
        "hidden_size": model.embed_dim,
        "intermediate_size": mlp.get_submodule("fc2").in_features,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.get_submodule("attn").num_heads,
        "num_register_tokens": model.num_prefix - 1,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "layer_norm_eps": model.norm.eps,
        "rope_theta": model.rope.base,
        "query_bias": biased,
        "key_bias": biased and not key_bias_is_masked(card.backbone),
        "value_bias": biased,
        "proj_bias": True,
        "mlp_bias": True,
        "image_size": card.backbone.img_size,
        "patch_size": projection.kernel_size[0],
        "num_channels": projection.in_channels,
    }


def hf_dinov3_tensors(weights: Weights, model: RotaryViT) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under the library's names, and neutral values for those that only it has."""
    state, like = weights.backbone, weights.backbone["cls_token"]
    masked = key_bias_is_masked(weights.card.backbone)
    gated = has_gated_mlp(state)
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            shape = (1, 1, -1) if name == "mask_token" else tensor.shape
            yield _OUTER.get(name, name), tensor.view(shape)
            continue
        _, index, inner = name.split(".", 2)
        part, kind = inner.rsplit(".", 1)
        for theirs, rows in _their_layers(part, tensor, gated=gated):
            if not (masked and kind == "bias" and theirs == _ATTENTION[1]):
                last = "lambda1" if kind == "gamma" else kind
                yield f"layer.{index}.{theirs}.{last}", rows
    width = like.shape[-1]
    if "mask_token" not in state:
        yield _OUTER["mask_token"], like.new_zeros(1, 1, width)  # required, and unused
    if "reg_token" not in state:
        yield _OUTER["reg_token"], like.new_zeros(1, 0, width)
    if isinstance(model.blocks[0].get_submodule("ls1"), nn.Identity):
        for number in range(len(model.blocks)):
            for branch in "12":
                yield f"layer.{number}.layer_scale{branch}.lambda1", like.new_ones(width)


def _their_layers(part: str, tensor: Tensor, *, gated: bool) -> Iterator[tuple[str, Tensor]]:
    """The layers of the library that are a part of one of our blocks, and their rows."""
    if part == "attn.qkv":
        yield from zip(_ATTENTION, tensor.chunk(3), strict=True)
    elif part == "mlp.fc1" and gated:
        yield from zip((_GATE, _UP), tensor.chunk(2), strict=True)
    elif part == "mlp.fc1":
        yield _UP, tensor
    elif part in ("ls1", "ls2"):
        yield f"layer_scale{part[-1]}", tensor
    else:
        yield _IN_BLOCK[part], tensor
