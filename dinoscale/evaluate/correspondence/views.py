"""What a correspondence is measured on: pairs of annotated pictures, or pictures and their warps.

Shape letter: K points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinoscale.data.augmentation.multi_crop import to_image
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.image_files import read_image_file
from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.any_size import Fit, read_image
from dinoscale.evaluate.correspondence.matching import patch_centers
from dinoscale.evaluate.correspondence.pairs import Pair
from dinoscale.evaluate.correspondence.warps import draw_warp

Array = NDArray[np.float64]
LengthOf = Literal["box", "image"]  # the longer side of the target's box, or of the target


@dataclass(frozen=True)
class View:
    """One picture of a pair; views of equal names show equal pictures."""

    name: str
    open: Callable[[], Image.Image]  # raises BadSampleError


@dataclass(frozen=True)
class Places:
    """The same places in two pictures, as fractions of width and height.

    Attributes:
        source: (K, 2).
        target: (K, 2).
        length: that errors are fractions of, in pixels of the target.
        outside: number of points that were left out, as a picture does not show them.
    """

    source: Array
    target: Array
    length: float
    outside: int


class Pairs(Protocol):
    """N pairs of pictures."""

    def __len__(self) -> int:
        """N."""
        ...

    def views(self, index: int) -> tuple[View, View]:
        """Source and target of a pair."""
        ...

    def places(self, index: int, source: tuple[int, int], target: tuple[int, int]) -> Places:
        """What both pictures show; DataError if that cannot be.

        Args:
            index: of the pair.
            source: width and height of the source in pixels.
            target: likewise.
        """
        ...

    @property
    def categories(self) -> Sequence[str]:
        """Of the N pairs, empty where it is not known; nothing if pairs have none."""
        ...

    def protocol(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        ...


class AnnotatedPairs:
    """Pairs with key points."""

    def __init__(self, pairs: list[Pair], decoder: Decoder, *, length_of: str | None) -> None:
        """Measure errors by `length_of`; None takes the boxes, if all pairs have one."""
        boxed = all(pair.target_box is not None for pair in pairs)
        self._length_of = length_of or ("box" if boxed else "image")
        if self._length_of not in get_args(LengthOf):
            raise ConfigError(f"length_of: need box or image, got {length_of!r}")
        if self._length_of == "box" and not boxed:
            without = next(pair for pair in pairs if pair.target_box is None)
            raise ConfigError(f"{without.where}: has no target_box. Use --length-of image.")
        self._pairs, self._decoder = pairs, decoder
        self.categories = [pair.category for pair in pairs]

    def __len__(self) -> int:
        return len(self._pairs)

    def views(self, index: int) -> tuple[View, View]:
        """As of `Pairs`."""
        pair = self._pairs[index]
        return self._view(pair.source), self._view(pair.target)

    def _view(self, path: Path) -> View:
        name = str(path)

        def read() -> Image.Image:
            return to_image(self._decoder.open(read_image_file(name), name).pixels())

        return View(name, read)

    def places(self, index: int, source: tuple[int, int], target: tuple[int, int]) -> Places:
        """As of `Pairs`."""
        pair = self._pairs[index]
        of_source, of_target = pair.source_points / source, pair.target_points / target
        shown = ((of_source >= 0) & (of_source <= 1) & (of_target >= 0) & (of_target <= 1)).all(1)
        length = float(max(target))
        if self._length_of == "box":
            assert pair.target_box is not None  # as all have one
            length = float((pair.target_box[2:] - pair.target_box[:2]).max())
        return Places(of_source[shown], of_target[shown], length, int((~shown).sum()))

    def protocol(self) -> dict[str, object]:
        """As of `Pairs`."""
        return {
            "points": "annotated key points",
            "length_of": f"longer side of the {self._length_of}",
        }


class WarpedPictures:
    """The pictures of a set, each with itself after a known affine map."""

    def __init__(self, source: Source, fit: Fit, *, seed: int, limit: int | None) -> None:
        """Warp the first `limit` pictures, or all; the points are the centers of their patches."""
        if limit is not None and limit < 1:
            raise ConfigError(f"limit: need at least one image, got {limit}")
        self._source, self._fit, self._seed = source, fit, seed
        self._number = min(len(source), limit or len(source))
        self.categories: list[str] = []

    def __len__(self) -> int:
        return self._number

    def views(self, index: int) -> tuple[View, View]:
        """As of `Pairs`."""
        name = self._source.path(index)

        def read() -> Image.Image:
            return read_image(self._source, index)

        def warped() -> Image.Image:
            image = read()
            return draw_warp(*image.size, seed=self._seed, index=index).picture(image)

        return View(name, read), View(f"{name}, warped", warped)

    def places(self, index: int, source: tuple[int, int], target: tuple[int, int]) -> Places:
        """As of `Pairs`."""
        places = patch_centers(*self._fit.grid(*source))
        warp = draw_warp(*source, seed=self._seed, index=index)
        moved = warp.places(places * source) / target
        shown = ((moved >= 0) & (moved <= 1)).all(1)
        # Not counted as outside: these are no annotations.
        return Places(places[shown], moved[shown], float(max(target)), 0)

    def protocol(self) -> dict[str, object]:
        """As of `Pairs`."""
        return {
            "points": "centers of all patches that stay on the picture",
            "warp": "about the center by up to 30 degrees and a factor of 1.4 up or down, then "
            "shifted by up to a quarter of the sides; uncovered pixels have the mean color",
            "length_of": "longer side of the image",
            "seed": self._seed,
        }


def no_place(pairs: Pairs, index: int) -> DataError:
    """The error of a pair without a point that both pictures show."""
    source, target = pairs.views(index)
    return DataError(f"{source.name} and {target.name}: no key point lies on both pictures.")
