"""Sinkhorn-Knopp targets: every prototype gets the same share of a step's samples.

Shape letters: M samples of all micro-batches and ranks, K prototypes, D width before them.
Source: Cuturi 2013 (arXiv:1306.0895); Caron et al. 2020 (arXiv:2006.09882), section 3.1; in place
of centering in DINOv2 (arXiv:2304.07193), section 4.

From Q = exp(z / tau), each iteration divides every prototype by its sum over all samples, then
every sample by its sum over prototypes. So at any time Q[m,k] = u[k] exp(z[m,k] / tau) v[m], and
as samples are normalised last, Q is a softmax over prototypes with an offset:

    Q = softmax((z - c) / tau),    c = -tau log u

Only c has to be kept, and one iteration is  c <- c + tau log sum_m Q[m,k].  The first one sums
exp(z / tau) itself. Constant factors, such as the numbers of samples and prototypes, cancel.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dinoscale.losses.prototypes import all_prototypes, at_least_float32, slices

CHUNK = 2**22  # logits at a time: 16 MB
Reduction = Callable[[Tensor], Tensor]


@torch.no_grad()
def sinkhorn_center(
    features: Iterable[Tensor],
    weight_v: Tensor,
    weight_g: Tensor | None,
    plain: bool = False,
    *,
    temp: float,
    iterations: int = 3,
    sum_over_ranks: Reduction,
    max_over_ranks: Reduction,
) -> Tensor:
    """Offset c of the targets softmax((z - c) / temp), z = x W^T, W_k = g_k v_k / ||v_k||.

    Never overflows, however low the temperature. The logits are computed once per iteration, a few
    samples at a time. Collective: one maximum and `iterations` sums over ranks, of K numbers each.

    Args:
        features: x, unit vectors (M_i, D) of each micro-batch of this rank; there may be none.
        weight_v: v, (K, D).
        weight_g: g, (K, 1), or None for ones.
        plain: the prototypes are W = v.
        temp: tau > 0, dimensionless, the teacher's.
        iterations: >= 1.
        sum_over_ranks: (K,) float64 of this rank -> elementwise sum over ranks.
        max_over_ranks: (K,) float64 of this rank -> elementwise maximum over ranks.

    Returns:
        c, (K,) float32, or float64 if features or prototypes are; equal on all ranks.

    Raises:
        ValueError: temp is not positive, or there is no iteration.
    """
    if not (temp > 0 and iterations >= 1):
        raise ValueError(f"need temp > 0 and iterations >= 1, got {temp} and {iterations}")
    x = list(features)
    dtype = at_least_float32(*x, weight_v)
    with torch.autocast(weight_v.device.type, enabled=False):
        w = all_prototypes(weight_v, weight_g, plain, dtype=dtype)
        rows = [some.to(dtype) / temp for some in x]
        zeros = torch.zeros(len(w), dtype=torch.float64, device=w.device)
        peak, total = _sums_of_exp(_logits(rows, w, zeros.to(dtype)), zeros)
        log_u = -_log_sum_over_ranks(peak, total, sum_over_ranks, max_over_ranks)
        for _ in range(iterations - 1):
            total = zeros.clone()
            for z in _logits(rows, w, log_u.to(dtype)):
                total += z.softmax(-1).sum(0)
            # Prototypes summed to 1 before each sample was divided by its own sum, at most K:
            # these sums are at least 1 / K, which needs no logarithms at any temperature.
            log_u -= _log(sum_over_ranks(total))
    return log_u.mul_(-temp).to(dtype)


def _logits(rows: list[Tensor], w: Tensor, offset: Tensor) -> Iterator[Tensor]:
    """Rows W^T + offset, a few rows at a time: `CHUNK` elements."""
    for some in rows:
        for part in slices(len(some), size=CHUNK // len(w)):
            yield torch.addmm(offset, some[part], w.T)


def _sums_of_exp(logits: Iterable[Tensor], zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit of each prototype, -inf without samples, and its sum of exp(z - largest)."""
    peak, total = torch.full_like(zeros, -torch.inf), zeros.clone()
    for z in logits:
        higher = torch.maximum(peak, z.amax(0))
        total = total * (peak - higher).exp_() + z.sub_(higher.to(z.dtype)).exp_().sum(0)
        peak = higher
    return peak, total


def _log_sum_over_ranks(
    peak: Tensor, total: Tensor, sum_over_ranks: Reduction, max_over_ranks: Reduction
) -> Tensor:
    """Logarithm of the sum over ranks of total * exp(peak)."""
    highest = max_over_ranks(peak.clone())
    highest.masked_fill_(highest == -torch.inf, 0)  # no rank has a sample
    return highest + _log(sum_over_ranks(total * (peak - highest).exp_()))


def _log(sums: Tensor) -> Tensor:
    return sums.clamp_min(torch.finfo(sums.dtype).tiny).log_()
