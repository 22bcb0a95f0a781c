"""Principal components of patch features, and those of one network turned to another's.

The sign of a component is arbitrary; its entry of the largest absolute value is made positive
(scikit-learn's rule), so that equal weights give equal pictures.

Shape letters: P patches, D width, R, C rows and columns of patches, F numbers of a patch.
Source: Oquab et al. 2023 (arXiv:2304.07193), figures 1 and 9; no code was published for them.
Schoenemann 1966, A generalized solution of the orthogonal Procrustes problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dinoscale.errors import DataError
from dinoscale.runtime.outputs import atomic_write

COMPONENTS = 3  # red, green, blue

_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Basis:
    """Principal components of patch features.

    Attributes:
        mean: (D,) of the features.
        components: (3, D), orthonormal, the strongest first; after `mixed`, mixtures of these.
        explained: share of the variance that each of the principal components explains, 0..1.
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    explained: NDArray[np.float64]

    def project(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Project features (..., D) to (..., 3)."""
        return ((features - self.mean) @ self.components.T).astype(np.float32)

    def mixed(self, mixture: NDArray[np.float64]) -> Basis:
        """The basis whose projections are those of this one times `mixture`, (3, 3)."""
        return Basis(self.mean, mixture.T @ self.components, self.explained)

    def save(self, file: Path) -> None:
        """Write the attributes into an NPZ file."""
        with atomic_write(file) as beside:
            np.savez(beside, **asdict(self))


def fit_basis(parts: Sequence[NDArray[np.float32]]) -> Basis:
    """Fit the components of features (P, D) in parts, as of images; P and D at least 3.

    By the covariance in float64: exact, deterministic, and no copy of more than one part.

    Raises:
        DataError: there are fewer.
    """
    count, width = sum(map(len, parts)), parts[0].shape[1]
    if min(count, width) < COMPONENTS:
        raise DataError(
            f"{COMPONENTS} components need at least as many patches and channels, got "
            f"{[count, width]}. Use more or larger images."
        )
    mean = np.sum([part.sum(axis=0, dtype=np.float64) for part in parts], axis=0) / count
    scatter = np.zeros((width, width))
    for part in parts:
        centered = part - mean
        scatter += centered.T @ centered
    values, vectors = np.linalg.eigh(scatter)  # ascending
    components = vectors.T[: -COMPONENTS - 1 : -1]
    strongest = np.abs(components).argmax(axis=1)
    signs = np.sign(components[np.arange(COMPONENTS), strongest])
    explained = values[: -COMPONENTS - 1 : -1].clip(0) / max(float(np.trace(scatter)), _TINY)
    return Basis(mean, signs[:, None] * components, explained)


def find_foreground(first: list[NDArray[np.float32]]) -> list[NDArray[np.bool_]]:
    """Split patches at the mean of the first component; the side rarer at borders is foreground.

    Args:
        first: (R, C) of each image, with mean 0 over all of them.

    Returns:
        (R, C) of each image, True for foreground.
    """
    above = [component > 0 for component in first]
    border = np.concatenate([x[at] for x in above for at in (0, -1, np.s_[:, 0], np.s_[:, -1])])
    return [~x for x in above] if border.mean() > 0.5 else above


def turn_to(
    components: NDArray[np.float32], target: NDArray[np.float32]
) -> tuple[NDArray[np.float64], float]:
    """Mix the components of a network so that they agree with those of another one.

    Features of two networks have no directions in common, but their components are maps of the
    same patches. With the columns of both brought to mean 0 and variance 1 (Z of the components,
    T of the target), as colors show them,

        Q = argmin ||Z Q - T||_F over the orthogonal Q = U V^T,  where Z^T T = U S V^T

    (Schoenemann 1966). Q turns and mirrors within the three components: it adds nothing to what
    the network shows, and also undoes their arbitrary signs and order. Of equal components it is
    the identity.

    Args:
        components: (P, 3), of at least one patch.
        target: (P, 3), of the same patches.

    Returns:
        (3, 3): components times it agree with the target, and have its units. And the mean
        over the three of the correlation of Z Q with T, 0..1: tr(S) / 3P where the columns of Z
        are uncorrelated, as components are over the patches that they were fitted to. A column
        without variance has correlation 0.
    """
    spread = np.maximum(components.std(axis=0, dtype=np.float64), _TINY)
    units = target.std(axis=0, dtype=np.float64)
    z = (components - components.mean(axis=0, dtype=np.float64)) / spread
    t = (target - target.mean(axis=0, dtype=np.float64)) / np.maximum(units, _TINY)
    u, _, vt = np.linalg.svd(z.T @ t)
    turned = z @ u @ vt
    lengths = np.linalg.norm(turned, axis=0) * np.linalg.norm(t, axis=0)
    agreement = float(np.mean((turned * t).sum(axis=0) / np.maximum(lengths, _TINY)))
    return (u @ vt) * units / spread[:, None], agreement


def resample(
    maps: NDArray[Any], patch: int, *, grid: tuple[int, int], to_patch: int, mode: str = "bilinear"
) -> NDArray[np.float32]:
    """Maps of an image at the centers of the patches of another size.

    Both grids begin at the upper left corner of the image; patches beyond the maps get the values
    of the border.

    Args:
        maps: (R, C, F).
        patch: their size in pixels.
        grid: rows and columns of the other patches.
        to_patch: size of these, in pixels.
        mode: `bilinear`, or `nearest`.

    Returns:
        (*grid, F) float32.
    """
    places = [
        torch.from_numpy((2 * np.arange(number) + 1) * to_patch / (side * patch) - 1)
        for number, side in zip(grid, maps.shape[:2], strict=True)  # -1..1 over the maps
    ]
    at = torch.stack(torch.meshgrid(*places, indexing="ij")[::-1], dim=-1)  # x before y
    values = torch.from_numpy(maps.astype(np.float64)).permute(2, 0, 1)[None]
    taken = F.grid_sample(values, at[None], mode, padding_mode="border", align_corners=False)
    return taken[0].permute(1, 2, 0).numpy().astype(np.float32)
