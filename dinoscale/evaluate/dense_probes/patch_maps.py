"""Maps of patch features of images of any size: of a frozen ViT, or the pixels themselves.

Shape letters: N images, C channels, H, W pixels, p patch size, R, S rows and columns of patches, D
width of a token, n blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.any_size import MAX_PATCHES, find_patch_size
from dinoscale.evaluate.features import require_finite

Precision = Literal["bf16", "fp32"]
Spread = Literal["last", "even"]  # which blocks several are


class Maps(Protocol):
    """Makes maps of patch features.

    Attributes:
        patch: p.
        width: channels of a map.
    """

    patch: int
    width: int

    def __call__(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to (N, width, R, S) float32, without gradients.

        Partial patches at the right and below are filled up with zeros, the mean color, so that
        R = ceil(H / p) and S = ceil(W / p).
        """
        ...


class BlockMaps:
    """Patch tokens of blocks of a frozen ViT, each through the final norm, joined.

    Attributes:
        patch: p.
        width: n D.
    """

    def __init__(self, backbone: nn.Module, blocks: Sequence[int], precision: Precision) -> None:
        """Take the tokens of these blocks, numbers from 0 in rising order."""
        self.patch = find_patch_size(backbone)
        self._backbone: Any = backbone
        self._blocks, self._precision = blocks, precision
        self.width = len(blocks) * int(backbone.embed_dim)  # type: ignore[arg-type]  # an int

    def __call__(self, images: Tensor) -> Tensor:
        """As of `Maps`.

        Raises:
            DataError: the images have too many patches for one forward.
            NonFiniteError: a feature is not a finite number.
        """
        whole = whole_patches(images, patch=self.patch)
        rows, columns = (side // self.patch for side in whole.shape[2:])
        if rows * columns > MAX_PATCHES:
            raise DataError(
                f"an image of {rows} x {columns} patches, more than {MAX_PATCHES}. Choose a smaller"
                " --size."
            )
        first = self._blocks[0]
        autocast = torch.autocast(
            whole.device.type, torch.bfloat16, enabled=self._precision == "bf16"
        )
        with torch.no_grad(), autocast:
            weight = next(self._backbone.parameters())
            tokens = self._backbone.intermediate(
                whole.to(weight.dtype), self._backbone.depth - first
            )
        chosen = [tokens[block - first][:, -rows * columns :].float() for block in self._blocks]
        joined = torch.cat(chosen, dim=2).transpose(1, 2)  # (N, n D, R S)
        return torch.unflatten(require_finite(joined), 2, (rows, columns))


class PixelMaps:
    """The pixels of each patch: what colors alone tell.

    Attributes:
        patch: p.
        width: C p^2.
    """

    def __init__(self, *, patch: int, channels: int) -> None:
        self.patch, self.width = patch, channels * patch**2

    def __call__(self, images: Tensor) -> Tensor:
        """As of `Maps`."""
        return F.pixel_unshuffle(whole_patches(images, patch=self.patch), self.patch)


def whole_patches(images: Tensor, *, patch: int) -> Tensor:
    """Fill images (N, C, H, W) up with zeros, to the right and below, to multiples of `patch`."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % patch, 0, -height % patch))


def choose_blocks(backbone: nn.Module, layers: int, spread: Spread) -> tuple[int, ...]:
    """Numbers of the blocks whose tokens are joined.

    Args:
        backbone: a ViT.
        layers: how many.
        spread: the last ones, or the last of as many equal parts of the network (of 12 blocks and
            4 layers: 2, 5, 8, 11).

    Raises:
        ConfigError: it is no ViT, or has fewer blocks.
    """
    find_patch_size(backbone)
    depth: int = backbone.depth  # type: ignore[assignment]  # an int of every ViT
    if not 1 <= layers <= depth:
        raise ConfigError(f"layers: need 1 to {depth}, the blocks of this ViT, got {layers}")
    if spread == "last":
        return tuple(range(depth - layers, depth))
    return tuple((number + 1) * depth // layers - 1 for number in range(layers))
