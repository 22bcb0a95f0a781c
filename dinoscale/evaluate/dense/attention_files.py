"""Attention of the last block over images of any size, as files: overlays, raw maps, one sheet.

Shape letters: A heads, H, W pixels, R, C rows and columns of patches.
Source: the visualisation code of Caron et al. 2021 (arXiv:2104.14294).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinoscale.convert.weights import Network
from dinoscale.convert.weights_file import load_backbone
from dinoscale.errors import ConfigError
from dinoscale.evaluate.any_size import (
    SIZE,
    Fit,
    NamedFolders,
    Seen,
    SeenImages,
    find_patch_size,
    open_images,
    save_picture,
    to_input,
    writing_to,
)
from dinoscale.evaluate.dense.attention_figure import COLORS, DIMMED, Row, draw_rows
from dinoscale.evaluate.dense.attention_maps import MASS, attention_maps, enlarge, keep_mass
from dinoscale.evaluate.features import find_device

SHEET = "attention-sheet.png"
ROWS_DRAWN = 8  # of the sheet
HEAT = 0.65  # share of the colors in an overlay; the rest is the image in gray


def write_attention(
    weights_path: str | Path,
    spec: str,
    out: str | Path,
    *,
    size: int = SIZE,
    square: bool = False,
    mass: float = MASS,
    limit: int | None = None,
    device: str | None = None,
    network: Network = "teacher",
    num_heads: int | None = None,
    progress: bool = True,
) -> dict[str, object]:
    """Write the attention of the class token over every image of a set into a folder.

    Each image gets a folder with its name: `attn-head0.png`, ..., `attn-mean.png` lay the map in
    colors (each from its least to its largest value) over the image, `mass-head0.png`, ...,
    `mass-mean.png` leave only the patches bright that together hold `mass` of the map, and
    `attention.npz` holds the numbers: `maps` (A, R, C), `kept` (A, R, C) by the mass, `name`,
    `patch`, `size` of the image and `seen` by the backbone, both (height, width) in pixels.
    Patches are enlarged by nearest neighbour. A sheet shows the first images in one picture.

    Args:
        weights_path: anything that `load_backbone` reads.
        spec: an image file, or a set as `data.train` of a config.
        out: the folder; made where it is not there. Files of ours of the same names are replaced.
        size: short side in pixels at which the backbone sees the images.
        square: squeeze the images to size x size, as the reference's figures.
        mass: share of a map's attention that the mask keeps, 0 < mass <= 1.
        limit: only so many images, from the first on; None takes all.
        device: a torch device; None takes the accelerator if there is one.
        network: which of the two of a run or a full checkpoint.
        num_heads: for reference checkpoints whose attention heads are not 64 channels wide.
        progress: draw a bar on stderr, if that is a terminal.

    Returns:
        What was written and how, ready for JSON; `left_out` names the images that could not be
        read, with the reason.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no attention.
        DataError: no image can be read, or the folder cannot be written.
    """
    if not 0 < mass <= 1:
        raise ConfigError(f"mass: need a share above 0 and at most 1, got {mass}")
    where = find_device(device)
    backbone, card = load_backbone(weights_path, network=network, num_heads=num_heads)
    fit = Fit(find_patch_size(backbone), size, square)
    backbone.to(where)
    images = SeenImages(open_images(spec, card), fit, limit=limit, progress=progress)
    folder, rows, written = Path(out), list[Row](), 0
    with writing_to(folder):
        folders = NamedFolders(folder)
        for seen in images:
            pixels = to_input(seen.image, backbone, mean=card.mean, std=card.std)
            maps = attention_maps(backbone, pixels)[0]
            _write(seen, maps, folders.make(seen.path), patch=fit.patch, mass=mass)
            written += 1
            if len(rows) < ROWS_DRAWN:
                kept = keep_mass(maps.mean(dim=0), mass=mass)
                rows.append(Row(_rgb(seen.image), heads=maps.numpy(), kept=kept.numpy()))
        title = f"{Path(weights_path).name}: attention of the class token in the last block"
        draw_rows(rows, folder / SHEET, title=title, note="", mass=mass)
    return {
        "task": "attention",
        "weights": str(weights_path),
        "weights_source": card.source,
        "backbone": asdict(card.backbone),
        "spec": spec,
        "images": written,
        "left_out": images.left_out,
        "folder": str(folder),
        "picture": str(folder / SHEET),
        "protocol": {
            "network": network,
            "attention": "class token to patches, last block, softmax of q.k",
            **fit.protocol(),
            "edges": "cut at the right and below",
            "mass": mass,
            "enlarged_by": "nearest neighbour",
            "mean": list(card.mean),
            "std": list(card.std),
        },
        "score": None,
    }


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


def _write(seen: Seen, maps: Tensor, folder: Path, *, patch: int, mass: float) -> None:
    """All files of one image."""
    names = [*(f"head{head}" for head in range(len(maps))), "mean"]
    shown = torch.cat((maps, maps.mean(dim=0, keepdim=True)))  # (A+1, R, C)
    kept = keep_mass(shown, mass=mass)
    for name, attention, patches in zip(names, shown, kept, strict=True):
        for kind, picture in (
            ("attn", _heat_overlay(seen.image, attention)),
            ("mass", _mass_overlay(seen.image, patches)),
        ):
            save_picture(picture, folder / f"{kind}-{name}.png")
    arrays = {"maps": maps.numpy(), "kept": kept[:-1].numpy()}
    seen.save(folder / "attention.npz", arrays, patch=patch)


def _heat_overlay(image: Image.Image, attention: Tensor) -> Image.Image:
    """The map in colors, from its least to its largest value, over the image in gray."""
    import matplotlib

    large = enlarge(attention, height=image.height, width=image.width).numpy()
    span = max(float(large.max() - large.min()), np.finfo(np.float32).tiny)
    colors = matplotlib.colormaps[COLORS]((large - large.min()) / span)[..., :3]  # (H, W, 3)
    gray = np.asarray(image.convert("L"))[..., None] / 255
    return Image.fromarray((255 * (HEAT * colors + (1 - HEAT) * gray)).round().astype(np.uint8))


def _mass_overlay(image: Image.Image, kept: Tensor) -> Image.Image:
    """The image, dark outside the kept patches."""
    bright = enlarge(kept, height=image.height, width=image.width).numpy()[..., None]
    return Image.fromarray((_rgb(image) * np.where(bright, 1.0, DIMMED)).astype(np.uint8))
