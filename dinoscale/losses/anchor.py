"""Anchor: features stay in the direction that another network finds for the same picture.

    d(x, y) = 1 - cos(x, y) = |x / ||x|| - y / ||y|| |^2 / 2

The second form is the one computed: of equal features it is 0 exactly, and so is its gradient,
where the first leaves the rounding of a product of unit vectors.

Shape letters: N crops, P patches of each, D width.
Source: a term that preserves the features of released weights is in NVIDIA TAO 7.3 (2026), whose
review notes that both sides have to see the same pictures; the cosine is [D] ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses.prototypes import at_least_float32


def anchor_distances(student: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of student and target, of each crop; a mean over its patches where there are some.

    Computed in float32, or float64 if an argument is, also under autocast.

    Args:
        student: features after the final norm (N, D) or (N, P, D), any float dtype.
        target: features of the same crops and patches, likewise, without gradient.

    Returns:
        (N,), each from 0 to 2, differentiable in the student's features.

    Raises:
        ValueError: the shapes disagree.
    """
    if student.shape != target.shape or student.ndim not in (2, 3):
        shapes = [[*tensor.shape] for tensor in (student, target)]
        raise ValueError(f"need (N, D) or (N, P, D) twice, got {shapes[0]} and {shapes[1]}")
    dtype = at_least_float32(student, target)
    with torch.autocast(student.device.type, enabled=False):
        x, y = (F.normalize(features.to(dtype), dim=-1) for features in (student, target))
        distances = (x - y).square().sum(-1) / 2
    return distances if student.ndim == 2 else distances.mean(1)
