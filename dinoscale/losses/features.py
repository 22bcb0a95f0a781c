"""Features of a student that follow those of another network, its teacher.

With x a feature of the student, already of the teacher's width D, and y the teacher's:

    cosine      d = 1 - cos(x, y)
    smooth_l1   d = mean over the D channels of h(x - z),  z = (y - mean(y)) / sqrt(var(y) + 1e-6),
                h(e) = e^2 / 2 where |e| < 1, else |e| - 1/2

Mean and variance are those of the D channels of one feature: a layer norm without parameters, so
that a weight means the same whatever the lengths of a teacher's features.

Shape letters: N crops, P patches of each, D width.
Source: [D] ours; published distillations of DINOv2 and DINOv3 go through the teacher's heads.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses.anchor import anchor_distances
from dinoscale.losses.prototypes import at_least_float32

FeatureLoss = Literal["cosine", "smooth_l1"]

_EPS = 1e-6  # of the variance of a feature's channels; a layer norm's in a ViT


def feature_distances(student: Tensor, target: Tensor, *, kind: FeatureLoss) -> Tensor:
    """Distance of student and target, of each crop; a mean over its patches where there are some.

    Computed in float32, or float64 if an argument is, also under autocast.

    Args:
        student: features after the linear map (N, D) or (N, P, D), any float dtype.
        target: features of the same crops and patches, likewise, without gradient.
        kind: see the module.

    Returns:
        (N,), at least 0, differentiable in the student's features.

    Raises:
        ValueError: the shapes disagree.
    """
    if kind == "cosine":
        return anchor_distances(student, target)
    if student.shape != target.shape or student.ndim not in (2, 3):
        shapes = [[*tensor.shape] for tensor in (student, target)]
        raise ValueError(f"need (N, D) or (N, P, D) twice, got {shapes[0]} and {shapes[1]}")
    dtype = at_least_float32(student, target)
    with torch.autocast(student.device.type, enabled=False):
        z = F.layer_norm(target.to(dtype), target.shape[-1:], eps=_EPS)
        return F.smooth_l1_loss(student.to(dtype), z, reduction="none").flatten(1).mean(1)
