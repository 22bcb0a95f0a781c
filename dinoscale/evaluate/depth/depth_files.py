"""Depth pictures: 16-bit numbers with a scale, in which 0 is a hole.

Shape letters: H, W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.dense_probes.target_files import TargetFiles

HOLE = 0.0  # no depth is known there; neither trains nor scores
MEMBER = "depth.png"  # beside KEY.jpg in a shard
NYU_NAMES = (("", ""), ("rgb_", "sync_depth_"))  # equal names, else those of NYUv2's scenes
# Of NYUv2's pictures, 480 x 640 pixels: rows and columns that are scored (Eigen et al. 2014).
_EIGEN_SIZE = 480, 640
_EIGEN_ROWS, _EIGEN_COLUMNS = (45, 471), (41, 601)

Depths = NDArray[np.float32]  # metres, HOLE where unknown


@dataclass(frozen=True)
class DepthRange:
    """Which depths count, in metres.

    Attributes:
        low: > 0; nearer ones are holes.
        high: farther ones are holes.
    """

    low: float = 0.001
    high: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ConfigError(f"need 0 < min_depth < max_depth, got {self.low} and {self.high}")


@dataclass(frozen=True)
class DepthTargets:
    """Reads depths.

    Attributes:
        files: where the depth pictures lie.
        scale: their numbers in a metre, as 1000 of millimetres.
        range: other depths become holes.
    """

    files: TargetFiles
    scale: float
    range: DepthRange
    name: str = "depth"

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"depth_scale: need a number above 0, got {self.scale}")

    def read(self, source: Source, index: int) -> Depths | None:
        """As of `Targets`: float32 (H, W), metres.

        Raises:
            DataError: the picture has 8 bits, or colors.
        """
        picture = self.files.read(source, index)
        if picture is None:
            return None
        return self.metres(picture, source.path(index))

    def metres(self, picture: Image.Image, path: str) -> Depths:
        """Depths of a picture as stored; `path` of its image, for messages."""
        if not (picture.mode.startswith("I") or picture.mode == "F"):
            raise DataError(
                f"{path}: its depth picture has the mode {picture.mode}, need one gray channel of"
                " 16 bits (or float). Save it as a 16-bit PNG."
            )
        numbers = np.nan_to_num(np.asarray(picture, dtype=np.float64) / self.scale, nan=HOLE)
        counted = (numbers >= self.range.low) & (numbers <= self.range.high)
        return np.where(counted, numbers, HOLE).astype(np.float32)

    def path(self, source: Source, index: int) -> str | None:
        """As of `Targets`."""
        return None if self.files.folder is None else self.files.path(source, index)

    def summary(self, target: Depths) -> NDArray[np.float64]:
        """Sum of the known depths in metres, and their number."""
        return np.array([target.sum(dtype=np.float64), np.count_nonzero(target)])


def eigen_crop(height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns that are scored on NYUv2; in pictures of another size the same shares."""
    rows, columns = (
        slice(*(round(edge * side / whole) for edge in edges))
        for edges, side, whole in zip(
            (_EIGEN_ROWS, _EIGEN_COLUMNS), (height, width), _EIGEN_SIZE, strict=True
        )
    )
    return rows, columns
