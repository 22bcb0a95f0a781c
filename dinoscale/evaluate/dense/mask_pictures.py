"""Masks as files: indexed PNG pictures, and an animation of found and true objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinoscale.runtime.outputs import atomic_write

PANEL = 400  # pixels, width of one of the two pictures side by side
GAP = 4  # pixels between them
FRAME_MS = 100
COLORED = 0.55  # opacity of the color of an object over the picture
OUTLINE = 255  # grey value of the line around an object

Labels = NDArray[np.uint8]


def palette() -> NDArray[np.uint8]:
    """Colors of 256 labels, (256, 3): black, then those of PASCAL VOC and DAVIS.

    The bits of a label, in groups of three from the lowest, are the bits of its red, green and blue
    from the highest.
    """
    numbers = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = numbers >> (3 * place + channel) & 1
            colors[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colors


def save_mask(mask: Labels, path: Path) -> None:
    """Write labels (H, W) as an indexed PNG; the pixels of the file are the labels."""
    image = Image.fromarray(mask)
    image.putpalette(palette().tobytes())
    with atomic_write(path) as beside:
        image.save(beside)


def panels(pixels: NDArray[np.uint8], *labels: Labels) -> list[Image.Image]:
    """Draw the objects of each of some labels over a picture.

    Args:
        pixels: (H, W, C) of 3 or 1 channels.
        labels: (H, W) each.
    """
    height, width = pixels.shape[:2]
    size = (PANEL, max(1, round(PANEL * height / width)))
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).convert("RGB")
    small = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    return [_overlay(small, some) for some in labels]


def compare(pixels: NDArray[np.uint8], found: Labels, truth: Labels | None) -> Image.Image:
    """Draw the found objects over a picture and, to its right, the true ones, if known."""
    drawn = panels(pixels, *(labels for labels in (found, truth) if labels is not None))
    sheet = Image.new("RGB", (len(drawn) * (PANEL + GAP) - GAP, drawn[0].height), "white")
    for i, panel in enumerate(drawn):
        sheet.paste(panel, (i * (PANEL + GAP), 0))
    return sheet


def _overlay(picture: NDArray[np.uint8], labels: Labels) -> Image.Image:
    height, width = picture.shape[:2]
    small = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    color = palette()[small]
    mixed = (1 - COLORED) * picture + COLORED * color
    drawn = np.where((small > 0)[..., None], mixed, picture).astype(np.uint8)
    edge = (small != np.roll(small, 1, axis=0)) | (small != np.roll(small, 1, axis=1))
    edge[0], edge[:, 0] = False, False  # pixels that `roll` wrapped around
    drawn[edge] = OUTLINE
    return Image.fromarray(drawn)


def save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Write a looping GIF of one or more frames, ten per second."""
    first, *rest = frames
    with atomic_write(path) as beside:
        first.save(beside, save_all=True, append_images=rest, duration=FRAME_MS, loop=0)
