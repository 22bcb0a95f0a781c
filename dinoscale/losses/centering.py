"""Teacher targets: centering and sharpening, and the entropy that reveals a collapse.

Shape letters: T teacher crops, B images, K prototypes.
Source: Caron et al. 2021 (arXiv:2104.14294), section 3.1, eq. 4 and algorithm 1. The prose of the
paper adds the center, its algorithm subtracts it; we subtract.
"""

import torch
from torch import Tensor

ROWS = 64  # at a time, so that memory never holds all terms of the sum


@torch.no_grad()
def teacher_probs(logits: Tensor, center: Tensor, *, temp: float) -> Tensor:
    """Softmax of the centered teacher logits: p = softmax((z - c) / temp).

    Args:
        logits: z, (..., K), any float dtype; computed in float32, or float64 if either is.
        center: c, (K,) or (1, K), as built from the steps before this one.
        temp: teacher temperature > 0, dimensionless.

    Returns:
        Shape of `logits`, float32 or float64, rows sum to 1, no gradient.

    Raises:
        ValueError: temp is not positive.
    """
    if not temp > 0:
        raise ValueError(f"need temp > 0, got {temp}")
    dtype = torch.promote_types(torch.promote_types(logits.dtype, center.dtype), torch.float32)
    return torch.softmax((logits.to(dtype) - center.to(dtype)) / temp, dim=-1)


@torch.no_grad()
def updated_center(center: Tensor, batch_mean: Tensor, *, momentum: float) -> Tensor:
    """Moving average of the raw teacher logits: c <- momentum c + (1 - momentum) batch_mean.

    Args:
        center: c, (K,) or (1, K).
        batch_mean: mean of the raw logits (no temperature, not centered) over all T*B rows of all
            micro-batches and ranks of the step, shape of `center`.
        momentum: 0 <= momentum <= 1.

    Returns:
        The center of the next step, shape and dtype of `center`.

    Raises:
        ValueError: the shapes disagree.
    """
    if center.shape != batch_mean.shape:
        raise ValueError(f"need equal shapes, got {[*center.shape]}, {[*batch_mean.shape]}")
    return center * momentum + batch_mean.to(center.dtype) * (1 - momentum)


@torch.no_grad()
def entropy(probs: Tensor) -> Tensor:
    """Mean entropy of distributions, in nats: h = mean over rows of -sum_k p_k log p_k.

    h -> 0 means one prototype wins everywhere, h -> log K means uniform targets: both collapse.
    The loss minus h of the same targets is the mean divergence KL(teacher || student).

    Args:
        probs: p, (..., K), rows sum to 1; zeros count as 0 log 0 = 0.

    Returns:
        Scalar float32 or float64.
    """
    dtype = torch.promote_types(probs.dtype, torch.float32)
    rows = probs.to(dtype).flatten(0, -2).split(ROWS) if probs.dim() > 1 else [probs.to(dtype)]
    return torch.cat([torch.special.entr(some).sum(-1).view(-1) for some in rows]).mean()
