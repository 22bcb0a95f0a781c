"""KoLeo: spreads the class tokens of a batch over the sphere.

Shape letters: V views, B images of this rank, N of those among which neighbours are looked for,
D width, k neighbours.
Source: Sablayrolles et al. 2019 (arXiv:1806.03198), eq. 2; Oquab et al. 2023 (arXiv:2304.07193),
section 4, per view; among the images of a rank as in the authors' code, or of all ranks; or in
groups of images of neighbouring ranks, as Simeoni et al. 2025 (arXiv:2508.10104).

    L = sum over views of  -mean_b log d_b,   d_b = distance of token b to its nearest neighbour,

or a mean over the k nearest as well.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Gather = Callable[[Tensor], Tensor]
EPS = 1e-8  # least length, in each difference, and in the logarithm, as in the authors' code


def koleo_loss(
    class_tokens: Tensor,
    *,
    gather: Gather | None = None,
    first: int = 0,
    group_size: int | None = None,
    num_neighbours: int = 1,
) -> tuple[Tensor, Tensor]:
    """Minus the logarithm of the distance to the nearest neighbours within a view, on unit vectors.

    Computed in float32, or float64 for float64 tokens, also under autocast. Both members of a pair
    of neighbours have a gradient.

    Args:
        class_tokens: of the backbone, before the head (V, B, D), any float dtype.
        gather: (V, B, D) of this rank -> (V, N, D) of all ranks, among which neighbours are looked
            for, differentiable; None for this rank's alone.
        first: position of this rank's first image among the N.
        group_size: consecutive images of the N that look for neighbours among themselves only,
            a divisor of N; None for all N.
        num_neighbours: k.

    Returns:
        The loss, mean over images and sum over views, a scalar; and the mean distance to the
        nearest neighbours over images and views, without gradient, for monitoring.

    Raises:
        ValueError: the images of a view, or of a group, have fewer than k neighbours, or are not
            whole groups.
    """
    dtype = torch.promote_types(class_tokens.dtype, torch.float32)
    with torch.autocast(class_tokens.device.type, enabled=False):
        x = F.normalize(class_tokens.to(dtype), dim=-1, eps=EPS)
        everyone = x if gather is None else gather(x)
        group = group_size or everyone.shape[1]
        if group <= num_neighbours:
            raise ValueError(
                f"need at least {num_neighbours + 1} images in a view, or a group, for neighbours, "
                f"got {group}"
            )
        if everyone.shape[1] % group:
            raise ValueError(f"need whole groups of {group} images, got {everyone.shape[1]}")
        # The groups to which this rank's images belong.
        begin, end = first // group * group, -(-(first + x.shape[1]) // group) * group
        everyone, first = everyone[:, begin:end], first - begin
        nearest = _nearest(x.detach(), everyone.detach(), first, group, num_neighbours)
        places = nearest.flatten(1)[..., None].expand(-1, -1, x.shape[-1])  # (V, B * k, D)
        neighbours = everyone.gather(1, places)
        mine = x.repeat_interleave(num_neighbours, dim=1) if num_neighbours > 1 else x
        distances = torch.linalg.vector_norm(mine - neighbours + EPS, dim=-1)  # (V, B * k)
        loss = -(distances + EPS).log().mean(1).sum()
    return loss, distances.detach().mean()


@torch.no_grad()
def _nearest(x: Tensor, everyone: Tensor, first: int, group: int, count: int) -> Tensor:
    """Indices of each unit vector's nearest neighbours in its group, itself left out, (V, B, k)."""
    cosines = x @ everyone.mT  # (V, B, N)
    num_images, num_all = cosines.shape[1:]
    own = cosines[..., first : first + num_images]
    # Differs: the authors' code writes -1, which the cosine of two opposite images may equal.
    own.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    if num_all > group:
        groups = torch.arange(num_all, device=x.device) // group
        others = groups[first : first + num_images, None] != groups
        cosines.masked_fill_(others, -torch.inf)
    if count == 1:  # several times faster than topk
        return cosines.argmax(-1, keepdim=True)
    return cosines.topk(count).indices
