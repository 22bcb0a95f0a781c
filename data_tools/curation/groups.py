"""Which images are copies of which, and what is kept of each group.

Source: Oquab et al. 2023 (arXiv:2304.07193), section 3 and appendix A: images are joined with those
of their k nearest neighbours that are similar enough. Of each connected component one image is
kept, and none if one of its images is similar to an image of a test set.

Shape letters: N images, P pairs, T images similar to a test image, k neighbours, G groups, M images
in these, C copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_tools.curation.embeddings import Embeddings
from dinoscale.errors import DataError

LADDER = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.999)  # cosines of a table

_PAIRS = 2**20  # joined at a time, or N where that is more


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
class Groups:
    """Connected components of two images and more, by their first image.

    Attributes:
        rows: images of the groups, one group after the other, each ascending, (M,).
        starts: where each group begins in these, and M, (G + 1,).
    """

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]

    @property
    def of_rows(self) -> NDArray[np.int64]:
        """Group of each of the rows, (M,)."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


@dataclass(frozen=True, eq=False)
class Grouped:
    """What becomes of every image.

    Attributes:
        keepers: kept images that have copies, (G,).
        copies: the copies, those of one after those of the other, (C,).
        starts: where the copies of each kept image begin, and C, (G + 1,).
        near: images similar to a test image, ascending.
        beside: images left out since one of their group is similar to a test image, ascending.
        kept: rows of the images that stay, ascending.
    """

    keepers: NDArray[np.int64]
    copies: NDArray[np.int64]
    starts: NDArray[np.int64]
    near: NDArray[np.int64]
    beside: NDArray[np.int64]
    kept: NDArray[np.int64]

    def copies_of(self, group: int) -> list[int]:
        """The copies of a kept image, by its place."""
        rows: list[int] = self.copies[self.starts[group] : self.starts[group + 1]].tolist()
        return rows


def groups_in(found: Found) -> Groups:
    """The groups that pairs join, in blocks of pairs: 20 N bytes and 40 a pair of a block."""
    first = np.arange(found.images)  # the lowest image that each is joined with so far
    block = max(_PAIRS, found.images)  # a block goes through all images
    for start in range(0, len(found.pairs), block):
        _join(first, found.pairs[start : start + block])
    rows = np.flatnonzero(np.bincount(first)[first] > 1)
    rows = rows[np.argsort(first[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(first[rows], prepend=-1))
    return Groups(rows, np.append(starts, len(rows)))


def _join(first: NDArray[np.int64], pairs: NDArray[np.int64]) -> None:
    """Join pairs (P, 2) in place: two rounds halve the groups that are still to join, or better."""
    while True:
        ends = first[pairs]
        ends = ends[ends[:, 0] != ends[:, 1]]
        if not len(ends):
            return
        np.minimum.at(first, ends.max(axis=1), ends.min(axis=1))
        while not np.array_equal(first, first[first]):  # until each knows its lowest
            first[:] = first[first]


def decide(found: Found, groups: Groups, pixels: NDArray[np.int64]) -> Grouped:
    """Say what is kept: of a group the largest picture, of equally large ones the first.

    Args:
        found: all pairs.
        groups: of `groups_in`.
        pixels: of the images of the groups, (M,).
    """
    of_rows = groups.of_rows
    is_near = np.zeros(found.images, dtype=np.bool_)
    for pairs, _ in found.tests:
        is_near[pairs[:, 0]] = True
    is_bad = np.zeros(len(groups.starts) - 1, dtype=np.bool_)  # groups
    is_bad[of_rows[is_near[groups.rows]]] = True
    is_copy = ~is_bad[of_rows]
    largest = np.lexsort((-pixels, of_rows))[groups.starts[:-1]]  # stable: the first of equals
    is_copy[largest] = False
    beside = groups.rows[is_bad[of_rows] & ~is_near[groups.rows]]
    is_kept = ~is_near
    is_kept[beside] = False
    is_kept[groups.rows[is_copy]] = False
    sizes = np.diff(groups.starts)[~is_bad] - 1
    return Grouped(
        groups.rows[largest[~is_bad]],
        groups.rows[is_copy],
        np.append(0, np.cumsum(sizes)),
        np.flatnonzero(is_near),
        np.sort(beside),
        np.flatnonzero(is_kept),
    )
