"""The figure of found objects: a row for each image. Needs no display.

Shape letters: M objects, H, W pixels, R, C rows and columns of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dinoscale.runtime.outputs import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = 2.0  # inches, width of a panel, and its largest height
GAP = 0.06  # inches, between panels and at the border
CAPTION = 0.22  # inches, above the columns
LINE = 0.19  # inches, a line of text above the captions
DPI = 120
CAPTIONS = ("found box, true boxes", "map, seed", "found object", "true objects")
COLORS = "inferno"
FOUND, TRUE = "#ff4040", "#3df2ff"  # boxes
DIMMED = 0.22  # brightness of the background


@dataclass(frozen=True)
class Row:
    """One image with its found and its true objects, as the network saw it.

    Attributes:
        picture: (H, W, 3).
        map: (R, C), from which the object was cut.
        mask: (R, C) bool, of the object.
        seed: row and column of its first patch.
        box: (4,) left, top, right, bottom in pixels.
        true_boxes: (M, 4).
        true_masks: (H, W) bool, of all objects together; None if only boxes are known.
        label: written into the picture.
    """

    picture: NDArray[np.uint8]
    map: NDArray[np.float64]
    mask: NDArray[np.bool_]
    seed: tuple[int, int]
    box: NDArray[np.float64]
    true_boxes: NDArray[np.float64]
    true_masks: NDArray[np.bool_] | None
    label: str


def draw_rows(rows: Sequence[Row], path: Path, *, title: str, note: str) -> None:
    """Write a PNG with all rows.

    Args:
        rows: at least one; all with masks or all without.
        path: of the PNG.
        title: first line above.
        note: second line above.
    """
    from matplotlib.figure import Figure

    captions = CAPTIONS if rows[0].true_masks is not None else CAPTIONS[:-1]
    top = CAPTION + 2 * LINE
    width = GAP + len(captions) * (PANEL + GAP)  # inches
    heights = [PANEL * min(1.0, row.picture.shape[0] / row.picture.shape[1]) for row in rows]
    height = top + sum(heights) + len(rows) * GAP
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    for i, text in enumerate((title, note)):
        at = 1 - (i + 0.5) * LINE / height
        words = figure.text(GAP / width, at, text, fontsize=8, va="center")
        words.set_parse_math(False)  # names may hold dollars
    bottom = height - top + GAP
    for row, tall in zip(rows, heights, strict=True):
        bottom -= tall + GAP
        panels = []
        for j in range(len(captions)):
            left = GAP + j * (PANEL + GAP)
            box = (left / width, bottom / height, PANEL / width, tall / height)
            panels.append(figure.add_axes(box))
        if row is rows[0]:
            for panel, caption in zip(panels, captions, strict=True):
                panel.set_title(caption, fontsize=7.5, pad=3)
        _draw_row(panels, row)
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png")


def _draw_row(panels: Sequence[Axes], row: Row) -> None:
    for panel in panels:
        panel.set_axis_off()
    height, width = row.picture.shape[:2]
    extent = (0, width, height, 0)  # all panels share the pixels of the picture
    image, found, objects, *true = panels
    image.imshow(row.picture, extent=extent)
    for box in row.true_boxes:
        _draw_box(image, box, TRUE)
    _draw_box(image, row.box, FOUND)
    _label(image, row.label)
    found.imshow(row.map, extent=extent, cmap=COLORS, interpolation="nearest")
    rows, columns = row.mask.shape
    at = (row.seed[1] + 0.5) * width / columns, (row.seed[0] + 0.5) * height / rows
    found.plot(*at, marker="x", color=TRUE, markersize=5)
    objects.imshow(_dimmed(row.picture, row.mask), extent=extent)
    for panel in true:
        assert row.true_masks is not None  # else there is no such panel
        panel.imshow(_dimmed(row.picture, row.true_masks), extent=extent)


def _dimmed(picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The picture, dark outside a mask of any whole fraction of its size."""
    scale = picture.shape[0] // mask.shape[0], picture.shape[1] // mask.shape[1]
    bright = np.where(np.kron(mask, np.ones(scale)) > 0, 1.0, DIMMED)[..., None]
    return (picture * bright).astype(np.uint8)


def _draw_box(panel: Axes, box: NDArray[np.float64], color: str) -> None:
    left, top, right, bottom = box
    across, down = [left, right, right, left, left], [top, top, bottom, bottom, top]
    panel.plot(across, down, color=color, linewidth=1.2)


def _label(panel: Axes, text: str) -> None:
    """Write into the lower left corner, readable on any picture."""
    box = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 1.5}
    words = panel.text(0.03, 0.04, text, transform=panel.transAxes, fontsize=6.5, bbox=box)
    words.set(color="white", parse_math=False)
