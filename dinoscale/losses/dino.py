"""Cross-entropy between teacher and student views, without storing all logits.

Shape letters: S student crops, T teacher crops, B images, K prototypes, D width before them.
Source: Caron et al. 2021 (arXiv:2104.14294), eq. 3; divided by the number of pairs as in the
authors' code, so that the value does not depend on the number of crops.

    L = mean over b and pairs s != t of  -sum_k p[t,b,k] log q[s,b,k],   q = softmax(z / tau)

With P[s,b] the sum of p[t,b] over t != s and |P| its sum over k, one crop of one image contributes
-<P, log q> with the gradient dL/d(z / tau) = |P| q - P, both divided by the number of pairs. Loss
and gradients thus need no loop over pairs, and are computed for a few images or prototypes at a
time: memory holds the targets and a few times `CHUNK` elements, however many crops there are. L is
a scalar, so the backward pass only scales the gradients that the forward has computed.

Options of DINOv3 (arXiv:2508.10104): terms of local crops s >= T have a weight, and pairs s = t may
count too, so that there are T S B pairs.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoscale.losses.prototypes import (
    PROTOTYPES,
    at_least_float32,
    prototypes,
    slices,
    weight_norm_backward,
)

CHUNK = 2**22  # logits at a time: 16 MB


class _Pairs(NamedTuple):
    """Which pairs of views there are, and what those with local crops weigh."""

    local_weight: float
    same_view: bool

    def num_pairs(self, num_crops: int, probs: Tensor) -> int:
        """Pairs over all images."""
        return len(probs) * (num_crops - (not self.same_view)) * probs.shape[1]

    def weights(self, num_teachers: int) -> list[tuple[slice, float]]:
        """The student crops, and the weight of their terms."""
        if self.local_weight == 1:
            return [(slice(None), 1.0)]
        return [(slice(num_teachers), 1.0), (slice(num_teachers, None), self.local_weight)]

    def weighted(self, loss: Tensor, of_global: Tensor) -> Tensor:
        """The loss with weights, from the one without and its part of two teacher crops."""
        return torch.lerp(of_global, loss, self.local_weight)  # with a weight of 1 the same bits


def dino_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    *,
    student_temp: float,
    local_weight: float = 1.0,
    same_view: bool = False,
) -> Tensor:
    """Cross-entropy of each teacher view against every student crop of another view.

    Args:
        student_logits: z, (S, B, K), any float dtype; student crop t is teacher crop t.
        teacher_probs: p, (T, B, K) float32 or float64, 2 <= T <= S, no gradient.
        student_temp: tau > 0, dimensionless.
        local_weight: factor of the terms of local crops, student crops from T on.
        same_view: also the pairs of student crop t and teacher crop t.

    Returns:
        Scalar in nats: float32, or float64 if an argument is. Differentiable once, in the logits.

    Raises:
        ValueError: the shapes disagree, or there is no pair of distinct views.
    """
    _require_pairs(student_logits.shape, teacher_probs.shape)
    loss: Tensor = _LossOfLogits.apply(  # type: ignore[no-untyped-call]
        student_logits, teacher_probs, student_temp, _Pairs(local_weight, same_view)
    )
    return loss


def dino_loss_of_prototypes(
    x: Tensor,
    weight_v: Tensor,
    weight_g: Tensor | None,
    plain: bool = False,
    *,
    teacher_probs: Tensor,
    student_temp: float,
    local_weight: float = 1.0,
    same_view: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dino_loss` of the logits z = x W^T, W_k = g_k v_k / ||v_k||, without storing them.

    Products and sums run in float32 (float64 if an argument is), whatever the weights' dtype.

    Args:
        x: (S*B, D) unit vectors, crop-major.
        weight_v: v, (K, D).
        weight_g: g, (K, 1), or None for ones.
        plain: the prototypes are W = v.
        teacher_probs: p, (T, B, K) float32 or float64, 2 <= T <= S, no gradient.
        student_temp: tau > 0, dimensionless.
        local_weight: factor of the terms of local crops, student crops from T on.
        same_view: also the pairs of student crop t and teacher crop t.

    Returns:
        The loss; and without gradient what it is with a weight of 1, and the part of this of pairs
        of two teacher crops; scalars in nats, float32 or float64. Differentiable once, in x, v, g.

    Raises:
        ValueError: the shapes disagree, or there is no pair of distinct views.
    """
    num_images = teacher_probs.shape[1]
    if len(x) % num_images:
        raise ValueError(f"need whole crops of {num_images} images, got {len(x)} rows")
    _require_pairs((len(x) // num_images, num_images, len(weight_v)), teacher_probs.shape)
    with torch.autocast(x.device.type, enabled=False):
        pairs = _Pairs(local_weight, same_view)
        losses: tuple[Tensor, Tensor, Tensor] = _LossOfPrototypes.apply(  # type: ignore[no-untyped-call]
            x, weight_v, weight_g, plain, teacher_probs, student_temp, pairs
        )
    return losses


def _require_pairs(z_shape: tuple[int, ...], p_shape: tuple[int, ...]) -> None:
    if len(z_shape) != 3 or z_shape[1:] != p_shape[1:] or not 2 <= p_shape[0] <= z_shape[0]:
        raise ValueError(f"need (S,B,K), (T,B,K), 2 <= T <= S; got {[*z_shape]}, {[*p_shape]}")


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, probs: Tensor, temp: float, pairs: _Pairs) -> Tensor:
        ctx.save_for_backward(logits, probs)
        ctx.temp, ctx.pairs = temp, pairs
        ctx.gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        return _loss_of_logits(logits, probs, temp, pairs, gradient=ctx.gradient)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # as large as the logits: handed over, not kept
        if gradient is None:  # a second backward
            logits, probs = ctx.saved_tensors
            gradient = torch.empty_like(logits)
            _loss_of_logits(logits, probs, ctx.temp, ctx.pairs, gradient=gradient)
        return gradient.mul_(upstream), None, None, None


def _loss_of_logits(
    logits: Tensor, probs: Tensor, temp: float, pairs: _Pairs, *, gradient: Tensor | None
) -> Tensor:
    dtype = at_least_float32(logits, probs)
    num_crops, num_images, num_prototypes = logits.shape
    num_pairs = pairs.num_pairs(num_crops, probs)
    loss = torch.zeros((), dtype=dtype, device=logits.device)
    for images in slices(num_images, size=CHUNK // (num_crops * num_prototypes)):
        log_q = torch.log_softmax(logits[:, images].to(dtype) / temp, dim=-1)
        targets = probs[:, images].to(dtype)
        out = None if gradient is None else gradient[:, images]
        of_images, of_global = _loss_and_gradient(
            log_q, targets, pairs, mass=targets.sum(-1), out=out, divisor=num_pairs * temp
        )
        loss += pairs.weighted(of_images, of_global)
    return loss / num_pairs


class _LossOfPrototypes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Not save_for_backward, which would keep prototypes that ZeRO-3 has gathered.
        ctx.inputs = inputs
        needed = any(ctx.needs_input_grad)
        loss, of_global, ctx.gradients = _loss_of_prototypes(*inputs, needed=needed)
        ctx.mark_non_differentiable(loss, of_global)
        return inputs[-1].weighted(loss, of_global), loss, of_global

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # K x D: handed over, not kept
        if gradients is None:  # a second backward
            _, _, gradients = _loss_of_prototypes(*ctx.inputs, needed=True)
        return (*(None if d is None else d.mul_(upstream) for d in gradients), *[None] * 4)


def _loss_of_prototypes(
    x: Tensor,
    weight_v: Tensor,
    weight_g: Tensor | None,
    plain: bool,
    probs: Tensor,
    temp: float,
    pairs: _Pairs,
    *,
    needed: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...] | None]:
    """The loss without weight, its part of two teacher crops, if needed gradients in x, v and g.

    A few prototypes at a time. Their logits are computed twice, for the softmax normalizer and for
    loss and gradients. That costs a fourth matrix product, but each product covers all rows, and
    tensors as large as the prototypes are written directly in their own dtype.
    """
    dtype = at_least_float32(x, weight_v, probs)
    num_images, num_prototypes = probs.shape[1:]
    rows = x.to(dtype) / temp  # (S*B, D)
    num_crops = len(rows) // num_images
    num_pairs, mass = pairs.num_pairs(num_crops, probs), probs.sum(-1, dtype=dtype)  # (T, B)
    parts = slices(num_prototypes, size=min(CHUNK // len(rows), PROTOTYPES))
    some = partial(prototypes, weight_v, weight_g, plain, dtype=dtype)
    peak, log_sum = _normalizer(rows, (some(part).w for part in parts))

    loss = torch.zeros((), dtype=dtype, device=x.device)
    of_global = torch.zeros_like(loss)
    d_rows, d_v = torch.zeros_like(rows), torch.empty_like(weight_v)
    d_g = None if weight_g is None else torch.empty_like(weight_g)
    for part in parts:
        chunk = some(part)
        z = (rows @ chunk.w.T).sub_(peak).sub_(log_sum)
        log_q = z.unflatten(0, (num_crops, num_images))
        out, targets = log_q if needed else None, probs[..., part].to(dtype)
        sums = _loss_and_gradient(log_q, targets, pairs, mass=mass, out=out, divisor=num_pairs)
        loss += sums[0]
        of_global += sums[1]
        if needed:  # z now holds its gradient
            d_rows.addmm_(z, chunk.w)
            d_v[part], d_g_part = weight_norm_backward(z.T @ rows, chunk)
            if d_g is not None and d_g_part is not None:
                d_g[part] = d_g_part
    gradients = (d_rows.div_(temp).to(x.dtype), d_v, d_g) if needed else None
    return loss / num_pairs, of_global / num_pairs, gradients


def _normalizer(rows: Tensor, weights: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Largest logit of each row, and the logarithm of its sum of exp(z - largest), both (S*B, 1).

    Two tensors, because their sum would round away the difference of a probability near 1 from 1.
    """
    peaks, sums = [], []
    for weight in weights:
        z = rows @ weight.T
        peaks.append(z.amax(-1, keepdim=True))
        sums.append(z.sub_(peaks[-1]).exp_().sum(-1, keepdim=True))
    part_peaks = torch.cat(peaks, dim=1)
    peak = part_peaks.amax(-1, keepdim=True)
    total = ((part_peaks - peak).exp_() * torch.cat(sums, dim=1)).sum(-1, keepdim=True)
    return peak, total.log_()


def _loss_and_gradient(
    log_q: Tensor,
    probs: Tensor,
    pairs: _Pairs,
    *,
    mass: Tensor,
    out: Tensor | None,
    divisor: float,
) -> tuple[Tensor, Tensor]:
    """The loss of some images and prototypes summed over pairs, and its gradient in the logits z.

    Args:
        log_q: log-probabilities (S, R, k), overwritten; fastest if they fit into a CPU's cache.
        probs: targets of the same R images and k prototypes (T, R, k).
        pairs: which there are; the sums are without weight, the gradient is with it.
        mass: sums (T, R) of the targets over all prototypes.
        out: where to write the gradient in z / tau (S, R, k), may be `log_q`; None for no gradient.
        divisor: of the gradient.

    Returns:
        The sum over all pairs, and over those of two teacher crops; scalars.
    """
    num_teachers = len(probs)
    target_sum = probs.sum(0)  # (R, k)
    loss = -torch.dot(target_sum.view(-1), log_q.sum(0).view(-1))
    of_global = -torch.dot(target_sum.view(-1), log_q[:num_teachers].sum(0).view(-1))
    if not pairs.same_view:  # no pairs: taken out again
        same_view = (probs * log_q[:num_teachers]).sum()
        loss, of_global = loss + same_view, of_global + same_view
    if out is None:
        return loss, of_global
    pair_mass = mass.sum(0).repeat(len(log_q), 1)  # (S, R): |P|
    if not pairs.same_view:
        pair_mass[:num_teachers] -= mass
    q = log_q.exp_()
    for crops, weight in pairs.weights(num_teachers):
        some_mass = (weight * pair_mass[crops] / divisor)[..., None]
        torch.addcmul(weight * target_sum / -divisor, q[crops], some_mass, out=out[crops])
    if not pairs.same_view:
        out[:num_teachers].add_(probs, alpha=1 / divisor)
    return loss, of_global
