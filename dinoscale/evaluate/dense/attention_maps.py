"""Attention of the class token in the last block: maps, their thresholded masks, their overlap.

Shape letters: N images, A heads, H, W pixels, R, C rows and columns of patches, p patch size.
Source: Caron et al. 2021 (arXiv:2104.14294), figures 1 and 4 and appendix, and its published
visualisation code. No code was published for the Jaccard index; the rule is the paper's text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinoscale.errors import ConfigError
from dinoscale.evaluate.features import require_finite

# Share of a head's attention that its mask keeps, 0 < share <= 1: of figure 4 of the paper, whose
# appendix states 0.8 for the same numbers.
MASS = 0.6
TOKENS_AT_ONCE = 2**14  # of all images of a forward; about 200 MiB for a ViT-S


def attention_maps(backbone: nn.Module, images: Tensor) -> Tensor:
    """Attention of the class token to the patches in the last block.

    Args:
        backbone: a `VisionTransformer`.
        images: (N, C, H, W), normalised, on the backbone's device; H, W multiples of p.

    Returns:
        (N, A, R, C) float32 on the CPU. A map sums to less than 1: the rest goes to the class
        token itself and to registers.

    Raises:
        ConfigError: the backbone has no attention, or the images are smaller than a patch.
        NonFiniteError: a weight of a map is not a finite number.
    """
    last_attention = getattr(backbone, "last_attention", None)
    if not callable(last_attention):
        raise ConfigError(f"attention maps need a ViT, this is a {type(backbone).__name__}")
    patch = int(backbone.patch_size)  # type: ignore[arg-type]  # an int of every ViT
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    if rows * columns == 0:
        raise ConfigError(f"size: images must have at least one patch of {patch} pixels")
    at_once = max(1, TOKENS_AT_ONCE // (rows * columns))
    maps = []
    with torch.no_grad():
        for part in images.split(at_once):
            to_patches = last_attention(part, queries=1)[:, :, 0, -rows * columns :]
            maps.append(to_patches.float().reshape(*to_patches.shape[:2], rows, columns).cpu())
    return require_finite(torch.cat(maps))


def check_mass(mass: float) -> None:
    """Refuse a share of the attention that is out of range.

    Raises:
        ConfigError: it is not in 0 < mass <= 1.
    """
    if not 0 < mass <= 1:
        raise ConfigError(f"mass: need a share above 0 and at most 1, got {mass}")


def keep_mass(maps: Tensor, *, mass: float = MASS) -> Tensor:
    """Keep the most attended patches that together hold a fraction of each map's attention.

    In ascending order, a patch is kept if the cumulative share up to it exceeds 1 - mass.

    Args:
        maps: (..., R, C), not negative, each with a positive sum.
        mass: 0 < mass <= 1, a fraction.

    Returns:
        (..., R, C) bool.

    Raises:
        ValueError: the mass is out of range.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"need 0 < mass <= 1, got {mass}")
    flat = maps.flatten(-2)
    values, order = flat.sort(dim=-1)
    share = values.cumsum(-1) / values.sum(-1, keepdim=True)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, share > 1 - mass)
    return kept.reshape(maps.shape)


def head_jaccard(kept: Tensor, masks: Tensor, counted: Tensor | None = None) -> Tensor:
    """Intersection over union of every head's patches with the object.

    Args:
        kept: (N, A, R, C) bool; enlarged to the masks by nearest neighbour.
        masks: (N, H, W) bool, none empty.
        counted: (N, H, W) bool, False on pixels that are ignored (void in VOC, the ambiguous border
            of objects); None counts all.

    Returns:
        (N, A) float32, 0..1.
    """
    pixels = enlarge(kept, height=masks.shape[1], width=masks.shape[2])
    if counted is not None:
        pixels, masks = pixels & counted[:, None], masks & counted
    both = (pixels & masks[:, None]).sum((2, 3))
    return both / (pixels | masks[:, None]).sum((2, 3))


def enlarge(maps: Tensor, *, height: int, width: int) -> Tensor:
    """Nearest neighbour: maps (..., R, C) at height x width pixels, by the pixels' centers."""
    rows, columns = (
        (2 * torch.arange(pixels) + 1) * patches // (2 * pixels)  # integers: no ties to round
        for pixels, patches in ((height, maps.shape[-2]), (width, maps.shape[-1]))
    )
    return maps[..., rows[:, None], columns]


def center_box(height: int, width: int) -> Tensor:
    """Return the mask of a centered box of half the height and width, (1, height, width) bool."""
    box = torch.zeros(1, height, width, dtype=torch.bool)
    top, left = height // 4, width // 4
    box[:, top : top + height // 2, left : left + width // 2] = True
    return box
