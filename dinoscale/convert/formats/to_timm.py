"""Target `timm`: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dinoscale.convert.card import METADATA_KEY, BackboneCard, Preprocessing
from dinoscale.convert.coverage import coverage_of
from dinoscale.convert.formats.reference import has_gated_mlp
from dinoscale.convert.formats.timm_dinov3 import (
    NORM_EPS,
    timm_dinov3_arguments,
    timm_dinov3_tensors,
)
from dinoscale.convert.parity import Outputs, Reopened, to_meta
from dinoscale.convert.source import read_source
from dinoscale.convert.weights import Weights
from dinoscale.errors import ConversionError
from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.export import RotaryViT, build_plain
from dinoscale.models.zoo import build_backbone, timm_arguments
from dinoscale.runtime.outputs import write_tensors

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_SMALL_EPS = 1e-5  # a difference of the variance in a layer norm that may be ignored


def write_timm(folder: Path, weights: Weights) -> None:
    """Write weights and config.

    Raises:
        ConversionError: the layer norms have an epsilon that timm's config cannot store.
    """
    _require_own_norms(weights)
    metadata = {METADATA_KEY: weights.card.to_json(), "format": "pt"}
    state = weights.backbone
    named = timm_dinov3_tensors(state) if weights.is_rotary else state  # else as it names them
    tensors = {name: tensor.clone().contiguous() for name, tensor in named.items()}
    write_tensors(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    text = json.dumps(timm_config(weights), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n")


def _require_own_norms(weights: Weights) -> None:
    """Refuse an epsilon other than the architecture's; the proof shows if a small one matters."""
    shape = weights.card.backbone
    if shape.name == "resnet50":
        return
    with torch.device("meta"):
        network: Any = build_backbone(**vars(shape))
        plain: Any = build_backbone(**vars(replace(shape, norm_eps=None)))
    own = NORM_EPS if weights.is_rotary else plain.norm.eps
    if abs(network.norm.eps - own) > _SMALL_EPS:
        raise ConversionError(
            f"its layer norms have epsilon {network.norm.eps:g}, and timm's config.json has no"
            f" place for another than the {own:g} of {shape.name}: use --to hf, torchscript or onnx"
        )


def timm_config(weights: Weights) -> dict[str, Any]:
    """The config.json of timm's hub format: architecture, its sizes, and preprocessing."""
    card, shape = weights.card, weights.card.backbone
    is_vit = shape.name != "resnet50"
    pool = "token" if is_vit else "avg"
    architecture, changed = _architecture(weights)
    model_args: dict[str, Any] = {**changed, "in_chans": shape.in_chans, "global_pool": pool}
    if is_vit:
        model_args["img_size"] = shape.img_size
    first = "patch_embed.proj" if is_vit else "conv1"
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": weights.backbone[
            "norm.weight" if is_vit else "layer4.2.bn3.weight"
        ].numel(),
        "global_pool": pool,
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [shape.in_chans, card.crop, card.crop],
            "fixed_input_size": is_vit,
            "interpolation": "bicubic",
            "crop_pct": _crop_pct(card),
            "crop_mode": "center",
            "mean": list(card.mean),
            "std": list(card.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": first,
            "classifier": "head" if is_vit else "fc",
        },
    }


def _architecture(weights: Weights) -> tuple[str, dict[str, Any]]:
    """The model of timm that weights are for, and the sizes to give it."""
    shape = weights.card.backbone
    if weights.is_rotary:
        with torch.device("meta"):
            network = build_plain(**vars(shape))
        assert isinstance(network, RotaryViT)
        return timm_dinov3_arguments(weights, network)
    sizes = {
        "patch_size": shape.patch_size,
        "embed_dim": shape.embed_dim,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
    }
    given = {key: value for key, value in sizes.items() if value is not None}
    architecture, changed = timm_arguments(shape.name, **given)
    if has_gated_mlp(weights.backbone):
        return architecture, {**changed, "mlp_ratio": _mlp_ratio(weights.backbone)}
    return architecture, {**changed}


def _mlp_ratio(state: Mapping[str, Tensor]) -> float:
    """Ratio of a SwiGLU's joint width to that of a token; timm takes floor(token x ratio)."""
    joint, width = state["blocks.0.mlp.fc1.weight"].shape
    ratio = joint / width
    return ratio if int(width * ratio) == joint else math.nextafter(ratio, math.inf)


def _crop_pct(card: BackboneCard) -> float:
    """Ratio of the crop to the resized image; timm resizes to floor(crop / ratio)."""
    share = card.crop / card.resize
    return share if math.floor(card.crop / share) == card.resize else math.nextafter(share, 0)


def reopen_timm(folder: Path, *, own_resize: bool = False) -> Reopened:
    """Open the folder with timm.

    Args:
        folder: written by `write_timm`.
        own_resize: accept images of other sizes, by timm's rule for position embeddings.
    """
    ensure_torchvision()
    import timm

    # What timm says of a load names the temporary folder that is being compared.
    logging.getLogger("timm.models").setLevel(logging.WARNING)
    dynamic = {"dynamic_img_size": True} if own_resize else {}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **dynamic).eval()
    state = load_file(folder / WEIGHTS_FILE)
    coverage = coverage_of(state, model.state_dict())
    found = read_source(folder)
    num_prefix = getattr(model, "num_prefix_tokens", None)

    def forward(images: Tensor) -> Outputs:
        features = model.forward_features(images)
        cls = model.forward_head(features)
        return (
            {"cls": cls}
            if num_prefix is None
            else {"cls": cls, "patches": features[:, num_prefix:]}
        )

    descriptions = (_preprocessing_of(model), found.card)
    return Reopened(forward, found.backbone, descriptions, coverage, to_meta(model, forward))


def _preprocessing_of(model: Any) -> Preprocessing:
    """Preprocessing of timm's own transform for a model."""
    import timm

    config = timm.data.resolve_model_data_config(model)
    resize, crop = timm.data.create_transform(**config).transforms[:2]
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), resize.size, crop.size[0])
