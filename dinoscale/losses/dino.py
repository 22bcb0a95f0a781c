"""Cross-entropy between teacher and student views, without the logits' weight in memory.

Shape letters: S student crops, T teacher crops, B images, K prototypes, D width before them.
Source: Caron et al. 2021 (arXiv:2104.14294), eq. 3; divided by the number of pairs as in the
authors' code, so that the value does not depend on the number of crops.

    L = mean over b and pairs s != t of  -sum_k p[t,b,k] log q[s,b,k],   q = softmax(z / tau)

With P[s,b] the sum of p[t,b] over t != s and |P| its sum over k, one crop of one image gives
-<P, log q> with the slope dL/d(z / tau) = |P| q - P, both over the number of pairs. So no pair is
looked at by itself, and a few images at a time yield loss and gradients in one go: what lives is
the targets and a few times `CHUNK` elements, however many crops there are. Nothing is computed
twice for it: L is a scalar, so the backward pass only multiplies the gradients of the forward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**22  # elements of (S, images at a time, K): 16 MB, and rows enough for a fast product
PROTOTYPES = 8192  # whose gradients go through the weight norm at a time
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
    loss: Tensor = _OfLogits.apply(student_logits, teacher_probs, student_temp)  # type: ignore[no-untyped-call]
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
        loss: Tensor = _OfPrototypes.apply(x, weight_v, weight_g, teacher_probs, student_temp)  # type: ignore[no-untyped-call]
    return loss


def _require_pairs(z_shape: tuple[int, ...], p_shape: tuple[int, ...]) -> None:
    if len(z_shape) != 3 or z_shape[1:] != p_shape[1:] or not 2 <= p_shape[0] <= z_shape[0]:
        raise ValueError(f"need (S,B,K), (T,B,K), 2 <= T <= S; got {[*z_shape]}, {[*p_shape]}")


class _OfLogits(torch.autograd.Function):
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
    num_pairs = _num_pairs(logits.shape, probs)
    loss = torch.zeros((), dtype=dtype, device=logits.device)
    for images in _chunks(logits.shape):
        z, some = logits[:, images].to(dtype) / temp, probs[:, images].to(dtype)
        out = None if gradient is None else gradient[:, images]
        loss += _loss_and_slope(z, some, slope=out, by=num_pairs * temp)
    return loss / num_pairs


class _OfPrototypes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_v: Tensor, weight_g: Tensor | None, probs: Tensor, temp: float
    ) -> Tensor:
        dtype = _at_least_float32(x, weight_v, probs)
        v = weight_v.to(dtype)
        length = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min_(EPS)  # (K, 1)
        scale = 1 / length if weight_g is None else weight_g.to(dtype) / length  # W = scale v
        num_images, num_prototypes = probs.shape[1], len(v)
        rows = (x.to(dtype) / temp).unflatten(0, (-1, num_images))  # (S, B, D)
        shape = (len(rows), num_images, num_prototypes)
        num_pairs, needed = _num_pairs(shape, probs), any(ctx.needs_input_grad)
        d_rows = torch.empty_like(rows)
        d_weight = torch.zeros_like(v) if needed else None
        loss = torch.zeros((), dtype=dtype, device=x.device)
        for images in _chunks(shape):
            some = rows[:, images].flatten(0, 1)
            z = (some @ v.T).mul_(scale.T).unflatten(0, (len(rows), -1))
            slope = z if needed else None
            loss += _loss_and_slope(z, probs[:, images].to(dtype), slope=slope, by=num_pairs)
            if d_weight is not None:
                flat = z.flatten(0, 1)
                d_weight.addmm_(flat.T, some)
                d_rows[:, images] = (flat.mul_(scale.T) @ v).unflatten(0, (len(rows), -1))
        if d_weight is not None:
            ctx.dtypes = x.dtype, weight_v.dtype, None if weight_g is None else weight_g.dtype
            ctx.d_x = d_rows.flatten(0, 1).div_(temp)
            ctx.d_g, ctx.d_v = _through_weight_norm(d_weight, v, length, scale)
        return loss / num_pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            # Cast as it is written: the largest of them is K x D.
            torch.mul(d, upstream, out=torch.empty_like(d, dtype=dtype))
            for d, dtype in zip((ctx.d_x, ctx.d_v, ctx.d_g), ctx.dtypes, strict=True)
            if dtype is not None
        ]
        return (*gradients, *[None] * (5 - len(gradients)))


def _through_weight_norm(
    d_weight: Tensor, v: Tensor, length: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by g and v from that by W = g u, u = v / ||v||; `d_weight` is overwritten.

    d_g = <d_W, u> and d_v = g / ||v|| (d_W - <d_W, u> u), row by row (Salimans and Kingma, eq. 3).
    """
    parts = zip(d_weight.split(PROTOTYPES), v.split(PROTOTYPES), strict=True)
    d_g = torch.cat([(a * b).sum(1, keepdim=True) for a, b in parts]) / length  # (K, 1)
    return d_g, d_weight.addcmul_(v, d_g / length, value=-1).mul_(scale)


def _loss_and_slope(z: Tensor, probs: Tensor, *, slope: Tensor | None, by: float) -> Tensor:
    """The loss of some images summed over pairs, and its slope by z, divided by a number.

    Args:
        z: logits over temperature (S, R, K), the fewer the better for a CPU's cache.
        probs: targets of the same R images (T, R, K).
        slope: where to write the slope (S, R, K), may be `z`; or None.
        by: what to divide the slope by.

    Returns:
        Scalar.
    """
    num_teachers = len(probs)
    everyone = probs.sum(0)  # (R, K)
    log_q = torch.log_softmax(z, dim=-1)
    of_own = (probs * log_q[:num_teachers]).sum()
    loss = of_own - torch.dot(everyone.view(-1), log_q.sum(0).view(-1))
    if slope is not None:
        mass = probs.sum(-1)  # (T, R)
        counted = mass.sum(0).repeat(len(z), 1)  # (S, R): |P|
        counted[:num_teachers] -= mass
        q = log_q.exp_()
        torch.addcmul(everyone / -by, q, (counted / by)[..., None], out=slope)
        slope[:num_teachers].add_(probs, alpha=1 / by)
    return loss


def _chunks(shape: tuple[int, ...]) -> list[slice]:
    num_crops, num_images, num_prototypes = shape
    at_once = max(1, CHUNK // (num_crops * num_prototypes))
    return [slice(start, start + at_once) for start in range(0, num_images, at_once)]


def _num_pairs(shape: tuple[int, ...], probs: Tensor) -> int:
    """Pairs of distinct views, of all images."""
    return len(probs) * (shape[0] - 1) * shape[1]


def _at_least_float32(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
