"""Find pictures that look the same: 64-bit hashes, and all pairs that differ in few bits.

Shape letter: N pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL = 8  # side of the thumbnail that confirms a pair, in pixels
MAX_RADIUS = 8  # bits; beyond it, pairs of different pictures prevail

_BITS = 64
_SIDE = 32  # pixels of the shrunk grey picture whose frequencies make the hash
_LOW = 8  # the lowest frequencies in each direction are kept
# Root mean square difference of two thumbnails, in levels of 255. Of 1000 photographs, copies at a
# quarter of the size or at JPEG quality 10 stay below 7.
_SAME_LOOK = 10.0
_PLAIN = 4.0  # standard deviation in grey levels; below it the frequencies are mostly noise


def _cosines() -> NDArray[np.float64]:
    """The lowest rows of the DCT-II, (_LOW, _SIDE)."""
    k, n = np.arange(_LOW)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(math.pi * k * (2 * n + 1) / (2 * _SIDE))


_DCT = _cosines()


def perceptual_hash(pixels: NDArray[np.uint8]) -> int | None:
    """Return the signs of the low frequencies of the grey picture about their median.

    Source: the usual pHash (Zauner 2010, "Implementation and benchmarking of perceptual image hash
    functions", section 3.2.1). It survives re-encoding and resizing, not cropping or rotation.

    Args:
        pixels: uint8 (H, W, 3).

    Returns:
        64 bits; None for a picture so plain that its hash would mean nothing.
    """
    grey = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.float64)
    if values.std() < _PLAIN:
        return None
    low = (_DCT @ values @ _DCT.T).ravel()
    bits = low > np.median(low[1:])  # without the mean of the picture
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Shrink to (8, 8, 3) by averaging."""
    small = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small)


def close_pairs(hashes: NDArray[np.uint64], *, radius: int) -> Iterator[NDArray[np.int64]]:
    """Yield all pairs of hashes that differ in at most `radius` bits, some of them repeatedly.

    Source: Manku et al. 2007, "Detecting near-duplicates for web crawling". The bits are cut into
    radius + d pieces: two close hashes agree in some d of them. For each choice of d pieces the
    hashes are sorted by these pieces, and only neighbours that are equal there are compared. d is
    the smallest number whose pieces tell N hashes apart, so that the groups of equal ones are
    small: for hashes spread like those of different pictures, the time is that of
    binomial(radius + d, d) sorts. Equal hashes are paired only with the first of them and their
    predecessor, and the first stands for all: many copies of a picture cost no quadratic time.

    Args:
        hashes: (N,) uint64.
        radius: 0 to MAX_RADIUS.

    Yields:
        Pairs (P, 2) of positions, the first below the second.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]) + 1
    yield np.stack([order[again - 1], order[again]], axis=1).astype(np.int64)
    yield np.stack([first[inverse[order[again]]], order[again]], axis=1).astype(np.int64)
    taken = num_pieces(len(unique), radius=radius)  # d
    pieces = np.array_split(np.arange(_BITS), radius + taken)
    for chosen in combinations(pieces, taken) if radius else ():
        mask = np.uint64(sum(1 << int(bit) for piece in chosen for bit in piece))
        for pairs in _equal_neighbours(unique & mask):
            differing = np.bitwise_xor(unique[pairs[:, 0]], unique[pairs[:, 1]])
            near = first[pairs[_count_bits(differing) <= radius]]
            yield np.sort(near, axis=1).astype(np.int64)


def num_pieces(number: int, *, radius: int) -> int:
    """d, the smallest number of pieces whose bits tell so many hashes apart."""
    taken = 1
    while _BITS // (radius + taken) * taken < math.log2(max(2, number)):
        taken += 1
    return taken


def _equal_neighbours(keys: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
    """All pairs of positions with equal keys: those at distance 1 in sorted order, 2, 3, ..."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    left = np.arange(len(keys))
    distance = 1
    while len(left := left[left < len(keys) - distance]):
        left = left[ordered[left] == ordered[left + distance]]
        yield np.stack([order[left], order[left + distance]], axis=1)
        distance += 1


def _count_bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).sum(
        axis=1, dtype=np.int64
    )
    return counts


def look_alike(
    rows: NDArray[np.void], one: int, others: NDArray[np.int64], *, radius: int
) -> NDArray[np.bool_]:
    """Which pictures look like one: hashes within the radius, and thumbnails that confirm it.

    Args:
        rows: `hash`, `hashed` (False: too plain to compare) and `thumbnail` of all pictures.
        one: number of a picture.
        others: numbers of pictures, (P,).
        radius: most bits in which two hashes differ.

    Returns:
        (P,).
    """
    differing = np.bitwise_xor(rows["hash"][others], rows["hash"][one])
    alike: NDArray[np.bool_] = rows["hashed"][others] & rows["hashed"][one]
    alike &= _count_bits(differing) <= radius
    looks = rows["thumbnail"][others[alike]].astype(np.float32)  # (A, 8, 8, 3)
    distance = looks - rows["thumbnail"][one].astype(np.float32)
    alike[alike] = np.sqrt((distance**2).mean(axis=(1, 2, 3))) <= _SAME_LOOK
    return alike


class Groups:
    """Which pictures belong together, joined pair by pair (union-find)."""

    def __init__(self, number: int):
        self._parent = list(range(number))

    def join(self, one: int, other: int) -> None:
        """Join the groups of two pictures."""
        low, high = sorted((self._root(one), self._root(other)))
        self._parent[high] = low

    def _root(self, index: int) -> int:
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def of_several(self) -> list[list[int]]:
        """Groups of two or more, each ascending, by their first."""
        members: dict[int, list[int]] = {}
        for index in range(len(self._parent)):
            members.setdefault(self._root(index), []).append(index)
        return [group for group in members.values() if len(group) > 1]
