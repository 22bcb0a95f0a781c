"""Cross-entropy between teacher and student views, without the logits' weight in memory.

Shape letters: S student crops, T teacher crops, B images, K prototypes, D width before them.
Source: Caron et al. 2021 (arXiv:2104.14294), eq. 3; divided by the number of pairs as in the
authors' code, so that the value does not depend on the number of crops.

    L = mean over b and pairs s != t of  -sum_k p[t,b,k] log q[s,b,k],   q = softmax(z / tau)

With P[s,b] the sum of p[t,b] over t != s and |P| its sum over k, one crop of one image gives
-<P, log q> with the slope dL/d(z / tau) = |P| q - P, both over the number of pairs. So no pair is
looked at by itself, and a few images, or a few prototypes, at a time yield loss and gradients: what
lives is the targets and a few times `CHUNK` elements, however many crops there are. L is a scalar,
so the backward pass only multiplies the gradients of the forward.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**22  # logits at a time: 16 MB
PROTOTYPES = 4096  # at a time, at most: with few images their float32 copies would be the larger
EPS = 1e-12  # least norm of a prototype, as torch.nn.functional.normalize has it


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, *, student_temp: float) -> Tensor:
    """Cross-entropy of each teacher view against every student crop of another view.

    Args:
        student_logits: z, (S, B, K), any float dtype; student crop t is teacher crop t.
        teacher_probs: p, (T, B, K) float32 or float64, 2 <= T <= S, no gradient.
        student_temp: tau > 0, dimensionless.

    Returns:
        Scalar in nats: float32, or float64 if an argument is. Differentiable once, by the logits.

    Raises:
        ValueError: the shapes disagree, or there is no pair of distinct views.
    """
    _require_pairs(student_logits.shape, teacher_probs.shape)
    loss: Tensor = _LossOfLogits.apply(student_logits, teacher_probs, student_temp)  # type: ignore[no-untyped-call]
    return loss


def dino_loss_of_prototypes(
    x: Tensor,
    weight_v: Tensor,
    weight_g: Tensor | None,
    *,
    teacher_probs: Tensor,
    student_temp: float,
) -> Tensor:
    """`dino_loss` of the logits z = x W^T, W_k = g_k v_k / ||v_k||, which never exist at once.

    Products and sums run in float32 (float64 if an argument is), whatever the weights' dtype.

    Args:
        x: (S*B, D) unit vectors, crop-major.
        weight_v: v, (K, D).
        weight_g: g, (K, 1), or None for ones.
        teacher_probs: p, (T, B, K) float32 or float64, 2 <= T <= S, no gradient.
        student_temp: tau > 0, dimensionless.

    Returns:
        Scalar in nats: float32 or float64. Differentiable once, by x, v and g.

    Raises:
        ValueError: the shapes disagree, or there is no pair of distinct views.
    """
    num_images = teacher_probs.shape[1]
    if len(x) % num_images:
        raise ValueError(f"need whole crops of {num_images} images, got {len(x)} rows")
    _require_pairs((len(x) // num_images, num_images, len(weight_v)), teacher_probs.shape)
    with torch.autocast(x.device.type, enabled=False):
        loss: Tensor = _LossOfPrototypes.apply(x, weight_v, weight_g, teacher_probs, student_temp)  # type: ignore[no-untyped-call]
    return loss


def _require_pairs(z_shape: tuple[int, ...], p_shape: tuple[int, ...]) -> None:
    if len(z_shape) != 3 or z_shape[1:] != p_shape[1:] or not 2 <= p_shape[0] <= z_shape[0]:
        raise ValueError(f"need (S,B,K), (T,B,K), 2 <= T <= S; got {[*z_shape]}, {[*p_shape]}")


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, probs: Tensor, temp: float) -> Tensor:
        ctx.save_for_backward(logits, probs)
        ctx.temp = temp
        ctx.gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        return _loss_of_logits(logits, probs, temp, gradient=ctx.gradient)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # as large as the logits: given away, not kept
        if gradient is None:  # asked for again
            logits, probs = ctx.saved_tensors
            gradient = torch.empty_like(logits)
            _loss_of_logits(logits, probs, ctx.temp, gradient=gradient)
        return gradient.mul_(upstream), None, None


def _loss_of_logits(
    logits: Tensor, probs: Tensor, temp: float, *, gradient: Tensor | None
) -> Tensor:
    dtype = _at_least_float32(logits, probs)
    num_crops, num_images, num_prototypes = logits.shape
    num_pairs = _num_pairs(num_crops, probs)
    loss = torch.zeros((), dtype=dtype, device=logits.device)
    for images in _chunks(num_images, each=num_crops * num_prototypes):
        log_q = torch.log_softmax(logits[:, images].to(dtype) / temp, dim=-1)
        some = probs[:, images].to(dtype)
        out = None if gradient is None else gradient[:, images]
        loss += _loss_and_gradient(log_q, some, mass=some.sum(-1), slope=out, by=num_pairs * temp)
    return loss / num_pairs


class _LossOfPrototypes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.inputs = inputs  # not saved: autograd would keep prototypes that ZeRO-3 has gathered
        loss, ctx.gradients = _loss_of_prototypes(*inputs, needed=any(ctx.needs_input_grad))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # the largest is K x D: given away, not kept
        if gradients is None:  # asked for again
            _, gradients = _loss_of_prototypes(*ctx.inputs, needed=True)
        return (*(None if d is None else d.mul_(upstream) for d in gradients), None, None)


def _loss_of_prototypes(
    x: Tensor,
    weight_v: Tensor,
    weight_g: Tensor | None,
    probs: Tensor,
    temp: float,
    *,
    needed: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
    """The loss, and if needed its gradients by x, v and g, a few prototypes at a time.

    The logits of each part are made twice, for the sum of their exponentials and for the rest: a
    fourth product, but each is of all rows, and whatever is as large as the prototypes is written
    in its own dtype at once.
    """
    dtype = _at_least_float32(x, weight_v, probs)
    num_images, num_prototypes = probs.shape[1:]
    rows = x.to(dtype) / temp  # (S*B, D)
    num_crops = len(rows) // num_images
    num_pairs, mass = _num_pairs(num_crops, probs), probs.sum(-1, dtype=dtype)  # (T, B)
    parts = _chunks(num_prototypes, each=len(rows), at_most=PROTOTYPES)
    prototypes = partial(_prototypes, weight_v, weight_g, dtype=dtype)
    peak, log_sum = _normalizer(rows, (prototypes(part).w for part in parts))

    loss = torch.zeros((), dtype=dtype, device=x.device)
    d_rows, d_v = torch.zeros_like(rows), torch.empty_like(weight_v)
    d_g = None if weight_g is None else torch.empty_like(weight_g)
    for part in parts:
        some = prototypes(part)
        z = (rows @ some.w.T).sub_(peak).sub_(log_sum)
        log_q = z.unflatten(0, (num_crops, num_images))
        slope, targets = log_q if needed else None, probs[..., part].to(dtype)
        loss += _loss_and_gradient(log_q, targets, mass=mass, slope=slope, by=num_pairs)
        if needed:
            d_rows.addmm_(z, some.w)
            d_v[part], along = _through_weight_norm(z.T @ rows, some)
            if d_g is not None:
                d_g[part] = along
    gradients = (d_rows.div_(temp).to(x.dtype), d_v, d_g) if needed else None
    return loss / num_pairs, gradients


def _normalizer(rows: Tensor, weights: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Largest logit of each row, and the logarithm of its sum of exp(z - largest), both (S*B, 1).

    Apart, because their sum would lose the digits that tell a probability near one from one.
    """
    peaks, sums = [], []
    for weight in weights:
        z = rows @ weight.T
        peaks.append(z.amax(-1, keepdim=True))
        sums.append(z.sub_(peaks[-1]).exp_().sum(-1, keepdim=True))
    of_parts = torch.cat(peaks, dim=1)
    peak = of_parts.amax(-1, keepdim=True)
    total = ((of_parts - peak).exp_() * torch.cat(sums, dim=1)).sum(-1, keepdim=True)
    return peak, total.log_()


class _Prototypes(NamedTuple):
    """Some prototypes: w = scale * v, scale = g / length, length = ||v||."""

    v: Tensor  # (k, D)
    length: Tensor  # (k, 1)
    scale: Tensor  # (k, 1)
    w: Tensor  # (k, D)


def _prototypes(
    weight_v: Tensor, weight_g: Tensor | None, part: slice, *, dtype: torch.dtype
) -> _Prototypes:
    v = weight_v[part].to(dtype)
    length = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min_(EPS)
    scale = 1 / length if weight_g is None else weight_g[part].to(dtype) / length
    return _Prototypes(v, length, scale, scale * v)


def _through_weight_norm(d_w: Tensor, some: _Prototypes) -> tuple[Tensor, Tensor]:
    """Gradients by v and g from that by w, which is overwritten.

    With u = v / ||v||: d_v = g / ||v|| (d_w - <d_w, u> u) and d_g = <d_w, u>, row by row
    (Salimans and Kingma, eq. 3).
    """
    d_g = (d_w * some.v).sum(1, keepdim=True).div_(some.length)
    return d_w.addcmul_(some.v, d_g / some.length, value=-1).mul_(some.scale), d_g


def _loss_and_gradient(
    log_q: Tensor, probs: Tensor, *, mass: Tensor, slope: Tensor | None, by: float
) -> Tensor:
    """The loss of some images and prototypes summed over pairs, and its slope by the logits z.

    Args:
        log_q: log-probabilities (S, R, k), overwritten; few enough for a CPU's cache is best.
        probs: targets of the same R images and k prototypes (T, R, k).
        mass: sums (T, R) of the targets over all prototypes.
        slope: where to write the slope by z over temperature (S, R, k), may be `log_q`; or None.
        by: what to divide the slope by.

    Returns:
        Scalar.
    """
    num_teachers = len(probs)
    everyone = probs.sum(0)  # (R, k)
    of_own = (probs * log_q[:num_teachers]).sum()
    loss = of_own - torch.dot(everyone.view(-1), log_q.sum(0).view(-1))
    if slope is not None:
        counted = mass.sum(0).repeat(len(log_q), 1)  # (S, R): |P|
        counted[:num_teachers] -= mass
        q = log_q.exp_()
        torch.addcmul(everyone / -by, q, (counted / by)[..., None], out=slope)
        slope[:num_teachers].add_(probs, alpha=1 / by)
    return loss


def _chunks(length: int, *, each: int, at_most: int | None = None) -> list[slice]:
    """Parts of a dimension of which one position stands for `each` elements."""
    at_once = max(1, CHUNK // each)
    if at_most is not None:
        at_once = min(at_once, at_most)
    return [slice(start, start + at_once) for start in range(0, length, at_once)]


def _num_pairs(num_crops: int, probs: Tensor) -> int:
    """Pairs of distinct views, of all images."""
    return len(probs) * (num_crops - 1) * probs.shape[1]


def _at_least_float32(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
