"""Target `hf`: a folder that `transformers.AutoModel.from_pretrained` opens.

A plain ViT becomes a ViTModel, one with a mask token, layer scale or SwiGLU a Dinov2Model, one with
registers a Dinov2WithRegistersModel, one with rotary positions a DINOv3ViTModel; a network that
none computes exactly is refused. Every version of the library reads these tensor names. The class
token is `last_hidden_state[:, 0]` and also `pooler_output`: ViTModel initialises a random pooler if
a file has none, so ours is the identity.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinoscale.convert.card import BackboneCard, Preprocessing
from dinoscale.convert.coverage import Coverage
from dinoscale.convert.formats.hf_dinov3 import (
    hf_dinov3_config,
    hf_dinov3_tensors,
    unlike_hf_dinov3,
)
from dinoscale.convert.parity import Outputs, Reopened, to_meta
from dinoscale.convert.source import read_source
from dinoscale.convert.weights import Weights
from dinoscale.errors import ConversionError
from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.export import PlainViT, RotaryViT, build_plain
from dinoscale.models.zoo import swiglu_width
from dinoscale.runtime.outputs import write_tensors

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
_BICUBIC = 3  # as Pillow numbers it

_TOP = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "mask_token": "embeddings.mask_token",
    "reg_token": "embeddings.register_tokens",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_VIT_LAYERS = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINOV2_LAYERS = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SWIGLU_LAYERS = {**_DINOV2_LAYERS, "mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
_MLP_RATIO = 4  # from which the library computes the width of a SwiGLU as `swiglu_width` does


def write_hf(folder: Path, weights: Weights) -> None:
    """Write weights, config and the settings of the image processor.

    Raises:
        ConversionError: no model of the library computes the same outputs.
    """
    model = _architecture(weights)
    if isinstance(model, RotaryViT):
        tensors = dict(hf_dinov3_tensors(weights, model))
        config = hf_dinov3_config(model, weights.card)
    else:
        tensors = dict(_renamed(weights, model))
        config = _config(model, weights.card)
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    write_tensors(whole, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    dtype = str(weights.backbone["cls_token"].dtype).removeprefix("torch.")
    config |= {"dtype": dtype, "torch_dtype": dtype}
    settings = {CONFIG_FILE: config, PREPROCESSOR_FILE: _preprocessor(weights.card)}
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _architecture(weights: Weights) -> PlainViT | RotaryViT:
    """The architecture without its weights, if transformers has the same."""
    with torch.device("meta"):
        model = build_plain(**vars(weights.card.backbone))
    reason = _mismatch(model)
    if reason:
        raise ConversionError(
            f"{weights.card.backbone.name} has no exact form in transformers: {reason}."
            " Use --to timm, torchscript or onnx"
        )
    assert isinstance(model, PlainViT | RotaryViT)
    return model


def _mismatch(model: nn.Module) -> str | None:
    """First reason why no model of the library is equivalent, or None."""
    if not isinstance(model, PlainViT | RotaryViT):
        return "it is no ViT"
    if isinstance(model, RotaryViT) and (reason := unlike_hf_dinov3(model)):
        return reason
    if isinstance(model, PlainViT) and model.prefix_slots > 1:
        return "its registers have positions"
    if not isinstance(model.norm_pre, nn.Identity):
        return "it normalises before the first block"
    any_width = isinstance(model, RotaryViT)
    for block in cast(Any, model.blocks):
        attn, mlp = block.attn, block.mlp
        extra = (attn.q_norm, attn.k_norm, getattr(attn, "norm", None), getattr(mlp, "norm", None))
        norms = (block.norm1, block.norm2, model.norm)
        checks = (
            (any(not isinstance(each, nn.Identity | None) for each in extra), "it has more norms"),
            (type(mlp).__name__ not in ("Mlp", "GluMlp"), f"its MLP is a {type(mlp).__name__}"),
            (not _has_known_activation(mlp), "its activation is neither GELU nor SwiGLU"),
            (
                not any_width
                and _is_gated(model)
                and swiglu_width(mlp.fc2.out_features) != mlp.fc2.in_features,
                f"its SwiGLU is {mlp.fc2.in_features} wide",
            ),
            (any(not isinstance(norm, nn.LayerNorm) for norm in norms), "it has no layer norms"),
            (len({getattr(norm, "eps", None) for norm in norms}) > 1, "its norms differ"),
            (attn.proj.bias is None, "its attention has no output bias"),
        )
        for fails, reason in checks:
            if fails:
                return reason
    return None


def _has_known_activation(mlp: Any) -> bool:
    """Whether an MLP has GELU, or the SiLU of its first half as a gate."""
    if type(mlp).__name__ == "GluMlp":
        return isinstance(mlp.act, nn.SiLU) and not mlp.gate_last
    return isinstance(getattr(mlp, "act", None), nn.GELU)


def _is_gated(model: PlainViT | RotaryViT) -> bool:
    return type(model.blocks[0].get_submodule("mlp")).__name__ == "GluMlp"


def _has_layer_scale(model: PlainViT) -> bool:
    return not isinstance(model.blocks[0].ls1, nn.Identity)


def _is_dinov2(model: PlainViT, card: BackboneCard) -> bool:
    special = model.reg_token is not None or card.backbone.mask_token
    return special or _has_layer_scale(model) or _is_gated(model)


def _config(model: PlainViT, card: BackboneCard) -> dict[str, Any]:
    """Content of config.json."""
    block, projection = model.blocks[0], model.patch_embed.proj
    width, hidden = projection.out_channels, block.mlp.fc1.out_features
    common = {
        "hidden_size": width,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.norm.eps,
        "image_size": card.backbone.img_size,
        "patch_size": projection.kernel_size[0],
        "num_channels": projection.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    if not _is_dinov2(model, card):
        return {
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "intermediate_size": hidden,
            "pooler_act": "linear",
            "pooler_output_size": width,
            **common,
        }
    ratio = hidden // width if hidden % width == 0 else hidden / width
    dinov2 = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "mlp_ratio": _MLP_RATIO if _is_gated(model) else ratio,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": _is_gated(model),
        **common,
    }
    if model.reg_token is None:
        return dinov2
    return {
        **dinov2,
        "architectures": ["Dinov2WithRegistersModel"],
        "model_type": "dinov2_with_registers",
        "num_register_tokens": model.num_prefix - 1,
    }


def _preprocessor(card: BackboneCard) -> dict[str, Any]:
    """Content of preprocessor_config.json: resize, center crop, normalisation."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(card.mean) == 3,
        "do_resize": True,
        "size": {"shortest_edge": card.resize},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": card.crop, "width": card.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(card.mean),
        "image_std": list(card.std),
    }


def _renamed(weights: Weights, model: PlainViT) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under the library's names, and neutral values for those that only it has."""
    state, dinov2 = weights.backbone, _is_dinov2(model, weights.card)
    layers = _VIT_LAYERS
    if dinov2:
        layers = _SWIGLU_LAYERS if _is_gated(model) else _DINOV2_LAYERS
    width = model.patch_embed.proj.out_channels
    like = state["cls_token"]
    for name, tensor in state.items():
        if name == "pos_embed":
            # A class token without a position gets the position zero.
            zero = like.new_zeros(1, 1 - model.prefix_slots, width)
            yield "embeddings.position_embeddings", torch.cat((zero, tensor), dim=1)
        elif name in _TOP:
            yield _TOP[name], tensor
        else:
            yield from _renamed_in_layer(name, tensor, layers)
    if dinov2:
        if "mask_token" not in state:
            yield "embeddings.mask_token", like.new_zeros(1, width)  # required, and unused
        if not _has_layer_scale(model):
            for index in range(len(model.blocks)):
                for scale in ("layer_scale1", "layer_scale2"):
                    yield f"encoder.layer.{index}.{scale}.lambda1", like.new_ones(width)
    else:
        yield "pooler.dense.weight", torch.eye(width, dtype=like.dtype)
        yield "pooler.dense.bias", like.new_zeros(width)


def _renamed_in_layer(
    name: str, tensor: Tensor, layers: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """A tensor `blocks.I.PART.KIND` under the library's name; qkv becomes three tensors."""
    _, index, part_and_kind = name.split(".", 2)
    part, kind = part_and_kind.rsplit(".", 1)
    prefix = f"encoder.layer.{index}"
    if part == "attn.qkv":
        for role, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            yield f"{prefix}.attention.attention.{role}.{kind}", rows
    elif part in ("ls1", "ls2"):
        yield f"{prefix}.layer_scale{part[-1]}.lambda1", tensor
    else:
        yield f"{prefix}.{layers[part]}.{kind}", tensor


def reopen_hf(folder: Path, *, own_resize: bool = False) -> Reopened:
    """Open the folder with transformers, in float32.

    Args:
        folder: written by `write_hf`.
        own_resize: accept images of other sizes, by the library's rule for position embeddings.
    """
    ensure_torchvision()
    from transformers import AutoModel
    from transformers.utils import logging as library_logging

    library_logging.disable_progress_bar()
    model, found = AutoModel.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, local_files_only=True
    )
    model.eval()
    coverage = Coverage(
        expected=len(model.state_dict()),
        missing=tuple(sorted(found["missing_keys"])),
        unexpected=tuple(sorted(found["unexpected_keys"])),
        reshaped=tuple(str(each) for each in found["mismatched_keys"]),
    )
    num_prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    # The Dinov2 models always interpolate and have no switch.
    has_switch = model.config.model_type == "vit"
    switch = {"interpolate_pos_encoding": True} if own_resize and has_switch else {}

    def forward(images: Tensor) -> Outputs:
        out = model(pixel_values=images, **switch)
        return {"cls": out.pooler_output, "patches": out.last_hidden_state[:, num_prefix:]}

    found = read_source(folder)
    descriptions = (_preprocessing_of(folder), found.card.preprocessing)
    return Reopened(forward, found.backbone, descriptions, coverage, to_meta(model, forward))


def _preprocessing_of(folder: Path) -> Preprocessing:
    """Preprocessing of the library's image processor for the folder."""
    from transformers import AutoImageProcessor

    config = AutoImageProcessor.from_pretrained(folder, local_files_only=True).to_dict()
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    return Preprocessing(mean, std, config["size"]["shortest_edge"], config["crop_size"]["height"])
