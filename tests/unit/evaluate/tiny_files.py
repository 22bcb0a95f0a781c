"""A tiny weights file and pictures, shared by the end-to-end tests."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.models.zoo import build_backbone

SHAPE = BackboneShape(
    "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2
)
CARD = BackboneCard(
    SHAPE, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), resize=32, crop=32, source="untrained"
)


def save_weights(path: Path) -> Path:
    """An untrained backbone."""
    torch.manual_seed(1)
    save_backbone(path, build_backbone(**asdict(SHAPE)).state_dict(), CARD)
    return path


def save_picture(path: Path, *, seed: int, size: tuple[int, int] = (40, 48)) -> Path:
    """Large spots of random colors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spots = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def as_json(report: dict[str, object]) -> dict[str, Any]:
    """A report after a round trip through JSON."""
    loaded = json.loads(json.dumps(report, allow_nan=False))
    assert loaded == report
    return dict(loaded)
