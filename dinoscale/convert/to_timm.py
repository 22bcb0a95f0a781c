"""Target `timm`: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoscale.convert.card import METADATA_KEY, BackboneCard
from dinoscale.convert.coverage import coverage_of
from dinoscale.convert.parity import Outputs, Reopened
from dinoscale.convert.weights import Weights
from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.zoo import timm_arguments

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


def write_timm(folder: Path, weights: Weights) -> None:
    """Write weights and config; names of tensors are timm's already."""
    metadata = {METADATA_KEY: weights.card.to_json(), "format": "pt"}
    tensors = {name: tensor.clone().contiguous() for name, tensor in weights.backbone.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    text = json.dumps(timm_config(weights), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n")


def timm_config(weights: Weights) -> dict[str, Any]:
    """What timm's hub format says of a model: architecture, its sizes, and its preprocessing."""
    card, shape = weights.card, weights.card.backbone
    sizes = {
        "patch_size": shape.patch_size,
        "embed_dim": shape.embed_dim,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
    }
    changed = {key: value for key, value in sizes.items() if value is not None}
    is_vit = shape.name != "resnet50"
    architecture, changed = timm_arguments(shape.name, **changed)
    if is_vit:
        changed["img_size"] = shape.img_size
    first = "patch_embed.proj" if is_vit else "conv1"
    pool = "token" if is_vit else "avg"
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": weights.backbone[
            "norm.weight" if is_vit else "layer4.2.bn3.weight"
        ].numel(),
        "global_pool": pool,
        "model_args": {**changed, "in_chans": shape.in_chans, "global_pool": pool},
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


def _crop_pct(card: BackboneCard) -> float:
    """Share of the resized image that is cut out; timm resizes to floor(crop / share)."""
    share = card.crop / card.resize
    return share if math.floor(card.crop / share) == card.resize else math.nextafter(share, 0)


def reopen_timm(folder: Path, *, own_resize: bool = False) -> Reopened:
    """Open the folder with timm.

    Args:
        folder: as `write_timm` wrote it.
        own_resize: take images of other sizes, by timm's rule for position embeddings.
    """
    ensure_torchvision()
    import timm

    dynamic = {"dynamic_img_size": True} if own_resize else {}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **dynamic).eval()
    coverage = coverage_of(load_file(folder / WEIGHTS_FILE), model.state_dict())
    num_prefix = getattr(model, "num_prefix_tokens", None)

    def forward(images: Tensor) -> Outputs:
        features = model.forward_features(images)
        cls = model.forward_head(features)
        return (
            {"cls": cls}
            if num_prefix is None
            else {"cls": cls, "patches": features[:, num_prefix:]}
        )

    return Reopened(forward, coverage)
