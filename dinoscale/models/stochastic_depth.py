"""Stochastic depth: which residual branches of which images are dropped, and by what the rest grow.

Shape letters: N images, T tokens of all images together.
Source: Huang et al. 2016 (arXiv:1603.09382); linear rule and scaling as in the authors' code of
Caron et al. 2021.
"""

import torch
from torch import Tensor

from dinoscale.models.block import Layout


def stochastic_depth_keep(uniforms: Tensor, drop_path_rate: float) -> Tensor:
    """Turn uniform numbers into the multipliers of stochastic depth, per block, branch and image.

    Block i of `depth` drops a branch with probability r_i = rate * i / (depth - 1); a branch that
    stays is multiplied by 1 / (1 - r_i), so its mean is unchanged.
    Source: Huang et al. 2016 (arXiv:1603.09382); linear rule and scaling as in the authors' code.

    Args:
        uniforms: (depth, 2, N), float32 in [0, 1); branch 0 is attention, 1 the MLP.
        drop_path_rate: rate of the last block, 0 <= rate < 1; the first block never drops.

    Returns:
        (depth, 2, N), dtype of `uniforms`: 0 or 1 / (1 - r_i).

    Raises:
        ValueError: the rate is outside [0, 1).
    """
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"need 0 <= drop_path_rate < 1, got {drop_path_rate}")
    rates = torch.linspace(
        0, drop_path_rate, uniforms.shape[0], dtype=uniforms.dtype, device=uniforms.device
    )[:, None, None]
    return (uniforms >= rates).to(uniforms.dtype) / (1 - rates)


def per_token(keep: Tensor, layout: Layout) -> Tensor:
    """Repeat multipliers (depth, 2, N) for every token of an image: (depth, 2, T, 1)."""
    groups = torch.split(keep, [n for n, _ in layout], dim=-1)
    repeated = [
        group.repeat_interleave(length, dim=-1)
        for group, (_, length) in zip(groups, layout, strict=True)
    ]
    return torch.cat(repeated, dim=-1).unsqueeze(-1)
