"""Which images are copies of which, and what is kept of each group.

Source: Oquab et al. 2023 (arXiv:2304.07193), section 3 and appendix A: images are joined with those
of their k nearest neighbours that are similar enough. Of each connected component one image is
kept, and none if one of its images is similar to an image of a test set.

Shape letters: N images, P pairs, T images similar to a test image, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_tools.curation.embeddings import Embeddings
from data_tools.near_duplicates import Groups
from dinoscale.errors import DataError

LADDER = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.999)  # cosines of a table


@dataclass(frozen=True, eq=False)
class Sets:
    """What is compared.

    Attributes:
        whole: embeddings of the images.
        tests: embeddings of test sets.
        images: folder of the images, if it has moved.
    """

    whole: Embeddings
    tests: list[Embeddings]
    images: str | None = None


@dataclass(frozen=True)
class Similar:
    """Which images count as copies.

    Attributes:
        threshold: least cosine of two images of the set.
        against: least cosine of an image of the set and one of a test set.
        k: how many of the nearest neighbours of an image may be its copies.
    """

    threshold: float
    against: float
    k: int

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name, cosine in (("threshold", self.threshold), ("against-threshold", self.against)):
            if not 0 < cosine <= 1:
                raise DataError(f"--{name} {cosine}: need a cosine above 0, at most 1")
        if self.k < 1:
            raise DataError(f"--neighbours {self.k}: need at least one")


@dataclass(frozen=True, eq=False)
class Found:
    """All pairs.

    Attributes:
        images: N.
        pairs: an image and a similar one among its neighbours, rows (P, 2).
        cosines: of the pairs, (P,).
        full: images whose k neighbours are all similar.
        ladder: how many images have a nearest neighbour at each cosine of LADDER or above.
        tests: of each test set, images of the set with the most similar test image, (T, 2), and
            their cosines, (T,).
    """

    images: int
    pairs: NDArray[np.int64]
    cosines: NDArray[np.float64]
    full: int
    ladder: NDArray[np.int64]
    tests: list[tuple[NDArray[np.int64], NDArray[np.float64]]]

    @cached_property
    def closest(self) -> NDArray[np.float64]:
        """The largest cosine of each image in its pairs, (N,), 0 without any."""
        closest = np.zeros(self.images)
        for end in (0, 1):
            np.maximum.at(closest, self.pairs[:, end], self.cosines)
        return closest


@dataclass(frozen=True, eq=False)
class Grouped:
    """What becomes of every image.

    Attributes:
        copies: kept images with their copies.
        near: images similar to a test image.
        beside: images left out since one of their group is similar to a test image.
        kept: rows of the images that stay, ascending.
    """

    copies: list[tuple[int, list[int]]]
    near: list[int]
    beside: list[int]
    kept: NDArray[np.int64]


def groups_in(found: Found) -> list[list[int]]:
    """The connected components of two images and more, each ascending, by their first."""
    groups = Groups(found.images)
    for one, other in found.pairs.tolist():
        groups.join(one, other)
    return groups.of_several()


def decide(found: Found, groups: list[list[int]], pixels: NDArray[np.int64]) -> Grouped:
    """Say what is kept: of a group the largest picture, of equally large ones the first.

    Args:
        found: all pairs.
        groups: of `groups_in`.
        pixels: of the images of the groups, one group after the other.
    """
    near = {row for pairs, _ in found.tests for row in pairs[:, 0].tolist()}
    copies: list[tuple[int, list[int]]] = []
    beside: list[int] = []
    first = 0
    for group in groups:
        largest = group[int(pixels[first : first + len(group)].argmax())]  # the first of equals
        first += len(group)
        if near.isdisjoint(group):
            copies.append((largest, [row for row in group if row != largest]))
        else:
            beside += [row for row in group if row not in near]
    is_kept = np.ones(found.images, dtype=np.bool_)
    is_kept[[*near, *beside, *(row for _, others in copies for row in others)]] = False
    return Grouped(copies, sorted(near), sorted(beside), np.flatnonzero(is_kept))
