"""KoLeo: spreads the class tokens of a batch over the sphere.

Shape letters: V views, B images, D width.
Source: Sablayrolles et al. 2019 (arXiv:1806.03198), eq. 2; Oquab et al. 2023 (arXiv:2304.07193),
section 4, per view; among the images of a rank as in the authors' code, or of all ranks.

    L = sum over views of  -mean_b log d_b,   d_b = distance of token b to its nearest neighbour
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Gather = Callable[[Tensor], Tensor]
EPS = 1e-8  # least length, in each difference, and in the logarithm, as in the authors' code


def koleo_loss(
    class_tokens: Tensor, *, gather: Gather | None = None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Minus the logarithm of the distance to the nearest neighbour within a view, on unit vectors.

    Computed in float32, or float64 for float64 tokens, also under autocast. Both members of a pair
    of neighbours have a gradient.

    Args:
        class_tokens: of the backbone, before the head (V, B, D), any float dtype.
        gather: (V, B, D) of this rank -> (V, N, D) of all ranks, among which neighbours are looked
            for, differentiable; None for this rank's alone.
        first: position of this rank's first image among the N.

    Returns:
        The loss, mean over images and sum over views, a scalar; and the mean distance to the
        nearest neighbour over images and views, without gradient, for monitoring.

    Raises:
        ValueError: a view has a single image in all, which has no neighbour.
    """
    dtype = torch.promote_types(class_tokens.dtype, torch.float32)
    with torch.autocast(class_tokens.device.type, enabled=False):
        x = F.normalize(class_tokens.to(dtype), dim=-1, eps=EPS)
        everyone = x if gather is None else gather(x)
        if (num_images := everyone.shape[1]) < 2:
            raise ValueError(f"need at least 2 images in a view for a neighbour, got {num_images}")
        nearest = _nearest(x.detach(), everyone.detach(), first)
        neighbours = everyone.gather(1, nearest[..., None].expand_as(x))
        distances = torch.linalg.vector_norm(x - neighbours + EPS, dim=-1)  # (V, B)
        loss = -(distances + EPS).log().mean(1).sum()
    return loss, distances.detach().mean()


@torch.no_grad()
def _nearest(x: Tensor, everyone: Tensor, first: int) -> Tensor:
    """Index of each unit vector's nearest neighbour in its view, itself left out, (V, B)."""
    cosines = x @ everyone.mT  # (V, B, N)
    own = cosines[..., first : first + x.shape[1]]
    # Differs: the authors' code writes -1, which the cosine of two opposite images may equal.
    own.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return cosines.argmax(-1)
