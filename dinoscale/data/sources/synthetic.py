"""A labelled image set that is drawn, not downloaded: patterned shapes on cloudy backgrounds.

A picture shows several objects of one class, and a class is a kind of pattern (stripes, dots,
rings, ...). Number, places, sizes, outlines and rotations of the objects, the phase of the pattern
and all colours are drawn for every object on its own. So neither colour nor the raw pixels tell
the class, and two crops of a picture show different objects in different colours: what they share
is the pattern, which a self-supervised network has to find.

An image is a pure function of (seed, split, index). The mask of the objects comes with it.
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

from dinoscale.data.decoding.decode import Picture
from dinoscale.errors import DataError

Plane = npt.NDArray[np.float32]  # (P, P), one number per pixel
Inside = npt.NDArray[np.bool_]  # (P, P)
Pixels = npt.NDArray[np.float32]  # (P, P, 3), or (P, P) for a mask
Color = npt.NDArray[np.float32]  # (3,)
Outline = Callable[[Plane, Plane], Inside]  # of the object's axes; its radius is about 1
Pattern = Callable[[Plane, Plane, np.random.Generator], Inside]  # of the object's axes in periods

PREFIX = "synthetic:"
SPLITS = ("train", "test")
SUPERSAMPLING = 2  # drawn at twice the size and averaged, for smooth edges
CACHE_BYTES = 256 * 2**20  # keep drawn images in memory while the whole set fits in this

_KEYS = ("images", "size", "seed", "split")  # of a spec
_NUM_OBJECTS = (8, 12)
_RADIUS = (0.2, 0.3)  # of an object
_PERIOD_SPREAD = 0.15  # of the period, up and down
_MIDDLE, _CONTRAST = (0.4, 0.6), (0.5, 0.8)  # of the lightness of an object's two colours
_SKY, _CLOUDS = (0.45, 0.55), 0.1  # lightness of the background and difference within it
_TINT = 0.12  # how far the channels of a colour lie from its lightness


def _disc(u: Plane, v: Plane) -> Inside:
    return u * u + v * v < 0.95


def _square(u: Plane, v: Plane) -> Inside:
    return np.maximum(abs(u), abs(v)) < 0.86


def _hexagon(u: Plane, v: Plane) -> Inside:
    edge: Plane = np.maximum(abs(v), 0.866 * abs(u) + 0.5 * abs(v))
    return edge < 0.88


def _flower(u: Plane, v: Plane) -> Inside:
    edge: Plane = np.hypot(u, v) - 0.17 * np.cos(6 * np.arctan2(v, u))
    return edge < 0.85


def _plain(s: Plane, _t: Plane, _: np.random.Generator) -> Inside:
    return np.zeros(s.shape, dtype=np.bool_)


def _stripes(s: Plane, _t: Plane, rng: np.random.Generator) -> Inside:
    return (s + np.float32(rng.random())) % 1 < 0.5


def _dots(s: Plane, t: Plane, rng: np.random.Generator) -> Inside:
    x, y = np.float32(rng.random()), np.float32(rng.random())
    return ((s + x) % 1 - 0.5) ** 2 + ((t + y) % 1 - 0.5) ** 2 < 0.11


def _checks(s: Plane, t: Plane, rng: np.random.Generator) -> Inside:
    x, y = np.float32(rng.random()), np.float32(rng.random())
    return ((s + x) % 1 < 0.5) ^ ((t + y) % 1 < 0.5)


def _speckles(s: Plane, t: Plane, rng: np.random.Generator) -> Inside:
    cells: Inside = rng.random((64, 64)) < 0.5
    rows, columns = (np.floor(x * 2).astype(np.int64) % 64 for x in (s, t))
    return cells[rows, columns]


def _rings(s: Plane, t: Plane, _: np.random.Generator) -> Inside:
    radius: Plane = np.hypot(s, t)
    return radius % 1 < 0.5


def _halves(s: Plane, _t: Plane, _: np.random.Generator) -> Inside:
    return s < 0


OUTLINES: tuple[Outline, ...] = (_disc, _square, _hexagon, _flower)
# Class name -> pattern and its period.
KINDS: dict[str, tuple[Pattern, float]] = {
    "plain": (_plain, 1.0),
    "fine stripes": (_stripes, 0.1),
    "bold stripes": (_stripes, 0.215),
    "dots": (_dots, 0.14),
    "checks": (_checks, 0.235),
    "speckles": (_speckles, 0.1),
    "rings": (_rings, 0.165),
    "halves": (_halves, 1.0),
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
        return list(KINDS)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The class of every image, (len(self),) int64; class sizes differ by at most one."""
        return np.arange(self.images, dtype=np.int64) % len(KINDS)

    def path(self, index: int) -> str:
        """Return a name for the image, unique within a seed."""
        return f"{PREFIX}shapes/{self.split}/{index:06d}"

    def identity(self, _alive: Callable[[], None] = lambda: None, /) -> str:
        """What the pictures are drawn from."""
        return f"{PREFIX}shapes/{self.split}/{self.images}/{self.size}/{self.seed}"

    def picture(self, index: int) -> Picture:
        """Return the image, RGB, (size, size)."""
        return Picture.of(np.asarray(self._pair(index)[0]), self.path(index))

    def mask(self, index: int) -> Image.Image:
        """Return the mask of the objects, mode L, (size, size): 255 on the object, 0 elsewhere."""
        return self._pair(index)[1].copy()

    def _pair(self, index: int) -> tuple[Image.Image, Image.Image]:
        if not 0 <= index < self.images:
            raise IndexError(f"image {index} of {self.images}")
        if index in self._drawn:
            return self._drawn[index]
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        pattern = KINDS[self.class_names[self.labels[index]]]
        pair = draw(pattern, rng, size=self.size)
        if self.images * self.size**2 * 4 <= CACHE_BYTES:
            self._drawn[index] = pair
        return pair


def draw(
    kind: tuple[Pattern, float], rng: np.random.Generator, *, size: int
) -> tuple[Image.Image, Image.Image]:
    """Draw objects of one kind on a background.

    Args:
        kind: pattern and its period.
        rng: draws everything else.
        size: P.

    Returns:
        The picture, RGB, and the mask of its objects, mode L, 255 on an object; both (P, P).
    """
    pattern, period = kind
    fine = size * SUPERSAMPLING
    axis = (np.arange(fine, dtype=np.float32) + 0.5) / fine
    rgb = _background(rng, fine=fine)
    covered = np.zeros((fine, fine), dtype=np.bool_)
    for _ in range(rng.integers(_NUM_OBJECTS[0], _NUM_OBJECTS[1] + 1)):
        x, y = rng.random(2).astype(np.float32)
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(*_RADIUS)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        dx, dy = (axis - x)[None, :], (axis - y)[:, None]
        u, v = cos * dx + sin * dy, cos * dy - sin * dx  # the object's own axes
        outline = OUTLINES[rng.integers(len(OUTLINES))]
        inside = outline(u / np.float32(radius), v / np.float32(radius))
        scale = np.float32(1 / (period * rng.uniform(1 - _PERIOD_SPREAD, 1 + _PERIOD_SPREAD)))
        first = pattern(u * scale, v * scale, rng)
        rgb[inside & first], rgb[inside & ~first] = _two_colors(rng)
        covered |= inside
    picture = np.clip(_shrink(rgb, size=size), 0, 1) * 255 + 0.5
    mask = np.where(_shrink(covered.astype(np.float32), size=size) >= 0.5, 255, 0)
    return Image.fromarray(picture.astype(np.uint8)), Image.fromarray(mask.astype(np.uint8))


def _two_colors(rng: np.random.Generator) -> tuple[Color, Color]:
    """Two colours of clearly different lightness, in random order."""
    middle, contrast = rng.uniform(*_MIDDLE), rng.uniform(*_CONTRAST) * rng.choice((-0.5, 0.5))
    return _tint(rng, lightness=middle + contrast), _tint(rng, lightness=middle - contrast)


def _tint(rng: np.random.Generator, *, lightness: float) -> Color:
    """A colour of random hue around a lightness."""
    hue = rng.uniform(-1, 1, 3)
    color: Color = np.clip(lightness + _TINT * (hue - hue.mean()), 0, 1).astype(np.float32)
    return color


def _background(rng: np.random.Generator, *, fine: int) -> Pixels:
    """Soft clouds between two tints of about the same lightness, (fine, fine, 3)."""
    coarse = Image.fromarray(rng.random((5, 5), dtype=np.float32))
    clouds = np.asarray(coarse.resize((fine, fine), Image.Resampling.BICUBIC))
    lightness = rng.uniform(*_SKY)
    low = _tint(rng, lightness=lightness - _CLOUDS / 2)
    high = _tint(rng, lightness=lightness + _CLOUDS / 2)
    sky: Pixels = low + clouds[..., None] * (high - low)
    return sky


def _shrink(pixels: Pixels, *, size: int) -> Pixels:
    """Average each square of SUPERSAMPLING pixels."""
    shape = (size, SUPERSAMPLING, size, SUPERSAMPLING, *pixels.shape[2:])
    mean: Pixels = pixels.reshape(shape).mean(axis=(1, 3))
    return mean


def parse_synthetic(spec: str) -> ShapesSource:
    """Read `synthetic:shapes?images=2000&size=32&seed=0&split=train`; every key is optional.

    Raises:
        DataError: another set than `shapes`, an unknown or repeated key, or a bad value.
    """
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    if not spec.startswith(PREFIX) or name != "shapes":
        raise DataError(f"{spec!r}: the only synthetic set is '{PREFIX}shapes'")
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
