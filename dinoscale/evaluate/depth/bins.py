"""Depth as the mean of bins, and the loss that it is trained with.

Shape letters: N images, K bins, R, S rows and columns of patches, H, W pixels.
Sources: Bhat et al. 2021 (arXiv:2011.14141) for bins; Eigen et al. 2014 (arXiv:1406.2283), eq. 4,
and Lee et al. 2019 (arXiv:1907.10326) for the loss; as used by Oquab et al. 2023
(arXiv:2304.07193).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinoscale.evaluate.dense_probes.linear_head import Loss
from dinoscale.evaluate.dense_probes.sliding import to_pixels
from dinoscale.evaluate.depth.depth_files import HOLE, DepthRange

BINS = 256
LEAST = 0.1  # added to each rectified output, so that no bin has the weight 0
SHARE = 0.85  # lambda of the loss: of the squared mean that is forgiven


def depth_of(outputs: Tensor, depths: DepthRange) -> Tensor:
    """Depth as the mean of equally spaced bins, weighted by the outputs of a head.

    d = sum_k w_k c_k / sum_k w_k,  w_k = max(0, z_k) + 0.1,  c from the lowest to the highest depth

    Args:
        outputs: z, (N, K, R, S).
        depths: lowest and highest.

    Returns:
        (N, 1, R, S), metres.
    """
    centers = torch.linspace(depths.low, depths.high, outputs.shape[1], device=outputs.device)
    weights = outputs.relu() + LEAST
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights * centers[:, None, None]).sum(dim=1, keepdim=True)


def sig_loss(found: Tensor, truth: Tensor) -> Tensor:
    """Scale-invariant loss in the logarithm of the depth, over pixels that are no holes.

    L = sqrt(mean(g^2) - 0.85 mean(g)^2),  g = ln(found) - ln(truth)

    Args:
        found: metres, > 0.
        truth: of the same shape; HOLE where unknown.

    Returns:
        Scalar; 0 if all pixels are holes.
    """
    known = truth > HOLE
    g = found[known].log() - truth[known].log()
    if not len(g):
        return found.sum() * 0
    spread = (g - g.mean()).square().mean()  # not mean(g^2) - mean(g)^2, which may round below 0
    return (spread + (1 - SHARE) * g.mean().square() + torch.finfo(g.dtype).eps).sqrt()


def bins_loss(patch: int, depths: DepthRange) -> Loss:
    """`sig_loss` of the outputs of a head, whose depth is enlarged to pixels."""

    def loss(outputs: Tensor, truth: Tensor) -> Tensor:
        height, width = truth.shape[1:]
        found = to_pixels(depth_of(outputs, depths), patch=patch, height=height, width=width)
        return sig_loss(found[:, 0], truth)

    return loss
