"""ViTs of DINOv3 in timm, `vit_*_patch16_dinov3`: names of tensors, architecture and arguments.

Source: github.com/huggingface/pytorch-image-models, `timm.models.eva`. Layer scales are parameters
of a block, both factors of a SwiGLU and the biases of queries and values are tensors of their own;
keys have no bias. Periods follow from `rope_temperature`. Nothing there is for training: neither
the mask token nor the norm of local crops.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dinoscale.convert.card import BackboneShape
from dinoscale.convert.formats.dinov3 import (
    key_bias_acts,
    model_name,
    ratio_of,
    rope_of,
    rotary_shape,
    unlike_libraries,
    without_masked_bias,
)
from dinoscale.convert.formats.reference import has_gated_mlp
from dinoscale.convert.weights import Weights
from dinoscale.errors import CheckpointError, ConversionError
from dinoscale.models.export import RotaryViT
from dinoscale.models.rope import Rope

NORM_EPS = 1e-5  # of all of them; config.json has no place for another
_ARCHITECTURE = re.compile(
    r"vit_(tiny|small|small_plus|base|large|huge_plus|7b)_patch16_dinov3(?:_qkvb)?(?:\..*)?"
)
_NUM_HEADS = {"tiny": 3, "small": 6, "small_plus": 6, "base": 12, "large": 16, "huge_plus": 20}
_NUM_HEADS |= {"7b": 32}
BASE = 100.0  # of the periods, `rope_temperature`
_RENAMED = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}  # inside a block
_QUERIES, _VALUES, _BIAS = ".attn.q_bias", ".attn.v_bias", ".attn.qkv.bias"
_GATE, _FACTOR, _BOTH = ".mlp.fc1_g.", ".mlp.fc1_x.", ".mlp.fc1."
_PARTS = (_GATE, _FACTOR)
_WITHOUT_BIASED = "vit_7b_patch16_dinov3"  # has no second model, with biases
# model_args beside those of plain ViTs that the tensors show, or that are read here.
KNOWN_ARGS = {
    *("qkv_bias", "swiglu_mlp", "swiglu_align_to", "num_reg_tokens", "rope_temperature"),
    *("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),  # in training only
}


def is_timm_dinov3(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], *, ours: bool = False
) -> bool:
    """Whether tensors are those of a network of DINOv3 under timm's names.

    Without a config.json, by its layers: others of this family have learned positions, or no
    registers.

    Args:
        state: the tensors.
        settings: config.json, empty if there is none.
        ours: whether we wrote the file, and so none of the others.
    """
    if "architecture" in settings:
        return _ARCHITECTURE.fullmatch(str(settings["architecture"])) is not None
    layers = {"blocks.0.gamma_1", "blocks.0.attn.qkv.weight", *(() if ours else ("reg_token",))}
    return layers <= state.keys() and "pos_embed" not in state


def from_timm_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names; one without its counterpart keeps its name.

    Biases of queries and values are joined with zeros for the keys.

    Raises:
        CheckpointError: two that are joined do not fit together.
    """
    ours = {}
    for name, tensor in state.items():
        block, _, last = name.rpartition(".")
        if last in _RENAMED:
            ours[f"{block}.{_RENAMED[last]}"] = tensor
        elif name.endswith(_QUERIES) and (partner := name.replace(_QUERIES, _VALUES)) in state:
            parts = (tensor, torch.zeros_like(tensor), state[partner])
            ours[name.replace(_QUERIES, _BIAS)] = _joined(name, *parts)
        elif _GATE in name and (partner := name.replace(_GATE, _FACTOR)) in state:
            ours[name.replace(_GATE, _BOTH)] = _joined(name, tensor, state[partner])
        elif not _is_joined(name, state):
            ours[name] = tensor
    return ours


def _is_joined(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is the later one of two that are one of ours."""
    pairs = ((_VALUES, _QUERIES), (_FACTOR, _GATE))
    return any(later in name and name.replace(later, first) in state for later, first in pairs)


def _joined(name: str, *parts: Tensor) -> Tensor:
    if any(part.shape != parts[0].shape for part in parts):
        raise CheckpointError(f"holds {name} and its counterpart of different shapes")
    return torch.cat(parts)


def timm_dinov3_shape(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], *, num_heads: int | None
) -> BackboneShape:
    """The architecture, from a backbone under our names, and config.json if there is one.

    Raises:
        CheckpointError: the tensors are not those of a ViT of DINOv3, nothing tells the number of
            heads, or `rope_temperature` is no number above 0.
    """
    args, match = settings.get("model_args") or {}, None
    if "architecture" in settings:
        match = _ARCHITECTURE.fullmatch(settings["architecture"])
    base = args.get("rope_temperature", BASE)
    if type(base) not in (int, float) or not base > 0:
        raise CheckpointError(f"has a config.json with rope_temperature {base!r}, not above 0")
    default = None if match is None else _NUM_HEADS[match[1]]
    shape = rotary_shape(
        state,
        rope=Rope(float(base)),
        mask_key_bias="blocks.0.attn.qkv.bias" in state,
        num_heads=args.get("num_heads") or default or num_heads,
    )
    return replace(shape, norm_eps=NORM_EPS)


def as_timm_dinov3(weights: Weights) -> Weights:
    """Weights as timm has them: without a bias of the keys.

    Raises:
        ConversionError: it acts, there is no layer scale, or the positions follow another rule.
    """
    if "blocks.0.ls1.gamma" not in weights.backbone:
        raise ConversionError("timm's ViTs of DINOv3 have layer scale, and this has none")
    reason = unlike_libraries(rope_of(weights.card.backbone))
    if reason:
        raise ConversionError(f"timm's ViTs of DINOv3 have no such positions: {reason}")
    weights = without_masked_bias(weights)
    if key_bias_acts(weights):
        raise ConversionError(
            "timm's ViTs of DINOv3 have no bias of the keys, and that of this one acts: use --to hf"
        )
    return weights


def timm_dinov3_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone of ours, as `as_timm_dinov3` returns it, under timm's names."""
    gated, theirs = has_gated_mlp(state), dict[str, Tensor]()
    for name, tensor in state.items():
        if gated and _BOTH in name:
            halves = tensor.chunk(2)
            theirs |= {name.replace(_BOTH, part): x for part, x in zip(_PARTS, halves, strict=True)}
        elif name.endswith(_BIAS):
            of_queries, _, of_values = tensor.chunk(3)
            theirs[name.replace(_BIAS, _QUERIES)] = of_queries
            theirs[name.replace(_BIAS, _VALUES)] = of_values
        else:
            for theirs_, ours in _RENAMED.items():
                name = name.replace(f".{ours}", f".{theirs_}")
            theirs[name] = tensor
    return theirs


def timm_dinov3_arguments(weights: Weights, network: RotaryViT) -> tuple[str, dict[str, Any]]:
    """The architecture in timm whose layers these weights have, and what to change in it.

    Args:
        weights: as `as_timm_dinov3` returns them.
        network: built for them.
    """
    state, attention = weights.backbone, network.blocks[0].get_submodule("attn")
    width, patch_size = network.embed_dim, network.patch_embed.proj.kernel_size[0]
    gated, biased = has_gated_mlp(state), "blocks.0.attn.qkv.bias" in state
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    name = model_name(width, gated=gated)
    base = network.rope.base
    arguments = {
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": len(network.blocks),
        "num_heads": attention.num_heads,
        "num_reg_tokens": network.num_prefix - 1,
        "qkv_bias": biased,
        "mlp_ratio": ratio_of(hidden, width),
        "rope_temperature": base,
    }
    if gated:
        arguments["swiglu_align_to"] = 1  # the width is as it is
    has_biased = biased and name != _WITHOUT_BIASED
    return f"{name}_qkvb" if has_biased else name, arguments
