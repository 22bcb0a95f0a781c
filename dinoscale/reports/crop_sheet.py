"""A contact sheet of crops: images with their crop boxes, and each crop as the network sees it.

Every crop is produced by the same calls as in training, then denormalized. Patches that the student
does not see are darkened. Shape letters: V = 2 + n crops of an image, C channels, H, W pixels, P
patches of a global crop.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from dinoscale.config import DataConfig, RunConfig
from dinoscale.data.augmentation.crop_params import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NOT_SOLARIZED,
    NOTHING,
    SATURATION,
    Params,
)
from dinoscale.data.augmentation.multi_crop import NUM_GLOBAL, MultiCrop
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.loader import Batch
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DataError
from dinoscale.runtime.outputs import atomic_write, require_ours
from dinoscale.training.feed import finish_batch, masks_of, multi_crop_of, open_images, run_of_step

log = logging.getLogger(__name__)

_PANEL, _GAP, _TEXT = 1.3, 0.08, 0.36  # inches: side of a panel, between panels, text below each
_CAPTION = 0.25  # inches, above the columns
_DPI = 120
_COLORS = matplotlib.colormaps["tab20"]  # alternately dark and light
_SMOOTH_BELOW = 100  # pixels; smaller pictures are upscaled smoothly, as blocks would distract
_LETTERS = {BRIGHTNESS: "B", CONTRAST: "C", SATURATION: "S", HUE: "H"}


@dataclass(frozen=True)
class Row:
    """One image and its crops.

    Attributes:
        name: path of the image.
        picture: the image, uint8 (H, W) or (H, W, 3).
        views: each crop as the network sees it, in the same form.
        params: augmentation parameters of each crop, records of PARAMS, (V,).
        masks: masked patches of the global crops, (2, P); None if nothing is masked.
    """

    name: str
    picture: NDArray[np.uint8]
    views: list[NDArray[np.uint8]]
    params: Params
    masks: NDArray[np.bool_] | None = None


def show_crops(config: RunConfig, *, num_images: int, epoch: int, out: Path) -> dict[str, Any]:
    """Draw the crops of images spread evenly over data.train into a PNG.

    Args:
        config: configuration of the run; its seed determines the crops.
        num_images: number of rows; fewer if the set is smaller.
        epoch: epoch of the crops, from 0; masks, and the sizes drawn from a mixture, are those of
            the step of this number, since an image's own depend on its place in a run.
        out: path of the PNG; missing folders are created.

    Returns:
        JSON-able: the path of the PNG and the images in it.

    Raises:
        ConfigError: no images are named, or a number is out of range.
        DataError: none of the chosen images can be read, or the PNG cannot be written.
    """
    if num_images < 1 or not 0 <= epoch < 2**32:
        raise ConfigError(f"need --images >= 1 and --epoch >= 0, got {num_images} and {epoch}")
    require_ours(out)
    source = open_images(config)
    config = run_of_step(config, epoch)
    rows = list(_rows(config, source, num_images=min(num_images, len(source)), epoch=epoch))
    if not rows:
        raise DataError(f"data.train: none of {num_images} chosen images can be read")
    try:
        with atomic_write(out) as beside:
            _figure(rows).savefig(beside, format="png")
    except OSError as error:
        raise DataError(f"--out: cannot write {out}: {error.strerror}") from error
    return {"picture": str(out), "epoch": epoch, "images": [row.name for row in rows]}


def _rows(config: RunConfig, source: Source, *, num_images: int, epoch: int) -> Iterator[Row]:
    multi_crop = multi_crop_of(config)
    # A stream is read from its start: a later image would cost reading all before it.
    stride = 1 if isinstance(source, StreamSource) else len(source) / num_images
    masks = _masks(config, num_images=num_images, step=epoch)
    for place in range(num_images):
        sample = int(place * stride)
        try:
            row = _row(config, source, multi_crop, sample=sample, epoch=epoch)
        except BadSampleError as error:
            log.warning("skipped an unreadable image: %s", error)
        else:
            yield row if masks is None else replace(row, masks=masks[:, place])


def _masks(config: RunConfig, *, num_images: int, step: int) -> NDArray[np.bool_] | None:
    """Masks of a step's first images, (2, at least num_images, P); None if nothing is masked."""
    group = config.mask_group
    images = -(-num_images // group) * group
    masks = masks_of(config, step=step, first_image=0, images=images)
    if masks is None:
        return None
    views: NDArray[np.bool_] = masks.masks.reshape(NUM_GLOBAL, images, -1).numpy()
    return views


def _row(
    config: RunConfig, source: Source, multi_crop: MultiCrop, *, sample: int, epoch: int
) -> Row:
    picture = source.picture(sample)
    crops = multi_crop.arrays(count=1)
    multi_crop(picture, crops, 0, seed=config.seed, epoch=epoch, sample=sample)
    batch = Batch(
        torch.from_numpy(crops.global_crops),
        torch.from_numpy(crops.local_crops),
        torch.from_numpy(crops.gram_crops),
        crops.params,
        torch.tensor([sample]),
        [],
    )
    kinds = finish_batch(batch, config.data, torch.device("cpu"))
    views = [_visible(_denormalized(view, config.data)) for kind in kinds for view in kind[:, 0]]
    return Row(source.path(sample), _visible(picture.pixels()), views, crops.params[:, 0])


def _denormalized(view: Tensor, data: DataConfig) -> NDArray[np.uint8]:
    """A normalized (C, H, W) view as uint8 (H, W, C)."""
    mean, std = (view.new_tensor(x)[:, None, None] for x in (data.mean, data.std))
    pixels: Tensor = ((view * std + mean) * 255).round().clamp(0, 255)
    return pixels.byte().permute(1, 2, 0).numpy()


def _visible(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first channel (H, W) of one or two, the first three (H, W, 3) of more."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]


def augmentations(params: Params, *, picture_size: tuple[int, int]) -> str:
    """The augmentations of a crop as short text: its fraction of the area, then flip and colors.

    Args:
        params: parameters of the crop, one record.
        picture_size: width and height in pixels.
    """
    height, width = params["box"][2:].tolist()
    area = height * width / (picture_size[0] * picture_size[1])
    order = "".join(_LETTERS[step] for step in params["order"].tolist() if step != NOTHING)
    radius = float(params["blur_radius"])
    parts = [
        f"{area:.0%}",
        "flip" if params["flip"] else "",
        f"jitter {order}" if order else "",
        "gray" if params["gray"] else "",
        f"blur {radius:.1f}" if radius > 0 else "",
        "solarized" if params["solarize_from"] < NOT_SOLARIZED else "",
    ]
    return ", ".join(part for part in parts if part)


def _figure(rows: Sequence[Row]) -> Figure:
    captions = _captions(len(rows[0].views))
    width = _GAP + len(captions) * (_PANEL + _GAP)  # inches
    height = _CAPTION + len(rows) * (_PANEL + _TEXT)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    for i, row in enumerate(rows):
        bottom = height - _CAPTION - i * (_PANEL + _TEXT) - _PANEL
        for j, caption in enumerate(captions):
            left = _GAP + j * (_PANEL + _GAP)
            box = (left / width, bottom / height, _PANEL / width, _PANEL / height)
            panel = figure.add_axes(box)
            if j == 0:
                _draw_picture(panel, row)
            else:
                _draw_view(panel, row, j - 1)
            if i == 0:
                x, y = (left + _PANEL / 2) / width, 1 - _CAPTION / 2 / height
                figure.text(x, y, caption, fontsize=8, ha="center", va="center")
    return figure


def _captions(num_views: int) -> list[str]:
    views = [
        f"global {i + 1}" if i < NUM_GLOBAL else f"local {i - NUM_GLOBAL + 1}"
        for i in range(num_views)
    ]
    return ["picture", *views]


def _draw_picture(panel: Axes, row: Row) -> None:
    _draw(panel, row.picture, Path(row.name.rpartition("::")[2]).name[-26:])
    panel.set_axis_off()
    for view, params in enumerate(row.params):
        top, left, height, width = params["box"].tolist()
        corner = (left - 0.5, top - 0.5)  # pixel centers lie at whole coordinates
        line = 1.8 if view < NUM_GLOBAL else 0.9
        style = {"fill": False, "edgecolor": _color(view), "linewidth": line, "clip_on": False}
        panel.add_patch(Rectangle(corner, width, height, **style))


def _draw_view(panel: Axes, row: Row, view: int) -> None:
    height, width = row.picture.shape[:2]
    pixels = row.views[view]
    text = augmentations(row.params[view], picture_size=(width, height))
    if row.masks is not None and view < NUM_GLOBAL and row.masks[view].any():
        pixels = darkened(pixels, row.masks[view])
        text += f", {row.masks[view].mean():.0%} masked"
    _draw(panel, pixels, text)
    panel.set(xticks=[], yticks=[])
    for side in panel.spines.values():
        side.set(color=_color(view), linewidth=1.5)


def darkened(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A square crop with a quarter of the brightness where its patches (P,) are masked."""
    side = math.isqrt(len(mask))
    patch = np.ones((len(pixels) // side,) * 2, dtype=bool)
    masked = np.kron(mask.reshape(side, side), patch)
    dark = pixels.copy()
    dark[masked] //= 4
    return dark


def _draw(panel: Axes, pixels: NDArray[np.uint8], text: str) -> None:
    smooth = "bicubic" if max(pixels.shape[:2]) < _SMOOTH_BELOW else "antialiased"
    panel.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
    middle = text.find(", ", len(text) // 2)  # long text takes two lines
    if len(text) > 22 and middle > 0:
        text = text[: middle + 1] + "\n" + text[middle + 2 :]
    panel.text(0.5, -0.03, text, transform=panel.transAxes, fontsize=6, ha="center", va="top")


def _color(view: int) -> Any:
    """The color of a crop: ten dark ones, then ten light ones."""
    return _COLORS(view % 10 * 2 + view // 10 % 2)
