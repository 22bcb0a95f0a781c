"""A labelled image set that is drawn, not downloaded: textured shapes on textured backgrounds.

A class is a kind of object: one outline filled with one pattern (a striped disc, a dotted
triangle, ...). Position, size, rotation, pattern period and phase, all colours and the background
are drawn anew for every image, so neither colour nor the raw pixels tell the class. Most of an
object is within any large crop and its pattern within any small one, and both survive colour
jitter and flips: what a self-supervised network should find without being told.

An image is a pure function of (seed, split, index). The mask of the object comes with it.
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
Pixels = npt.NDArray[np.float32]  # (..., 3) or (P, P), 0 to 1

PREFIX = "synthetic:"
SPLITS = ("train", "test")
_KEYS = ("images", "size", "seed", "split")  # of a spec
SUPERSAMPLING = 2  # drawn at twice the size and averaged: smooth edges
CACHE_BYTES = 256 * 2**20  # keep drawn images in memory while the whole set fits in this

_SHAPE_RADIUS = (0.34, 0.46)  # of the outline, as a fraction of the image side
_PERIODS_PER_RADIUS = (2.0, 2.8)  # of the pattern, along the outline's radius
_CENTER_SHIFT = 0.12  # of the outline from the image center, as a fraction of the side
_PATTERN_CONTRAST = 0.5  # least difference in lightness between the two colours of an object
_BACKGROUND_CONTRAST = 0.16  # of the clouds, in units of full lightness


def _disc(u: Plane, v: Plane) -> Inside:
    return u * u + v * v < 0.95


def _square(u: Plane, v: Plane) -> Inside:
    return np.maximum(abs(u), abs(v)) < 0.86


def _triangle(u: Plane, v: Plane) -> Inside:
    return np.maximum(v, 0.866 * abs(u) - 0.5 * v) < 0.58


def _hexagon(u: Plane, v: Plane) -> Inside:
    return np.maximum(abs(v), 0.866 * abs(u) + 0.5 * abs(v)) < 0.88


def _cross(u: Plane, v: Plane) -> Inside:
    low, high = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
    return (low < 0.46) & (high < 1.0)


def _ellipse(u: Plane, v: Plane) -> Inside:
    return (u / 1.1) ** 2 + (v / 0.68) ** 2 < 1


def _flower(u: Plane, v: Plane) -> Inside:
    return np.hypot(u, v) < 0.85 + 0.17 * np.cos(6 * np.arctan2(v, u))


def _star(u: Plane, v: Plane) -> Inside:
    sector = abs((np.arctan2(v, u) * (5 / np.pi) + 1) % 2 - 1)  # 0 at a tip, 1 between two
    return np.hypot(u, v) < 1.08 - 0.5 * sector


def _stripes(s: Plane, _t: Plane, _: np.random.Generator) -> Inside:
    return s % 1 < 0.5


def _checks(s: Plane, t: Plane, _: np.random.Generator) -> Inside:
    return (s % 1 < 0.5) ^ (t % 1 < 0.5)


def _dots(s: Plane, t: Plane, _: np.random.Generator) -> Inside:
    return (s % 1 - 0.5) ** 2 + (t % 1 - 0.5) ** 2 < 0.09


def _rings(s: Plane, t: Plane, rng: np.random.Generator) -> Inside:
    return (np.hypot(s, t) + rng.random()) % 1 < 0.5


def _zigzag(s: Plane, t: Plane, _: np.random.Generator) -> Inside:
    return (s + 0.9 * abs(t * 0.8 % 1 - 0.5)) % 1 < 0.5


def _lattice(s: Plane, t: Plane, _: np.random.Generator) -> Inside:
    return (s % 1 < 0.28) | (t % 1 < 0.28)


def _mosaic(s: Plane, t: Plane, rng: np.random.Generator) -> Inside:
    cells: Inside = rng.random((32, 32)) < 0.5
    which: Inside = cells[(s * 2.2).astype(np.int64) % 32, (t * 2.2).astype(np.int64) % 32]
    return which


def _spokes(s: Plane, t: Plane, rng: np.random.Generator) -> Inside:
    return (np.arctan2(t, s) * (7 / np.pi / 2) + rng.random()) % 1 < 0.5


@dataclass(frozen=True)
class _Kind:
    """One class: where the object is, and which of its two colours each pixel has."""

    name: str
    outline: Callable[[Plane, Plane], Inside]
    pattern: Callable[[Plane, Plane, np.random.Generator], Inside]
    centered: bool = False  # the pattern turns around the object's own center


KINDS = (
    _Kind("striped disc", _disc, _stripes),
    _Kind("checked square", _square, _checks),
    _Kind("dotted triangle", _triangle, _dots),
    _Kind("ringed flower", _flower, _rings, centered=True),
    _Kind("zigzag hexagon", _hexagon, _zigzag),
    _Kind("latticed cross", _cross, _lattice),
    _Kind("mosaic star", _star, _mosaic),
    _Kind("spoked ellipse", _ellipse, _spokes, centered=True),
)


@dataclass(frozen=True)
class ShapesSource:
    """A balanced set of drawn images; a source of images like a folder of files."""

    images: int = 2000
    size: int = 32  # pixels along one side
    seed: int = 0
    split: str = "train"
    _drawn: dict[int, tuple[Image.Image, Image.Image]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(f"synthetic split {self.split!r}: choose one of {', '.join(SPLITS)}")
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
        return [kind.name for kind in KINDS]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The class of every image, (len(self),) int64; class sizes differ by at most one."""
        return np.arange(self.images, dtype=np.int64) % len(KINDS)

    def path(self, index: int) -> str:
        """Return a name for the image, unique within this split."""
        return f"{PREFIX}shapes/{self.split}/{index:06d}"

    def image(self, index: int) -> Image.Image:
        """Return the image, RGB, (size, size)."""
        return self._draw(index)[0].copy()

    def mask(self, index: int) -> Image.Image:
        """Return the object's mask, mode L, (size, size): 255 on the object, 0 elsewhere."""
        return self._draw(index)[1].copy()

    def _draw(self, index: int) -> tuple[Image.Image, Image.Image]:
        if not 0 <= index < self.images:
            raise IndexError(f"image {index} of {self.images}")
        if index in self._drawn:
            return self._drawn[index]
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        pair = draw(KINDS[index % len(KINDS)], rng, size=self.size)
        if self.images * self.size**2 * 4 <= CACHE_BYTES:
            self._drawn[index] = pair
        return pair


def draw(kind: _Kind, rng: np.random.Generator, *, size: int) -> tuple[Image.Image, Image.Image]:
    """Draw one object of a kind on a background; return the image and the object's mask."""
    fine = size * SUPERSAMPLING
    axis = (np.arange(fine, dtype=np.float32) + 0.5) / fine - 0.5
    radius = rng.uniform(*_SHAPE_RADIUS)
    x, y = rng.uniform(-_CENTER_SHIFT, _CENTER_SHIFT, 2)
    angle, periods = rng.uniform(0, 2 * np.pi), rng.uniform(*_PERIODS_PER_RADIUS)
    cos, sin = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
    dx, dy = (axis - np.float32(x))[None, :], (axis - np.float32(y))[:, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx  # the object's own axes, its radius is 1

    phase = np.zeros(2) if kind.centered else rng.random(2)
    scale = np.float32(periods)
    first = kind.pattern(u * scale + np.float32(phase[0]), v * scale + np.float32(phase[1]), rng)
    inside = kind.outline(u, v)

    colours = _object_colours(rng)
    rgb = _background(rng, size=fine)
    rgb[inside & first], rgb[inside & ~first] = colours
    return _shrink(rgb, size=size), _shrink(inside.astype(np.float32), size=size)


def _object_colours(rng: np.random.Generator) -> Pixels:
    """Two random colours of clearly different lightness, (2, 3) in 0..1, in random order."""
    dark = rng.uniform(0.1, 1 - _PATTERN_CONTRAST - 0.1)
    light = rng.uniform(dark + _PATTERN_CONTRAST, 0.9)
    pair = np.stack([_tint(rng, lightness=dark), _tint(rng, lightness=light)])
    return pair[:: rng.choice((-1, 1))]


def _tint(rng: np.random.Generator, *, lightness: float) -> Pixels:
    """Return a colour of random hue around a lightness, (3,) in 0..1."""
    hue = rng.uniform(-1, 1, 3)
    colour = lightness + 0.2 * (hue - hue.mean())
    return np.clip(colour, 0, 1).astype(np.float32)


def _background(rng: np.random.Generator, *, size: int) -> Pixels:
    """Soft clouds between two tints of about the same lightness, (size, size, 3)."""
    clouds = np.zeros((size, size), np.float32)
    for cells, weight in ((4, 0.6), (11, 0.4)):
        coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        clouds += weight * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    lightness = rng.uniform(0.3, 0.7)
    low = _tint(rng, lightness=lightness - _BACKGROUND_CONTRAST / 2)
    high = _tint(rng, lightness=lightness + _BACKGROUND_CONTRAST / 2)
    sky: Pixels = low + clouds[..., None] * (high - low)
    return sky


def _shrink(fine: Pixels, *, size: int) -> Image.Image:
    """Average the supersampled pixels; a mask is then cut at one half."""
    shape = (size, SUPERSAMPLING, size, SUPERSAMPLING, *fine.shape[2:])
    mean = fine.reshape(shape).mean(axis=(1, 3))
    if mean.ndim == 2:
        return Image.fromarray(np.where(mean >= 0.5, np.uint8(255), np.uint8(0)))
    return Image.fromarray((np.clip(mean, 0, 1) * 255 + 0.5).astype(np.uint8))


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
        if key != "split" and not value.isdecimal():
            raise DataError(f"{spec!r}: {key}={value!r} is not a whole number")
        given[key] = value
    return ShapesSource(
        images=int(given.get("images", ShapesSource.images)),
        size=int(given.get("size", ShapesSource.size)),
        seed=int(given.get("seed", ShapesSource.seed)),
        split=given.get("split", ShapesSource.split),
    )
