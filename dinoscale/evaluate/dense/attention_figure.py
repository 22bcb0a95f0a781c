"""The figure of attention: a row for each image, a column for each view. Needs no display.

Shape letters: A heads, H, W pixels, R, C rows and columns of patches.
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

PANEL = 1.25  # inches, width of a panel, and its largest height
GAP = 0.06  # inches, between panels and at the border
CAPTION = 0.22  # inches, above the columns
LINE = 0.19  # inches, a line of text above the captions
DPI = 120
COLORS = "inferno"
OUTLINE = "#3df2ff"  # of the object; stands out from pictures and from the colors above
DIMMED = 0.22  # brightness of patches outside the kept mass
SMOOTH_BELOW = 100  # pixels; smaller pictures are enlarged smoothly, to hide their pixels


@dataclass(frozen=True)
class Row:
    """One image with its attention, and its object if known."""

    picture: NDArray[np.uint8]  # (H, W, 3)
    heads: NDArray[np.float32]  # (A, R, C) attention to the patches
    kept: NDArray[np.bool_]  # (R, C) patches of the overlay
    mask: NDArray[np.bool_] | None = None  # (H, W), of the object
    best_head: int | None = None  # whose patches the overlay shows; None: those of the mean
    jaccard: float | None = None  # of that head, 0..1
    label: str = ""  # written into the picture


def draw_rows(rows: Sequence[Row], path: Path, *, title: str, note: str, mass: float) -> None:
    """Write a PNG with all rows.

    Every map has its own color scale, from its smallest to its largest value, as in the reference,
    and is labelled with its peak as a multiple of its mean: how far it is from uniform.

    Args:
        rows: at least one; all with masks or all without, with equal numbers of heads.
        path: of the PNG.
        title: first line above; may be empty.
        note: second line above; may be empty.
        mass: share of the attention in the overlay, 0..1, for the caption.
    """
    from matplotlib.figure import Figure

    captions = _captions(rows[0], mass=mass)
    top = CAPTION + LINE * (bool(title) + bool(note))
    width = GAP + len(captions) * (PANEL + GAP)  # inches
    heights = [PANEL * min(1.0, row.picture.shape[0] / row.picture.shape[1]) for row in rows]
    height = top + sum(heights) + len(rows) * GAP
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    lines = [(text, weight) for text, weight in ((title, "bold"), (note, "normal")) if text]
    for i, (text, weight) in enumerate(lines):
        middle = 1 - (i + 0.5) * LINE / height
        words = figure.text(GAP / width, middle, text, fontsize=8, fontweight=weight, va="center")
        words.set_parse_math(False)  # names may hold dollars
    bottom = height - top + GAP
    for i, row in enumerate(rows):
        bottom -= heights[i] + GAP
        panels = []
        for j in range(len(captions)):
            left = GAP + j * (PANEL + GAP)
            box = (left / width, bottom / height, PANEL / width, heights[i] / height)
            panels.append(figure.add_axes(box))
        if i == 0:
            for panel, caption in zip(panels, captions, strict=True):
                panel.set_title(caption, fontsize=7.5, pad=3)
        _draw_row(panels, row)
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png")


def _captions(row: Row, *, mass: float) -> list[str]:
    heads = [f"head {head}" for head in range(len(row.heads))]
    objects = [] if row.mask is None else ["object"]
    of = "mean" if row.best_head is None else "best head"
    return ["image", *objects, "mean of heads", *heads, f"{mass:.0%} mass, {of}"]


def _draw_row(panels: Sequence[Axes], row: Row) -> None:
    """Fill the panels in the order of the captions."""
    for panel in panels:
        panel.set_axis_off()
    height, width = row.picture.shape[:2]
    extent = (0, width, height, 0)  # all panels share the pixels of the picture
    smooth = "bicubic" if max(height, width) < SMOOTH_BELOW else "antialiased"
    left = iter(panels)
    next(left).imshow(row.picture, extent=extent, interpolation=smooth)
    if row.label:
        _label(panels[0], row.label)
    if row.mask is not None:
        next(left).imshow(row.mask, extent=extent, cmap="gray", interpolation="nearest")
    for attention in (row.heads.mean(axis=0), *row.heads):
        panel = next(left)
        panel.imshow(attention, extent=extent, cmap=COLORS, interpolation="nearest")
        _label(panel, f"peak {attention.max() / attention.mean():.1f}x")
    overlay = next(left)
    kept = np.kron(row.kept, np.ones((height // row.kept.shape[0], width // row.kept.shape[1])))
    bright = np.where(kept > 0, 1.0, DIMMED)[..., None]
    overlay.imshow((row.picture * bright).astype(np.uint8), extent=extent, interpolation=smooth)
    if row.mask is not None:
        centers = (np.arange(width) + 0.5, np.arange(height) + 0.5)
        overlay.contour(*centers, row.mask, levels=[0.5], colors=OUTLINE, linewidths=0.9)
    if row.jaccard is not None:
        _label(overlay, f"head {row.best_head}  IoU {row.jaccard:.0%}")


def _label(panel: Axes, text: str) -> None:
    """Write into the lower left corner, readable on any picture."""
    box = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 1.5}
    words = panel.text(0.03, 0.04, text, transform=panel.transAxes, fontsize=6.5, bbox=box)
    words.set(color="white", parse_math=False)
