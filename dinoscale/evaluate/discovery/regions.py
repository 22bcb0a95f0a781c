"""The object of a picture by the features of its patches alone: TokenCut, and the cheaper LOST.

Shape letters: P patches, R, C rows and columns of patches (P = R C), D width.
Source: Wang et al. 2022 (arXiv:2202.11539) for TokenCut; Simeoni et al. 2021 (arXiv:2109.14279) for
LOST. Both use the keys of DINO's last block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinoscale.errors import DataError

TAU = 0.2  # cosine from which on two patches are joined; of the paper for ViT-S/16
WEAK_EDGE = 1e-5  # weight of every other edge, which keeps the graph connected
EXPANSION = 100  # patches of lowest degree, among which LOST looks for more of the object
MAX_PATCHES = 2**13  # of a graph, whose matrix then takes half a gigabyte
ROWS_AT_ONCE = 1024  # of the products of all patches, so that they are never in memory together

_DENSE_BELOW = 32  # patches; Lanczos needs some more than vectors are wanted

Array = NDArray[np.float64]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Region:
    """The patches of the object that was found.

    Attributes:
        mask: (R, C) bool, connected (by edges, not corners).
        map: (R, C), from which it was cut, largest on the object.
        seed: row and column of the patch that the object was found by.
    """

    mask: NDArray[np.bool_]
    map: Array
    seed: tuple[int, int]

    def box(self, width: int, height: int) -> Box:
        """Bounding box of the patches on the picture of this size that they cover."""
        rows, columns = self.mask.shape
        vertical, horizontal = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return (
            float(horizontal[0] * width / columns),
            float(vertical[0] * height / rows),
            float((horizontal[-1] + 1) * width / columns),
            float((vertical[-1] + 1) * height / rows),
        )


def token_cut(features: Tensor, *, tau: float = TAU) -> Region:
    """Cut the graph of patches in two, and take the connected region of the strongest patch.

    Edges of patches whose cosine is at least tau weigh 1, all others 1e-5. The second smallest
    eigenvector y of (D - E) y = lambda D y is split at its mean; the object is the side of its
    entry of the largest absolute value, and of that side the region connected to it. If all edges
    are equal, nothing can be cut, and the object is the whole picture.

    Args:
        features: (R, C, D) of one picture, not all zero.
        tau: -1 <= tau <= 1.

    Raises:
        DataError: there are too many patches.
    """
    rows, columns = features.shape[:2]
    check_patches(rows, columns)
    flat = F.normalize(features.flatten(0, 1).float(), dim=1)
    joined = (flat @ flat.T >= tau).cpu().numpy()
    joined |= joined.T  # cosines next to tau may be rounded to either side of it
    if joined.all() or not joined.any():
        return Region(np.ones((rows, columns), np.bool_), np.ones((rows, columns)), (0, 0))
    cut = normalised_cut(np.where(joined, 1.0, WEAK_EDGE))
    seed = int(abs(cut).argmax())
    cut = cut * np.sign(cut[seed])
    return _region((cut > cut.mean()).reshape(rows, columns), cut.reshape(rows, columns), seed)


def check_patches(rows: int, columns: int) -> None:
    """Refuse more patches than `token_cut` takes.

    Raises:
        DataError: there are more.
    """
    if rows * columns > MAX_PATCHES:
        raise DataError(
            f"{columns} x {rows} patches are more than the {MAX_PATCHES} of which a graph is cut."
            " Choose a smaller size, or the method lost."
        )


def normalised_cut(edges: Array) -> Array:
    """Second smallest eigenvector y of (D - E) y = lambda D y, D the sums of the rows of E.

    It is D^-1/2 z of the second largest eigenvector z of D^-1/2 E D^-1/2 (Shi and Malik 2000).

    Args:
        edges: E, (P, P), symmetric, positive; P at least 2.

    Returns:
        (P,), of either sign.
    """
    roots = np.sqrt(edges.sum(axis=0))
    whitened = edges / roots
    whitened /= roots[:, None]
    return np.asarray(_second_largest(whitened) / roots)


def _second_largest(matrix: Array) -> Array:
    """Eigenvector of the second largest eigenvalue of a symmetric matrix (P, P)."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    if len(matrix) > _DENSE_BELOW:
        start = np.random.default_rng(0).standard_normal(len(matrix))  # the same at every call
        try:
            values, vectors = eigsh(matrix, k=2, which="LA", v0=start)
            return np.asarray(vectors[:, values.argmin()])
        except ArpackNoConvergence:  # almost equal eigenvalues; slow, but it always ends
            pass
    return np.asarray(eigh(matrix, subset_by_index=[len(matrix) - 2] * 2)[1][:, 0])


def lost(features: Tensor, *, expansion: int = EXPANSION) -> Region:
    """Grow the object from the patch that resembles the fewest others.

    Two patches are alike if their product is not negative. The seed is alike to the fewest; those
    of the `expansion` patches next to it in that order that are alike to it are seeds too. The
    object are the patches whose products with all seeds sum to no negative number, and of them the
    region connected to the seed.

    Args:
        features: (R, C, D) of one picture, not normalised.
        expansion: k >= 1, patches.
    """
    rows, columns = features.shape[:2]
    flat = features.flatten(0, 1).float()
    degrees = torch.cat([(part @ flat.T >= 0).sum(1) for part in flat.split(ROWS_AT_ONCE)])
    order = degrees.argsort(stable=True)[:expansion]
    seeds = order[flat[order] @ flat[order[0]] >= 0]
    sums = (flat @ flat[seeds].T).sum(1).double().cpu().numpy()
    grid = sums.reshape(rows, columns)
    return _region(grid >= 0, grid, int(order[0]))


def _region(side: NDArray[np.bool_], of: Array, seed: int) -> Region:
    """The part of one side (R, C) that is connected to the seed, which lies in it."""
    from scipy.ndimage import label

    row, column = divmod(seed, side.shape[1])
    parts, _ = label(side)
    return Region(parts == parts[row, column], of, (row, column))
