"""Attention of the last block over images of any size, as files: overlays, raw maps, one sheet.

Shape letters: A heads, H, W pixels, R, C rows and columns of patches.
Source: the visualisation code of Caron et al. 2021 (arXiv:2104.14294).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinoscale.evaluate.any_size import (
    SIZE,
    FittedImage,
    NamedFolders,
    WholeImages,
    load_whole_images,
    save_picture,
    writing_to,
)
from dinoscale.evaluate.dense.attention_figure import COLORS, DIMMED, Row, draw_rows
from dinoscale.evaluate.dense.attention_maps import (
    MASS,
    attention_maps,
    check_mass,
    enlarge,
    keep_mass,
)
from dinoscale.evaluate.frozen_backbone import DEFAULT_LOADING, LoadOptions

SHEET = "attention-sheet.png"
ROWS_DRAWN = 8  # of the sheet
HEAT = 0.65  # opacity of the colors over the gray image


def write_attention(
    weights_path: str | Path,
    spec: str,
    out: str | Path,
    *,
    size: int = SIZE,
    square: bool = False,
    mass: float = MASS,
    limit: int | None = None,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Write the attention of the class token over every image of a set into a folder.

    Each image gets a folder with its name, for the files of `_write`; a sheet shows the first
    images in one picture.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        spec: an image file, or a set as `data.train` of a config.
        out: the folder; made if missing. Files of the same names that this program wrote are
            replaced.
        size: short side in pixels at which the backbone sees the images.
        square: squeeze the images to size x size, as in the reference's figures.
        mass: share of a map's attention that the mask keeps, 0 < mass <= 1.
        limit: number of images, the first ones; None takes all.
        options: which network, and which device.

    Returns:
        What was written and how, ready for JSON; `left_out` names the images that could not be
        read, with the reason.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no attention.
        DataError: no image can be read, or the folder cannot be written.
    """
    check_mass(mass)
    loaded = load_whole_images(weights_path, options, size=size, square=square)
    images = loaded.fitted(spec, limit=limit)
    folder, rows = Path(out), list[Row]()
    with writing_to(folder):
        folders = NamedFolders(folder)
        for fitted in images:
            maps = attention_maps(loaded.backbone, loaded.input(fitted.image))[0]
            _write(fitted, maps, folders.make(fitted.path), patch=loaded.fit.patch, mass=mass)
            if len(rows) < ROWS_DRAWN:
                kept = keep_mass(maps.mean(dim=0), mass=mass)
                rows.append(Row(_rgb(fitted.image), heads=maps.numpy(), kept=kept.numpy()))
        title = f"{Path(weights_path).name}: attention of the class token in the last block"
        draw_rows(rows, folder / SHEET, title=title, note="", mass=mass)
    return loaded.report(
        "attention",
        spec=spec,
        **images.report(folder, SHEET),
        protocol={"network": options.network, **_protocol(loaded, mass=mass)},
        score=None,
    )


def _protocol(loaded: WholeImages, *, mass: float) -> dict[str, object]:
    return {
        "attention": "class token to patches, last block, softmax of q.k",
        **loaded.fit.protocol(),
        "edges": "cut at the right and below",
        "mass": mass,
        "enlarged_by": "nearest neighbour",
        **loaded.normalisation,
    }


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


def _write(fitted: FittedImage, maps: Tensor, folder: Path, *, patch: int, mass: float) -> None:
    """All files of one image; patches are enlarged by nearest neighbour.

    `attn-head0.png`, ..., `attn-mean.png` show the map in colors over the image, each from its
    smallest to its largest value. `mass-head0.png`, ..., `mass-mean.png` darken the image outside
    the patches that together hold `mass` of the map. `attention.npz` holds `maps` (A, R, C), the
    kept patches `kept` (A, R, C), and what `FittedImage.save` adds.
    """
    names = [*(f"head{head}" for head in range(len(maps))), "mean"]
    shown = torch.cat((maps, maps.mean(dim=0, keepdim=True)))  # (A+1, R, C)
    kept = keep_mass(shown, mass=mass)
    for name, attention, patches in zip(names, shown, kept, strict=True):
        for kind, picture in (
            ("attn", _heat_overlay(fitted.image, attention)),
            ("mass", _mass_overlay(fitted.image, patches)),
        ):
            save_picture(picture, folder / f"{kind}-{name}.png")
    arrays = {"maps": maps.numpy(), "kept": kept[:-1].numpy()}
    fitted.save(folder / "attention.npz", arrays, patch=patch)


def _heat_overlay(image: Image.Image, attention: Tensor) -> Image.Image:
    """The map in colors, from its smallest to its largest value, over the image in gray."""
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
