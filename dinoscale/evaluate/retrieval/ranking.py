"""Average precision of rankings, and its expectation for random rankings.

Shape letters: Q queries, N ranked images.
Source: Philbin et al. 2007 (CVPR, Oxford buildings) for the trapezoids, as in the published
evaluation of Radenovic et al. 2018 (arXiv:1803.11285) and of Copydays.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def average_precision(hits: Tensor, positives: Tensor) -> Tensor:
    """Mean over the positives of the precision at their ranks; unranked positives count 0.

    This is the step rule of most libraries.

    Args:
        hits: (Q, N) bool, whether the image at each rank is a positive, best rank first.
        positives: (Q,), number of positives, ranked or not, each > 0.

    Returns:
        (Q,) float64, 0..1.
    """
    precision, _ = _precisions(hits)
    return (precision * hits).sum(dim=1) / positives


def trapezoid_precision(hits: Tensor, positives: Tensor) -> Tensor:
    """Area under precision over recall by trapezoids, as the retrieval benchmarks measure it.

    Like `average_precision`, but a positive counts the mean of the precisions at its rank and at
    the rank before (1 before the first). Arguments and result as there.
    """
    precision, before = _precisions(hits)
    return ((precision + before) / 2 * hits).sum(dim=1) / positives


def _precisions(hits: Tensor) -> tuple[Tensor, Tensor]:
    """Precision at each rank, and at the rank before, (Q, N) float64."""
    ranks = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device)
    precision = hits.double().cumsum(dim=1) / ranks
    return precision, torch.cat((torch.ones_like(precision[:, :1]), precision[:, :-1]), dim=1)


def random_precision(
    *, images: int, positives: int, depth: int | None = None, trapezoids: bool
) -> float:
    """Expected average precision of a random order of the images.

    A rank holds a positive with probability P / N; then each rank above holds one with probability
    (P - 1) / (N - 1).

    Args:
        images: N, ranked in random order.
        positives: P of them, 0 < P <= N.
        depth: ranks that count; None counts all.
        trapezoids: by `trapezoid_precision`, else by `average_precision`.

    Returns:
        A fraction, 0..1.
    """
    ranks = np.arange(1, min(depth or images, images) + 1)
    others = (positives - 1) / max(1, images - 1)
    precision = (others * (ranks - 1) + 1) / ranks
    if trapezoids:
        before = np.where(ranks == 1, 1.0, others)
        precision = (precision + before) / 2
    return float(precision.sum() / images)
