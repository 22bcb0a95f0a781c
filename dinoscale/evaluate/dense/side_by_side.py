"""Several weights side by side: the networks, tables of pictures under their names, animations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.any_size import (
    FittedImage,
    FittedImages,
    WholeImages,
    image_mode,
    load_whole_images,
)
from dinoscale.evaluate.frozen_backbone import LoadOptions
from dinoscale.evaluate.progress import bar_options
from dinoscale.evaluate.sheet import short_names
from dinoscale.runtime.outputs import atomic_write

MAX_WEIGHTS = 16  # columns; a WebP picture has at most 16383 pixels in a line
PANEL = (480, 240)  # pixels, largest width and height of a picture of an animation
SHEET_PANEL = (320, 240)  # pixels, the same of a sheet
ROWS_DRAWN = 8  # of a sheet
MAX_FPS = 100.0
FPS = 10.0  # where neither the user nor the video says it

_GAP = 4  # pixels between pictures
_TITLE = 20  # pixels, height of the line above the columns
_QUALITY = 85  # of WebP, 0..100

Size = tuple[int, int]  # width and height in pixels
Place = tuple[int, int]  # of an image: which of several sets, and which image of it


def load_side_by_side(
    weights: Sequence[str | Path], options: LoadOptions, *, size: int, square: bool
) -> list[WholeImages]:
    """Load several networks; `size` and `square` as of `any_size.Fit`.

    Raises:
        CheckpointError: weights cannot be used.
        ConfigError: as of `load_whole_images`, weights are given twice, are too many, or take
            images of channels that cannot be drawn.
    """
    names = [str(path) for path in weights]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"also: {twice} is given twice. Name each of the weights once.")
    if len(names) > MAX_WEIGHTS:
        raise ConfigError(f"also: at most {MAX_WEIGHTS} weights side by side, got {len(names)}")
    networks = [load_whole_images(name, options, size=size, square=square) for name in names]
    for network in networks:
        image_mode(channels=network.card.backbone.in_chans)
    return networks


def titles_of(networks: Sequence[WholeImages]) -> list[str]:
    """What the columns are called: the shortest ends of the paths of the weights."""
    return short_names([network.path for network in networks])


def folders_of(networks: Sequence[WholeImages], out: Path) -> list[Path]:
    """Where the files of each network go: into `out`, or if they are several, into its folders."""
    if len(networks) == 1:
        return [out]
    names = [re.sub(r"[^\w.+-]+", "_", title)[-80:] for title in titles_of(networks)]
    return [out / f"{number}-{name}" for number, name in enumerate(names, start=1)]


def usable_by_all(
    sets_of: Sequence[Sequence[FittedImages]],
) -> Iterator[tuple[Place, FittedImage]]:
    """Yield the images that all networks can use, as the first one sees them.

    The others read every image before that, to find out which these are.

    Args:
        sets_of: for each network the same sets of images.

    Raises:
        DataError: at the end, if there is none.
    """
    others = [{place for place, _ in _usable(sets)} for sets in sets_of[1:]]
    found = False
    for place, image in _usable(sets_of[0]):
        if all(place in places for places in others):
            found = True
            yield place, image
    if not found:
        who = " by all weights" if others else ""
        raise DataError(f"no image can be used{who}; the first: {left_out(sets_of)[0]}")


def _usable(sets: Sequence[FittedImages]) -> Iterator[tuple[Place, FittedImage]]:
    for number, images in enumerate(sets):
        for image in images:  # draws a bar
            yield (number, image.number), image


def images_at(
    sets: Sequence[FittedImages], places: Sequence[Place], *, progress: bool
) -> Iterator[tuple[Place, FittedImage]]:
    """Yield images that a network can use, with their places; `progress` draws a bar."""
    for place in tqdm(places, unit="img", **bar_options(shown=progress)):
        yield place, sets[place[0]].read(place[1])


def left_out(sets_of: Sequence[Sequence[FittedImages]]) -> list[str]:
    """`path: reason` of the images that a network could not use, once each."""
    reasons = [reason for sets in sets_of for images in sets for reason in images.left_out]
    return list(dict.fromkeys(reasons))


def common_area(sizes: Sequence[Size]) -> Size:
    """What all networks see of an image: each cuts partial patches of its own size off.

    Args:
        sizes: of the image as each of them sees it.
    """
    return min(width for width, _ in sizes), min(height for _, height in sizes)


def within(size: Size, largest: Size = PANEL) -> Size:
    """Scale a size to touch the largest one from inside."""
    scale = min(largest[0] / size[0], largest[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def draw_table(
    titles: Sequence[str], rows: Sequence[Sequence[Image.Image]], width: int = SHEET_PANEL[0]
) -> Image.Image:
    """Draw rows of pictures under the titles of their columns.

    Args:
        titles: of the columns.
        rows: of as many pictures, which are centered in their columns.
        width: of a column in pixels; no picture is wider.
    """
    heights = [max(picture.height for picture in row) for row in rows]
    size = (len(titles) * (width + _GAP) - _GAP, _TITLE + sum(heights) + _GAP * (len(rows) - 1))
    table = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(table), ImageFont.load_default(size=0.65 * _TITLE)
    for column, title in enumerate(titles):
        while len(title) > 1 and font.getlength(title) > width:
            title = title[1:]  # the end of a path tells most
        draw.text(
            (column * (width + _GAP), _TITLE / 2), title, fill="black", font=font, anchor="lm"
        )
    top = _TITLE
    for pictures, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(pictures):
            left = column * (width + _GAP) + (width - picture.width) // 2
            table.paste(picture, (left, top + (height - picture.height) // 2))
        top += height + _GAP
    return table


def check_fps(fps: float | None) -> None:
    """Refuse a number of frames per second that is out of range.

    Raises:
        ConfigError: it is not in 0 < fps <= 100.
    """
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise ConfigError(f"fps: need a number above 0 and at most {MAX_FPS:g}, got {fps}")


class _Drawn(Image.Image):
    """Frames of one size, drawn when Pillow asks for them, so that one is in memory at a time."""

    def __init__(self, draw: Callable[[int], Image.Image], count: int) -> None:
        vars(self).update(vars(draw(0)))  # the pixels of a picture of our own
        self.n_frames, self._draw = count, draw

    def seek(self, frame: int) -> None:
        """Become another frame, as pictures in files of several do."""
        self.paste(self._draw(frame))


def save_animation(
    draw: Callable[[int], Image.Image], count: int, path: Path, *, fps: float
) -> None:
    """Write a WebP file that repeats forever.

    Of WebP: a GIF has 256 colors, and of a DAVIS video with three maps was three times as large.

    Args:
        draw: returns a frame by its number, RGB, all of one size; the first one twice.
        count: number of frames, at least one.
        path: of the file.
        fps: frames per second; equal frames in a row are stored as one that is shown longer.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_write(path) as beside:
        _Drawn(draw, count).save(
            beside, "WEBP", save_all=True, duration=1000 / fps, loop=0, quality=_QUALITY
        )
