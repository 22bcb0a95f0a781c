"""Attention of the last block over images of any size, as files: overlays, raw maps, one sheet.

Shape letters: A heads, H, W pixels, R, C rows and columns of patches.
Source: the visualisation code of Caron et al. 2021 (arXiv:2104.14294).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from dinoscale.evaluate.dense.side_by_side import (
    ROWS_DRAWN,
    SHEET_PANEL,
    Place,
    Size,
    common_area,
    draw_table,
    folders_of,
    images_at,
    left_out,
    load_side_by_side,
    titles_of,
    usable_by_all,
    within,
)
from dinoscale.evaluate.frozen_backbone import DEFAULT_LOADING, LoadOptions

SHEET = "attention-sheet.png"
HEAT = 0.65  # opacity of the colors over the gray image

_TAIL = 1.0  # percent of the patches that are brighter than a shared scale


def write_attention(
    weights_path: str | Path,
    spec: str,
    out: str | Path,
    *,
    size: int = SIZE,
    square: bool = False,
    mass: float = MASS,
    also: Sequence[str | Path] = (),
    limit: int | None = None,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Write the attention of the class token over every image of a set into a folder.

    Each image gets a folder with its name, for the files of `_write`; with several weights, each
    has a folder of these. A sheet shows the first images in one picture, with the means over the
    heads of all weights side by side if they are several.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        spec: an image file, or a set as `data.train` of a config.
        out: the folder; made if missing. Files of the same names that this program wrote are
            replaced.
        size: short side in pixels at which the backbone sees the images.
        square: squeeze the images to size x size, as in the reference's figures.
        mass: share of a map's attention that the mask keeps, 0 < mass <= 1.
        also: other weights.
        limit: number of images, the first ones; None takes all.
        options: which network, and which device.

    Returns:
        What was written and how, ready for JSON; `left_out` names the images that could not be
        read, with the reason; what one of several weights cannot use is left out of all. `also`
        says which the other weights are.

    Raises:
        CheckpointError: a weights file cannot be used.
        ConfigError: a setting is out of range, or a backbone has no attention.
        DataError: no image can be read, or the folder cannot be written.
    """
    check_mass(mass)
    networks = load_side_by_side([weights_path, *also], options, size=size, square=square)
    sets_of = [[network.fitted(spec, limit=limit)] for network in networks]
    folder, places, rows = Path(out), list[Place](), list[dict[Place, Row]]()
    images = usable_by_all(sets_of)
    with writing_to(folder):
        folders = folders_of(networks, folder)
        for network, sets, own in zip(networks, sets_of, folders, strict=True):
            if places:
                images = images_at(sets, places, progress=network.options.progress)
            places, shown = _write_images(network, images, own, mass=mass)
            rows.append(shown)
        _draw_sheet(titles_of(networks), rows, folder / SHEET, mass=mass)
    return report_attention(
        networks,
        {"mass": mass},
        spec=spec,
        images=len(places),
        left_out=left_out(sets_of),
        folder=str(folder),
        picture=str(folder / SHEET),
    )


def report_attention(
    networks: Sequence[WholeImages], settings: Mapping[str, object], **parts: object
) -> dict[str, object]:
    """The report of the first weights, with `settings` in its protocol; `also` names the others."""
    first, *others = networks
    protocol = {
        "network": first.options.network,
        "attention": "class token to patches, last block, softmax of q.k",
        **first.fit.protocol(),
        "edges": "cut at the right and below",
        **settings,
        "enlarged_by": "nearest neighbour",
        **first.normalisation,
    }
    also = {"also": [network.about for network in others]} if others else {}
    return first.report("attention", **parts, protocol=protocol, score=None, **also)


def _write_images(
    network: WholeImages, images: Iterable[tuple[Place, FittedImage]], out: Path, *, mass: float
) -> tuple[list[Place], dict[Place, Row]]:
    """Write the files of each image; returns their places, and what the sheet shows of a few."""
    out.mkdir(exist_ok=True)
    folders, places, rows = NamedFolders(out), list[Place](), dict[Place, Row]()
    for place, fitted in images:
        maps = attention_maps(network.backbone, network.input(fitted.image))[0]
        _write(fitted, maps, folders.make(fitted.path), patch=network.fit.patch, mass=mass)
        if len(rows) < ROWS_DRAWN:
            kept = keep_mass(maps.mean(dim=0), mass=mass)
            rows[place] = Row(_rgb(fitted.image), heads=maps.numpy(), kept=kept.numpy())
        places.append(place)
    return places, rows


def _draw_sheet(
    titles: Sequence[str], rows_of: Sequence[dict[Place, Row]], path: Path, *, mass: float
) -> None:
    """All heads of one network; of several their means over heads, in a column for each."""
    if len(rows_of) == 1:
        title = f"{titles[0]}: attention of the class token in the last block"
        draw_rows([*rows_of[0].values()], path, title=title, note="", mass=mass)
        return
    means = [{place: row.heads.mean(axis=0) for place, row in rows.items()} for rows in rows_of]
    high = scale_of([mean for of in means for mean in of.values()])
    pictures = []
    for place in rows_of[0]:
        seen = [Image.fromarray(rows[place].picture) for rows in rows_of]
        area = common_area([image.size for image in seen])
        image = seen[0].crop((0, 0, *area))
        image = image.resize(within(area, SHEET_PANEL))
        maps = [
            of_area(on_scale(of[place], high), picture.width // of[place].shape[1], area)
            for of, picture in zip(means, seen, strict=True)
        ]
        pictures.append([image, *(heat_overlay(image, brightness) for brightness in maps)])
    save_picture(draw_table(["image", *titles], pictures), path)


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
            ("attn", heat_overlay(fitted.image, _full_scale(attention))),
            ("mass", _mass_overlay(fitted.image, patches)),
        ):
            save_picture(picture, folder / f"{kind}-{name}.png")
    arrays = {"maps": maps.numpy(), "kept": kept[:-1].numpy()}
    fitted.save(folder / "attention.npz", arrays, patch=patch)


def _full_scale(attention: Tensor) -> NDArray[np.float32]:
    """A map (R, C) as brightness, from its smallest to its largest value."""
    span = max(float(attention.max() - attention.min()), float(np.finfo(np.float32).tiny))
    return np.asarray((attention - attention.min()) / span)


def scale_of(means: Sequence[NDArray[np.float32]]) -> float:
    """The multiple of uniform attention that is brightest where maps share their colors.

    Args:
        means: (R, C) of each image, means over heads.

    Returns:
        That which 1 % of all patches exceed, in multiples of the mean of their map.
    """
    multiples = [(mean / mean.mean()).ravel() for mean in means]
    return float(np.percentile(np.concatenate(multiples), 100 - _TAIL))


def on_scale(mean: NDArray[np.float32], high: float) -> NDArray[np.float32]:
    """A map (R, C) as brightness 0..1 on the scale that ends at `high` times its mean."""
    return np.asarray((mean / (high * mean.mean())).clip(0, 1))


def of_area(brightness: NDArray[np.float32], patch: int, area: Size) -> NDArray[np.float32]:
    """A map (R, C) of patches at each pixel of an area at its upper left corner, (H, W)."""
    width, height = area
    return brightness[np.arange(height)[:, None] // patch, np.arange(width) // patch]


def heat_overlay(image: Image.Image, brightness: NDArray[np.float32]) -> Image.Image:
    """A map (R, C) of 0..1 in colors over an image of any size in gray."""
    import matplotlib

    large = enlarge(torch.from_numpy(brightness), height=image.height, width=image.width).numpy()
    colors = matplotlib.colormaps[COLORS](large)[..., :3]  # (H, W, 3)
    gray = np.asarray(image.convert("L"))[..., None] / 255
    return Image.fromarray((255 * (HEAT * colors + (1 - HEAT) * gray)).round().astype(np.uint8))


def _mass_overlay(image: Image.Image, kept: Tensor) -> Image.Image:
    """The image, dark outside the kept patches."""
    bright = enlarge(kept, height=image.height, width=image.width).numpy()[..., None]
    return Image.fromarray((_rgb(image) * np.where(bright, 1.0, DIMMED)).astype(np.uint8))
