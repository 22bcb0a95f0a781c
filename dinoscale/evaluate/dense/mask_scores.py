"""Scores of a mask: region similarity J and boundary measure F of the DAVIS benchmark.

Source: Perazzi et al. 2016 (CVPR, DAVIS), section 5; tolerance, boundaries and empty masks as in
the benchmark's published evaluation code of 2017.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.008  # of the image diagonal: boundaries within this distance match

Mask = NDArray[np.bool_]


def region_similarity(found: Mask, truth: Mask) -> float:
    """Intersection over union J of two masks (H, W), 0..1; 1 if both are empty."""
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def boundary_measure(found: Mask, truth: Mask, *, tolerance: float = TOLERANCE) -> float:
    """Harmonic mean F of precision and recall of the boundary pixels, 0..1.

    A boundary pixel is right if the other boundary has one within ceil(tolerance * diagonal)
    pixels, which is the benchmark's dilation by a disk of that radius. A mask without boundary has
    full precision, and the other then zero recall; two such masks agree.

    Args:
        found: (H, W).
        truth: (H, W).
        tolerance: as a fraction of the diagonal.
    """
    radius = math.ceil(tolerance * math.hypot(*found.shape))
    edges, true_edges = boundary(found), boundary(truth)
    if not edges.any() or not true_edges.any():
        return float(edges.any() == true_edges.any())
    precision = np.mean(_distance(true_edges)[edges] <= radius)
    recall = np.mean(_distance(edges)[true_edges] <= radius)
    both = precision + recall
    return float(2 * precision * recall / both) if both else 0.0


def boundary(mask: Mask) -> Mask:
    """Pixels that differ from their right, lower or lower right neighbour, (H, W).

    One pixel wide, towards the upper left; the image border is no boundary.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, lower, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    edges: Mask = (mask != right) | (mask != lower) | (mask != diagonal)
    return edges


def _distance(pixels: Mask) -> NDArray[np.float64]:
    """Euclidean distance of every pixel to the nearest of these, in pixels."""
    from scipy.ndimage import distance_transform_edt

    distance: NDArray[np.float64] = distance_transform_edt(~pixels)
    return distance
