"""A labelled image set that is drawn, not downloaded: patterned shapes on cloudy backgrounds.

A class is a kind of pattern (stripes, checks, dots, ...) that fills an object. The object's
outline, position, size and rotation, the pattern's period and phase, all colours and the
background are drawn anew for every image, so neither colour nor the raw pixels tell the class
well. The pattern is within every crop that shows a part of the object, and survives colour jitter
and flips: what a self-supervised network can find without being told.

An image is a pure function of (seed, split, index). The mask of the object comes with it.
Lengths are fractions of the image side, lightness and colour channels go from 0 to 1.
Shape letter: P, the pixels along one side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinoscale.errors import DataError

Plane = npt.NDArray[np.float32]  # (P, P), one number a pixel
Inside = npt.NDArray[np.bool_]  # (P, P)
Pixels = npt.NDArray[np.float32]  # (P, P, 3), or (P, P) for a mask
Outline = Callable[[Plane, Plane], Inside]  # of the object's axes; its radius is about 1
Pattern = Callable[[Plane, Plane, np.random.Generator], Inside]  # of axes in periods, 0 and up

PREFIX = "synthetic:"
SPLITS = ("train", "test")
CACHE_BYTES = 256 * 2**20  # keep drawn images in memory while the whole set fits in this

_KEYS = ("images", "size", "seed", "split")  # of a spec
_RADIUS = (0.46, 0.58)  # of the outline: the object fills most of the image
_CENTER_SHIFT = 0.14  # of the outline from the middle of the image, at most
_PERIODS_PER_RADIUS = (4.0, 4.8)  # of the pattern: about nine over the image
_DARK, _LIGHT = (0.08, 0.24), (0.76, 0.92)  # lightness of the pattern's ground and figure
_SKY = (0.35, 0.65)  # lightness of the background
_CLOUDS = 0.35  # difference of lightness within the background
_TINT = 0.2  # how far the channels of a colour lie from its lightness


def _disc(u: Plane, v: Plane) -> Inside:
    return u * u + v * v < 0.95


def _square(u: Plane, v: Plane) -> Inside:
    return np.maximum(abs(u), abs(v)) < 0.86


def _triangle(u: Plane, v: Plane) -> Inside:
    return np.maximum(v, 0.866 * abs(u) - 0.5 * v) < 0.58


def _hexagon(u: Plane, v: Plane) -> Inside:
    return np.maximum(abs(v), 0.866 * abs(u) + 0.5 * abs(v)) < 0.88


def _cross(u: Plane, v: Plane) -> Inside:
    return (np.minimum(abs(u), abs(v)) < 0.46) & (np.maximum(abs(u), abs(v)) < 1)


def _ellipse(u: Plane, v: Plane) -> Inside:
    return (u / 1.1) ** 2 + (v / 0.68) ** 2 < 1


def _flower(u: Plane, v: Plane) -> Inside:
    return np.asarray(np.hypot(u, v) < 0.85 + 0.17 * np.cos(6 * np.arctan2(v, u)))


def _star(u: Plane, v: Plane) -> Inside:
    sector = abs((np.arctan2(v, u) * (5 / np.pi) + 1) % 2 - 1)  # 0 at a tip, 1 between two
    return np.asarray(np.hypot(u, v) < 1.08 - 0.5 * sector)


OUTLINES: tuple[Outline, ...] = (
    _disc,
    _square,
    _triangle,
    _hexagon,
    _cross,
    _ellipse,
    _flower,
    _star,
)


def _stripes(s: Plane, _t: Plane, _: np.random.Generator) -> Inside:
    return s % 1 < 0.5


def _checks(s: Plane, t: Plane, _: np.random.Generator) -> Inside:
    return (s * 0.9 % 1 < 0.5) ^ (t * 0.9 % 1 < 0.5)


def _dots(s: Plane, t: Plane, _: np.random.Generator) -> Inside:
    return (s % 1 - 0.5) ** 2 + (t % 1 - 0.5) ** 2 < 0.08


def _rings(s: Plane, t: Plane, rng: np.random.Generator) -> Inside:
    x, y = rng.uniform(6, 10, 2).astype(np.float32)  # their common center, often off the object
    return np.asarray(np.hypot(s - x, t - y) % 1 < 0.4)


def _zigzag(s: Plane, t: Plane, _: np.random.Generator) -> Inside:
    return (s * 0.9 + 1.1 * abs(t * 0.7 % 1 - 0.5)) % 1 < 0.5


def _lattice(s: Plane, t: Plane, _: np.random.Generator) -> Inside:
    return (s * 0.9 % 1 < 0.25) | (t * 0.9 % 1 < 0.25)


def _mosaic(s: Plane, t: Plane, rng: np.random.Generator) -> Inside:
    cells: Inside = rng.random((32, 32)) < 0.4
    figure: Inside = cells[(s * 2).astype(np.int64) % 32, (t * 2).astype(np.int64) % 32]
    return figure


def _bricks(s: Plane, t: Plane, _: np.random.Generator) -> Inside:
    row = np.floor(t * 1.2)
    return np.asarray((t * 1.2 - row > 0.25) & ((s * 0.6 + row * 0.5) % 1 > 0.15))


PATTERNS: dict[str, Pattern] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "zigzag": _zigzag,
    "lattice": _lattice,
    "mosaic": _mosaic,
    "bricks": _bricks,
}


@dataclass(frozen=True)
class ShapesSource:
    """A balanced set of drawn images, read like a folder of files."""

    images: int = 2000
    size: int = 32  # pixels along one side
    seed: int = 0
    split: str = "train"
    _drawn: dict[int, tuple[Image.Image, Image.Image]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(f"synthetic split={self.split!r}: choose from {', '.join(SPLITS)}")
        for name, value, least in (("images", self.images, 1), ("size", self.size, 8)):
            if value < least:
                raise DataError(f"synthetic {name}={value}: need at least {least}")
        if self.seed < 0:
            raise DataError(f"synthetic seed={self.seed}: need 0 or more")

    def __len__(self) -> int:
        return self.images

    @property
    def class_names(self) -> list[str]:
        """Names of the labels 0, 1, ..."""
        return list(PATTERNS)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The class of every image, (len(self),) int64; class sizes differ by at most one."""
        return np.arange(self.images, dtype=np.int64) % len(PATTERNS)

    def path(self, index: int) -> str:
        """Return a name for the image, unique within a seed."""
        return f"{PREFIX}shapes/{self.split}/{index:06d}"

    def image(self, index: int) -> Image.Image:
        """Return the image, RGB, (size, size)."""
        return self._pair(index)[0].copy()

    def mask(self, index: int) -> Image.Image:
        """Return the object's mask, mode L, (size, size): 255 on the object, 0 elsewhere."""
        return self._pair(index)[1].copy()

    def _pair(self, index: int) -> tuple[Image.Image, Image.Image]:
        if not 0 <= index < self.images:
            raise IndexError(f"image {index} of {self.images}")
        if index in self._drawn:
            return self._drawn[index]
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        pattern = PATTERNS[self.class_names[self.labels[index]]]
        pair = draw(pattern, rng, size=self.size)
        if self.images * self.size**2 * 4 <= CACHE_BYTES:
            self._drawn[index] = pair
        return pair


def draw(
    pattern: Pattern, rng: np.random.Generator, *, size: int
) -> tuple[Image.Image, Image.Image]:
    """Draw an object filled with a pattern; return the RGB image and the object's mask."""
    fine = 2 * size  # drawn at twice the size and averaged: smooth edges
    axis = (np.arange(fine, dtype=np.float32) + 0.5) / fine - 0.5
    x, y = rng.uniform(-_CENTER_SHIFT, _CENTER_SHIFT, 2).astype(np.float32)
    angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(*_RADIUS)
    cos, sin = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
    u = cos * (axis[None, :] - x) + sin * (axis[:, None] - y)
    v = cos * (axis[:, None] - y) - sin * (axis[None, :] - x)
    inside = OUTLINES[rng.integers(len(OUTLINES))](u, v)

    periods = np.float32(rng.uniform(*_PERIODS_PER_RADIUS))
    s0, t0 = rng.uniform(8, 16, 2).astype(np.float32)
    figure = pattern(u * periods + s0, v * periods + t0, rng)

    rgb = _background(rng, size=fine)
    rgb[inside & figure] = _colour(rng, lightness=rng.uniform(*_LIGHT))
    rgb[inside & ~figure] = _colour(rng, lightness=rng.uniform(*_DARK))
    mask = np.where(_shrunk(inside.astype(np.float32)) >= 0.5, np.uint8(255), np.uint8(0))
    image = (np.clip(_shrunk(rgb), 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(image), Image.fromarray(mask)


def _background(rng: np.random.Generator, *, size: int) -> Pixels:
    """Soft clouds, coarse and fine, between two colours, (size, size, 3)."""
    clouds = np.zeros((size, size), np.float32)
    for cells, weight in ((4, 0.6), (11, 0.4)):
        coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        clouds += weight * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    lightness = rng.uniform(*_SKY)
    low = _colour(rng, lightness=lightness - _CLOUDS / 2)
    high = _colour(rng, lightness=lightness + _CLOUDS / 2)
    return np.asarray(low + clouds[..., None] * (high - low))


def _colour(rng: np.random.Generator, *, lightness: float) -> npt.NDArray[np.float32]:
    """Return a colour of random hue around a lightness, (3,)."""
    channels = rng.uniform(-1, 1, 3)
    colour = lightness + _TINT * (channels - channels.mean())
    return np.asarray(np.clip(colour, 0, 1), dtype=np.float32)


def _shrunk(fine: Pixels) -> Pixels:
    """Halve the size, averaging squares of 2 x 2 pixels: (2P, 2P, ...) to (P, P, ...)."""
    rows: Pixels = fine[::2] + fine[1::2]
    total: Pixels = rows[:, ::2] + rows[:, 1::2]
    return total * np.float32(0.25)


def parse_synthetic(spec: str) -> ShapesSource:
    """Read `synthetic:shapes?images=2000&size=32&seed=0&split=train`; every key is optional.

    Raises:
        DataError: another set than `shapes`, an unknown or repeated key, or a bad value.
    """
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    if not spec.startswith(PREFIX) or name != "shapes":
        raise DataError(f"{spec!r}: the one synthetic set is '{PREFIX}shapes'")
    given: dict[str, str] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in _KEYS:
            raise DataError(f"{spec!r}: unknown key {key!r}, choose from {', '.join(_KEYS)}")
        if key in given:
            raise DataError(f"{spec!r}: {key!r} is given twice")
        if key != "split" and not (value.isascii() and value.isdecimal()):
            raise DataError(f"{spec!r}: {key}={value!r} is not a whole number")
        given[key] = value
    return ShapesSource(
        images=int(given.get("images", ShapesSource.images)),
        size=int(given.get("size", ShapesSource.size)),
        seed=int(given.get("seed", ShapesSource.seed)),
        split=given.get("split", ShapesSource.split),
    )
