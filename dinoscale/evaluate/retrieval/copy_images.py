"""Images of copy detection: squares of one size, and edited copies made from any set.

The edits imitate Copydays (Douze et al. 2009): crops, JPEG compression, and strong ones that
combine several. All are functions of (seed, edit, image), the same on every machine.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from dinoscale.data.augmentation.multi_crop import by_plane, to_image, to_pixels
from dinoscale.data.decoding.decode import Picture
from dinoscale.data.sources.source import Source

CROP_AREA = (0.3, 0.6)  # of the picture that is left
JPEG_QUALITY = (3, 15)
BLUR_RADIUS = (0.005, 0.02)  # of the short side
COLOR_FACTORS = (0.6, 1.5)  # of saturation, brightness and contrast; 1 changes nothing
ROTATION = (10.0, 45.0)  # degrees, to either side


@dataclass(frozen=True)
class Squares:
    """Some images of a source, squeezed to squares; the label of each is its position."""

    source: Source
    side: int  # pixels
    numbers: Sequence[int]  # of the images in the source
    edit: str = ""  # one of EDITS, applied first; empty for none
    seed: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def path(self, index: int) -> str:
        """Where the image is, for messages."""
        return self.source.path(self.numbers[index])

    def picture(self, index: int) -> Picture:
        """The square, by bicubic resampling."""
        number = self.numbers[index]
        pixels = self.source.picture(number).pixels()
        if self.edit:
            rng = np.random.default_rng([self.seed, EDITS.index(self.edit), number])
            pixels = to_pixels(edited(to_image(pixels), self.edit, rng=rng))
        return Picture.of(by_plane(pixels, self._square), self.path(index))

    def _square(self, image: Image.Image) -> Image.Image:
        return image.resize((self.side, self.side), Image.Resampling.BICUBIC)

    @property
    def labels(self) -> NDArray[np.int64]:
        """0 to N - 1, to tell which images could be read."""
        return np.arange(len(self.numbers))

    @property
    def class_names(self) -> None:
        """None: the labels are positions."""
        return None


EDITS = ("strong", "crop", "jpeg", "blur", "color", "rotation")


def edited(image: Image.Image, edit: str, *, rng: np.random.Generator) -> Image.Image:
    """Edit an RGB or gray picture by one of EDITS; `strong` applies all others in turn."""
    if edit == "strong":
        for each in ("crop", "rotation", "color", "blur", "jpeg"):
            image = edited(image, each, rng=rng)
        return image
    if edit == "crop":
        return _crop(image, rng)
    if edit == "jpeg":
        return _compress(image, rng)
    if edit == "blur":
        radius = rng.uniform(*BLUR_RADIUS) * min(image.size)
        return image.filter(ImageFilter.GaussianBlur(radius))
    if edit == "color":
        return _recolor(image, rng)
    if edit == "rotation":
        degrees = rng.uniform(*ROTATION) * rng.choice([-1, 1])
        return image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    raise ValueError(f"need one of {EDITS}, got {edit!r}")


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random part with the same aspect ratio."""
    share = math.sqrt(rng.uniform(*CROP_AREA))
    width, height = (max(1, round(share * side)) for side in image.size)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _compress(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    low, high = JPEG_QUALITY
    image.save(file, format="JPEG", quality=int(rng.integers(low, high + 1)))
    with Image.open(file) as opened:
        opened.load()
        return opened.convert(image.mode)


def _recolor(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = enhance(image).enhance(rng.uniform(*COLOR_FACTORS))
    return image
