"""Descriptors of copy detection: class token and pooled patches, whitened.

Shape letters: N images, P patches, D width of the backbone, E = 2 D of the descriptor.
Source: Caron et al. 2021 (arXiv:2104.14294), section 4.2.1, and its published evaluation code;
GeM pooling: Radenovic et al. 2018 (arXiv:1711.02512).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoscale.evaluate.any_size import find_patch_size

GEM_POWER = 4.0
GEM_LEAST = 1e-6  # minimum of the patch values; smaller ones are clamped
EIGENVALUE_LEAST = 1e-5  # of the largest; smaller ones are clamped


class CopyDescriptor(nn.Module):
    """A ViT whose output is its class token and the generalised mean of its patch tokens."""

    def __init__(self, backbone: nn.Module) -> None:
        """Wrap a backbone.

        Raises:
            ConfigError: it is no ViT.
        """
        super().__init__()
        self._patch = find_patch_size(backbone)
        self.backbone = backbone

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Return descriptors (N, E), not normalised.

        Args:
            crops: one tensor (N, C, H, W), normalised pixels.
        """
        (images,) = crops
        num_patches = (images.shape[2] // self._patch) * (images.shape[3] // self._patch)
        tokens: Tensor = self.backbone.features(images)  # type: ignore[operator]  # as checked
        return torch.cat((tokens[:, 0], generalized_mean(tokens[:, -num_patches:])), dim=1)


def generalized_mean(patches: Tensor, *, power: float = GEM_POWER) -> Tensor:
    """(mean over the patches of max(x, 1e-6)^power)^(1 / power): (N, P, D) to (N, D)."""
    return patches.clamp(min=GEM_LEAST).pow(power).mean(dim=1).pow(1 / power)


@dataclass(frozen=True, eq=False)
class Whitening:
    """A shift and a rotation with scales."""

    mean: Tensor  # (E,)
    projection: Tensor  # (E, E), a row for each output

    def __call__(self, descriptors: Tensor) -> Tensor:
        """Whiten descriptors (N, E)."""
        return (descriptors - self.mean) @ self.projection.T


def learn_whitening(descriptors: Tensor) -> Whitening:
    """Principal directions of descriptors (N, E), each scaled to the same second moment.

    `Whitening` subtracts the mean, but the second moments are not centered, as in the published
    code. All directions are kept; eigenvalues below 1e-5 of the largest are clamped to that.

    Raises:
        ValueError: there are no descriptors.
    """
    if not len(descriptors):
        raise ValueError("need descriptors to learn a whitening from")
    exact = descriptors.double()
    values, vectors = torch.linalg.eigh(exact.T @ exact / len(exact))  # vectors in columns
    values = values.clamp(min=EIGENVALUE_LEAST * float(values.max()))
    projection = (vectors / values.sqrt()).T
    return Whitening(descriptors.mean(dim=0), projection.to(descriptors.dtype))


def unit(descriptors: Tensor, whitening: Whitening | None) -> Tensor:
    """Whiten descriptors (N, E), if there is a whitening, and scale them to norm 1."""
    return F.normalize(descriptors if whitening is None else whitening(descriptors), dim=1)
