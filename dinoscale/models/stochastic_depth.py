"""Stochastic depth (drop path): drop residual branches per image and scale up those that are kept.

Shape letters: N images, L tokens per image, T tokens of all images together.
Source: Huang et al. 2016 (arXiv:1603.09382); linear rule and scaling as in the authors' code of
Caron et al. 2021.
"""

import math

import torch
from torch import Tensor

from dinoscale.models.block import Layout, Subset


def stochastic_depth_keep(
    uniforms: Tensor, drop_path_rate: float, *, uniform: bool = False
) -> Tensor:
    """Turn uniform numbers into multipliers of stochastic depth, per block, branch and image.

    Block i of `depth` drops a branch with probability r_i = rate * i / (depth - 1) and multiplies
    it by 1 / (1 - r_i) otherwise, so its mean is unchanged.

    Args:
        uniforms: (depth, 2, N), float32 in [0, 1); branch 0 is attention, 1 the MLP.
        drop_path_rate: rate of the last block, 0 <= rate < 1; the first block never drops.
        uniform: r_i is the rate in all blocks, as in DINOv2.

    Returns:
        (depth, 2, N), dtype of `uniforms`: 0 or 1 / (1 - r_i).

    Raises:
        ValueError: the rate is outside [0, 1).
    """
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"need 0 <= drop_path_rate < 1, got {drop_path_rate}")
    rates = torch.linspace(
        drop_path_rate if uniform else 0,
        drop_path_rate,
        uniforms.shape[0],
        dtype=uniforms.dtype,
        device=uniforms.device,
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


def kept_images(
    images: int, *, depth: int, drop_path_rate: float, uniform: bool = False
) -> list[int]:
    """For how many of so many images of a resolution each block computes a branch.

    Arguments and rule as in `kept_subsets`.
    """
    if uniform:
        return [max(1, math.floor(images * (1 - drop_path_rate)))] * depth
    rates = [drop_path_rate * block / max(depth - 1, 1) for block in range(depth)]
    return [max(1, images - math.floor(images * rate)) for rate in rates]


def kept_subsets(
    uniforms: Tensor, layout: Layout, *, drop_path_rate: float, uniform: bool = False
) -> list[tuple[Subset, Subset] | None]:
    """Choose the images for which each branch is computed, from the same uniform numbers.

    With r_i as above, a branch of block i keeps max(1, N - floor(N r_i)) of the N images of a
    resolution, those with the largest numbers, and multiplies them by N over their count. Differs:
    the number of dropped images is fixed, and which are dropped depends on the other images of the
    micro-batch, so results change with its size and the number of ranks; the mean is as above.
    Source: code of Oquab et al. 2023 (arXiv:2304.07193), whose rate is the same in all blocks and
    which keeps max(1, floor(N (1 - r))), one fewer where N r is no whole number.

    Args:
        uniforms: (depth, 2, N of all resolutions), in [0, 1), images in the order of `layout`.
        layout: of the packed tokens.
        drop_path_rate: rate of the last block, 0 <= rate < 1.
        uniform: keep as DINOv2 does, at the same rate in all blocks.

    Returns:
        For each block the subsets of attention and MLP; None where nothing is dropped.
    """
    tokens, first = [], 0
    for values, (n, length) in zip(
        uniforms.split([n for n, _ in layout], dim=-1), layout, strict=True
    ):
        starts = first + length * values.argsort(dim=-1, descending=True)  # (depth, 2, N)
        tokens.append(starts[..., None] + torch.arange(length, device=starts.device))
        first += n * length
    depth = len(uniforms)
    of_resolutions = [
        kept_images(n, depth=depth, drop_path_rate=drop_path_rate, uniform=uniform)
        for n, _ in layout
    ]
    subsets: list[tuple[Subset, Subset] | None] = []
    for block, counts in enumerate(zip(*of_resolutions, strict=True)):
        kept = tuple((count, length) for count, (_, length) in zip(counts, layout, strict=True))
        if kept == layout:
            subsets.append(None)
            continue
        weights = [
            uniforms.new_full((count * length, 1), n / count)
            for (count, length), (n, _) in zip(kept, layout, strict=True)
        ]
        attention, mlp = (
            Subset(
                torch.cat(
                    [
                        rows[block, branch, :count].flatten()
                        for rows, count in zip(tokens, counts, strict=True)
                    ]
                ),
                torch.cat(weights),
                kept,
            )
            for branch in (0, 1)
        )
        subsets.append((attention, mlp))
    return subsets
