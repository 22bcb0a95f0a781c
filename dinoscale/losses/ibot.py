"""Cross-entropy between teacher and student on masked patches, without storing their logits.

Shape letters: M masked patches, K prototypes, D width before the student's, T before the teacher's.
Source: Zhou et al. 2022 (arXiv:2111.07832), eq. 2; weights as in DINOv2 (arXiv:2304.07193).

    L = sum over m of  -a[m] sum_k p[m,k] log q[m,k],   q = softmax(z / tau)

has the gradient dL/d(z / tau) = a (q - p). Targets, loss and gradients are computed for a few
patches at a time, with all prototypes: memory holds the prototypes in float32, their gradient, and
a few times `CHUNK` elements, however many patches there are. L is a scalar, so the backward pass
only scales the gradients that the forward has computed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoscale.losses.prototypes import (
    PROTOTYPES,
    all_prototypes,
    at_least_float32,
    prototypes,
    slices,
    weight_norm_backward,
)

CHUNK = 2**22  # logits at a time: 16 MB


class PatchTargets(NamedTuple):
    """What the targets p = softmax((z - c) / temp) are computed from; no gradient.

    z = features W^T with W_k = g_k v_k / ||v_k|| or v_k, products in float32, or float64 if an
    argument of the loss is.
    """

    features: Tensor  # unit vectors of the teacher (M, T)
    weight_v: Tensor  # v, (K, T)
    weight_g: Tensor | None  # g, (K, 1), or None for ones
    center: Tensor  # c, (K,): moving average, or of Sinkhorn-Knopp
    temp: float  # of the teacher, > 0
    plain: bool = False  # the prototypes are W = v


def patch_loss_of_prototypes(
    x: Tensor,
    weight_v: Tensor,
    weight_g: Tensor | None,
    plain: bool = False,
    *,
    targets: PatchTargets,
    weights: Tensor,
    student_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum over patches of the cross-entropy of targets and student.

    Products and sums run in float32 (float64 if an argument is), whatever the weights' dtype.

    Args:
        x: unit vectors of the student (M, D); M may be 0.
        weight_v: v of the student, (K, D).
        weight_g: g of the student, (K, 1), or None for ones.
        plain: its prototypes are W = v.
        targets: of the same patches and as many prototypes.
        weights: a, (M,), 1 / (masked patches of the same crop).
        student_temp: tau > 0, dimensionless.

    Returns:
        The loss in nats, a scalar float32 or float64, not yet divided by the number of crops,
        differentiable once, in x, v and g; and without gradient, for the collapse monitor: the sum
        of the targets' entropies in nats, and the sum of the targets (K,), neither weighted.

    Raises:
        ValueError: the shapes disagree, or a temperature is not positive.
    """
    if not (student_temp > 0 and targets.temp > 0):
        raise ValueError(f"need temperatures > 0, got {student_temp} and {targets.temp}")
    patches = (len(x), len(targets.features), *weights.shape)
    sizes = (len(weight_v), len(targets.weight_v), *targets.center.shape)
    if len({*patches}) > 1 or len({*sizes}) > 1:
        raise ValueError(f"need equal numbers of patches {patches} and of prototypes {sizes}")
    with torch.autocast(x.device.type, enabled=False):
        results: tuple[Tensor, Tensor, Tensor] = _LossOfPatches.apply(  # type: ignore[no-untyped-call]
            x, weight_v, weight_g, plain, targets, weights, student_temp
        )
    return results


class _LossOfPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Not save_for_backward, which would keep prototypes that ZeRO-3 has gathered.
        ctx.inputs = inputs
        results, ctx.gradients = _loss_of_patches(*inputs, needed=any(ctx.needs_input_grad))
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # K x D: handed over, not kept
        if gradients is None:  # a second backward
            _, gradients = _loss_of_patches(*ctx.inputs, needed=True)
        return (*(None if d is None else d.mul_(upstream) for d in gradients), *[None] * 4)


def _loss_of_patches(
    x: Tensor,
    weight_v: Tensor,
    weight_g: Tensor | None,
    plain: bool,
    targets: PatchTargets,
    weights: Tensor,
    temp: float,
    *,
    needed: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...] | None]:
    """Loss, entropy and sum of the targets, and if needed the gradients in x, v and g."""
    dtype = at_least_float32(x, weight_v, targets.features, targets.weight_v)
    rows, teacher_rows = x.to(dtype) / temp, targets.features.to(dtype) / targets.temp
    w = all_prototypes(weight_v, weight_g, plain, dtype=dtype)
    teacher_w = all_prototypes(targets.weight_v, targets.weight_g, targets.plain, dtype=dtype)
    offset, a = targets.center.to(dtype) / -targets.temp, weights.to(dtype)

    loss = torch.zeros((), dtype=dtype, device=x.device)
    entropy, target_sum = torch.zeros_like(loss), torch.zeros_like(offset)
    d_rows, d_w = (torch.zeros_like(like) if needed else None for like in (rows, w))
    for part in slices(len(rows), size=CHUNK // len(w)):
        log_p = torch.addmm(offset, teacher_rows[part], teacher_w.T).log_softmax(-1)
        sums, d_z = _loss_and_gradient(log_p, (rows[part] @ w.T).log_softmax(-1), a[part])
        for total, more in zip((loss, entropy, target_sum), sums, strict=True):
            total += more
        if d_rows is not None and d_w is not None:
            torch.mm(d_z, w, out=d_rows[part])
            d_w.addmm_(d_z.T, rows[part])
        del log_p, d_z  # before the next ones
    if d_rows is None or d_w is None:
        return (loss, entropy, target_sum), None
    d_x = d_rows.div_(temp).to(x.dtype)
    return (loss, entropy, target_sum), (d_x, *_through_weight_norm(d_w, weight_v, weight_g, plain))


def _loss_and_gradient(
    log_p: Tensor, log_q: Tensor, a: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Loss, entropy and sum of the targets of some patches; gradient in z / tau, in place of log_q.

    Args:
        log_p: of the targets (m, K), overwritten.
        log_q: of the student (m, K), overwritten.
        a: weights (m,).
    """
    p = log_p.exp()
    entropy = -log_p.mul_(p).sum()
    loss = -(torch.mul(p, log_q, out=log_p).sum(-1) @ a)
    return (loss, entropy, p.sum(0)), log_q.exp_().sub_(p).mul_(a[:, None])


def _through_weight_norm(
    d_w: Tensor, weight_v: Tensor, weight_g: Tensor | None, plain: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients in v and g, in their dtypes, from the gradient in W, which is overwritten."""
    if plain:
        return d_w.to(weight_v.dtype), None
    d_v = d_w if weight_v.dtype == d_w.dtype else torch.empty_like(weight_v)
    d_g = None if weight_g is None else torch.empty_like(weight_g)
    for part in slices(len(d_w), size=PROTOTYPES):
        chunk = prototypes(weight_v, weight_g, plain, part, dtype=d_w.dtype)
        d_v[part], d_g_part = weight_norm_backward(d_w[part], chunk)
        if d_g is not None and d_g_part is not None:
            d_g[part] = d_g_part
    return d_v, d_g
