"""A picture and itself turned, zoomed and shifted: the same places are known without labels.

Shape letter: K points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageStat

ROTATION = 30.0  # degrees, at most, either way
ZOOM = 1.4  # at most, or its inverse
SHIFT = 0.25  # of the width and of the height, at most

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Warp:
    """An affine map of the places of a picture.

    Attributes:
        matrix: (2, 3); a place (x, y) in pixels goes to matrix @ (x, y, 1).
    """

    matrix: Array

    def places(self, points: Array) -> Array:
        """Where points (K, 2) go."""
        return np.asarray(points @ self.matrix[:, :2].T + self.matrix[:, 2])

    def picture(self, image: Image.Image) -> Image.Image:
        """The picture after the map, of the same size; uncovered pixels have the mean color."""
        whole = np.vstack([self.matrix, [0, 0, 1]])
        back = np.linalg.inv(whole)[:2].flatten().tolist()  # Pillow wants where a pixel comes from
        mean = tuple(round(value) for value in ImageStat.Stat(image).mean)
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            back,
            resample=Image.Resampling.BICUBIC,
            fillcolor=mean if len(mean) > 1 else mean[0],
        )


def draw_warp(width: int, height: int, *, seed: int, index: int) -> Warp:
    """The warp of a picture of this size: the same for the same seed and index.

    About the center it turns by up to 30 degrees and zooms by up to 1.4 or 1/1.4; then it shifts by
    up to a quarter of the width and height.
    """
    rng = np.random.default_rng((seed, index))
    angle = math.radians(rng.uniform(-ROTATION, ROTATION))
    zoom = ZOOM ** rng.uniform(-1, 1)
    shift = rng.uniform(-SHIFT, SHIFT, 2) * (width, height)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    center = np.array([width, height]) / 2
    linear = zoom * turn
    offset = center + shift - linear @ center
    return Warp(np.hstack([linear, offset[:, None]]))
