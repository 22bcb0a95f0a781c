"""Gram anchoring: patches of a crop stay as similar to each other as an earlier network found them.

Shape letters: N crops, P patches of each, D width.
Source: Simeoni et al. 2025 (arXiv:2508.10104), section 4; divided by the number of entries as in
the authors' code, so that the value does not depend on the number of patches.

    L = mean over n, i and j of  (<x_ni, x_nj> - <y_ni, y_nj>)^2,   x, y unit vectors

With E the matrix of the differences, dL/dx_i is 4 sum_j E_ij x_j over the number of entries. Loss
and gradient are computed for a few crops, or a few rows of one crop's matrix, at a time: memory
holds a gradient as large as the features and twice `CHUNK` elements, however many patches there
are. L is a scalar, so the backward pass only scales the gradient that the forward has computed.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoscale.losses.prototypes import at_least_float32, slices

CHUNK = 2**22  # similarities at a time: 16 MB

Negatives = Literal["kept", "removed", "removed_from_target"]


def gram_loss(
    student: Tensor,
    target: Tensor,
    *,
    per_crop: bool = True,
    negatives: Negatives = "kept",
    chosen: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of the cosine similarities of student and target.

    Computed in float32, or float64 if an argument is, also under autocast.

    Args:
        student: patch features after the final norm (N, P, D), any float dtype.
        target: features of the same patches (N, P, D), likewise, without gradient.
        per_crop: compare patches of one crop; otherwise those of all crops with each other.
        negatives: whether similarities below 0 count as 0, on both sides or in the target alone.
        chosen: bool (N, P), patches that count, across crops only; None for all.

    Returns:
        Scalar, differentiable once, in the student's features.

    Raises:
        ValueError: the shapes disagree, or some patches are chosen within crops.
    """
    dtype = at_least_float32(student, target)
    with torch.autocast(student.device.type, enabled=False):
        return gram_difference(
            F.normalize(student.to(dtype), dim=-1),
            F.normalize(target.to(dtype), dim=-1),
            per_crop=per_crop,
            negatives=negatives,
            chosen=chosen,
        )


def gram_difference(
    x: Tensor,
    y: Tensor,
    *,
    per_crop: bool = True,
    negatives: Negatives = "kept",
    chosen: Tensor | None = None,
) -> Tensor:
    """`gram_loss` of vectors (N, P, D) as they are: neither resized nor normalised."""
    if x.shape != y.shape or (chosen is not None and (per_crop or chosen.shape != x.shape[:2])):
        shapes = [[*tensor.shape] for tensor in (x, y, chosen) if tensor is not None]
        raise ValueError(f"need (N, P, D) twice and (N, P) across crops, got {shapes}, {per_crop=}")
    entries: Tensor | int = x.shape[1] ** 2 * len(x) if per_crop else x.shape[:2].numel() ** 2
    if chosen is not None:
        # Similarities with a vector of zeros are zero on both sides: nothing waits for a count.
        entries = chosen.sum().clamp(min=1) ** 2
        x, y = (torch.where(chosen[..., None], vectors, 0) for vectors in (x, y))
    if not per_crop:
        x, y = x.flatten(0, 1)[None], y.flatten(0, 1)[None]
    loss: Tensor = _SquaredDifferences.apply(x, y, negatives)  # type: ignore[no-untyped-call]
    return loss / entries


class _SquaredDifferences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, negatives: Negatives) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.negatives = negatives
        loss, ctx.gradient = _squared_differences(x, y, negatives, needed=ctx.needs_input_grad[0])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # as large as the features: handed over
        if gradient is None:  # a second backward
            x, y = ctx.saved_tensors
            _, gradient = _squared_differences(x, y, ctx.negatives, needed=True)
        return gradient.mul_(upstream), None, None


def _squared_differences(
    x: Tensor, y: Tensor, negatives: Negatives, *, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the squared differences of all products, and if needed its gradient in x."""
    num_crops, num_patches, _ = x.shape
    loss, gradient = x.new_zeros(()), torch.empty_like(x) if needed else None
    for crops in slices(num_crops, size=CHUNK // num_patches**2):
        for rows in slices(num_patches, size=CHUNK // num_patches):  # all of them but for one crop
            there = y[crops, rows] @ y[crops].mT
            if negatives == "removed":
                here = x[crops, rows] @ x[crops].mT
                below = here < 0
                difference = here.masked_fill_(below, 0).sub_(there.clamp_(min=0))
            else:
                if negatives == "removed_from_target":
                    there.clamp_(min=0)
                difference = torch.baddbmm(there, x[crops, rows], x[crops].mT, beta=-1)
                below = None
            loss += torch.dot(difference.view(-1), difference.view(-1))
            if gradient is not None:
                if below is not None:
                    difference.masked_fill_(below, 0)
                gradient[crops, rows] = torch.bmm(difference, x[crops]).mul_(4)
            del there, difference, below  # before the next ones
    return loss, gradient
