"""Labels of a first frame propagated through a video by the similarity of patch features.

Shape letters: K context frames, R, C rows and columns of patches, D width, L labels (background
first), T target patches of a tile, S context patches around it, H, W pixels.
Source: Jabri et al. 2020 (arXiv:2006.14613), section 4.1, as used by Caron et al. 2021
(arXiv:2104.14294), section 4.2.2, and its published evaluation code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.errors import ConfigError
from dinoscale.evaluate.features import require_finite

TILE = 8  # patches along the side of a tile; tiles limit the memory, and change no result
LONG_SIDE_MULTIPLE = 64  # pixels, of the published code


@dataclass(frozen=True)
class Settings:
    """Settings of the propagation; the defaults are the published ones."""

    size: int = 480  # short side at which the network sees a frame, pixels
    context: int = 7  # recent frames that vote besides the first one
    radius: int = 12  # of the square neighbourhood, patches
    top: int = 5  # context patches that vote, of all context frames together
    temp: float = 0.1  # of the votes, dimensionless

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ConfigError: one is.
        """
        if min(self.size, self.radius, self.top) < 1 or self.context < 0 or not self.temp > 0:
            raise ConfigError(f"need size, radius, top, temp > 0 and context >= 0; got {self}")


def propagate_labels(
    target: Tensor,
    context: Tensor,
    labels: Tensor,
    *,
    radius: int,
    top: int,
    temp: float,
) -> Tensor:
    """Label every patch of a frame by the most similar patches near its position in other frames.

    weights = softmax(cosine / temp) over the `top` most similar patches of all context frames and
    positions together; patches that tie with the last of them vote too, as in the published code.

    Args:
        target: (R, C, D), L2-normalised.
        context: (K, R, C, D), L2-normalised.
        labels: (K, R, C, L), of the context frames, soft.
        radius: largest distance in rows and in columns, patches; max(R, C) allows the whole frame.
        top: >= 1.
        temp: > 0, dimensionless.

    Returns:
        (R, C, L), soft.
    """
    rows, columns = target.shape[:2]
    grid = [torch.arange(n, device=target.device) for n in (rows, columns)]
    result = labels.new_empty(rows, columns, labels.shape[-1])
    for row, column in product(range(0, rows, TILE), range(0, columns, TILE)):
        tile = _square(row, column, margin=0)
        window = _square(row, column, margin=radius)
        sources = context[(slice(None), *window)].flatten(0, 2)  # (S, D)
        similarity = target[tile].flatten(0, 1) @ sources.T  # (T, S)
        near = _neighbours(grid, tile, window, radius=radius)
        similarity = similarity.masked_fill(~near.repeat(1, len(context)), -torch.inf)
        least = similarity.topk(min(top, similarity.shape[1])).values[:, -1:]
        votes = similarity.masked_fill(similarity < least, -torch.inf)
        weights = (votes / temp).softmax(dim=1)
        voted = weights @ labels[(slice(None), *window)].flatten(0, 2)  # (T, L)
        result[tile] = voted.view(result[tile].shape)
    return result


def _square(row: int, column: int, *, margin: int) -> tuple[slice, slice]:
    """The tile that begins at a patch, with a margin; a slice may end beyond the grid."""
    starts = (row, column)
    first, second = (slice(max(0, at - margin), at + TILE + margin) for at in starts)
    return first, second


def _neighbours(
    grid: Sequence[Tensor], tile: Sequence[slice], window: Sequence[slice], *, radius: int
) -> Tensor:
    """Whether patches of tile and window are at most `radius` apart, (T, S / K), on the device.

    `grid` has the numbers of all rows and of all columns.
    """
    rows, columns = (
        (numbers[a][:, None] - numbers[b]).abs() <= radius
        for numbers, a, b in zip(grid, tile, window, strict=True)
    )
    # Axes: tile row, tile column, window row, window column.
    both = rows[:, None, :, None] & columns[None, :, None, :]
    return both.flatten(0, 1).flatten(1)


class Tracker:
    """Tracks the objects of a first frame through the later ones, frame by frame."""

    def __init__(
        self,
        backbone: nn.Module,
        pixels: NDArray[np.uint8],
        mask: NDArray[np.uint8],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        settings: Settings,
    ) -> None:
        """Start from a first frame.

        Args:
            backbone: a `VisionTransformer`, in eval mode.
            pixels: of the first frame, (H, W, channels).
            mask: (H, W), consecutive numbers from 0, the background.
            mean: of each channel, in 0..1.
            std: of each channel, in 0..1.
            settings: of the propagation.

        Raises:
            ConfigError: the frames are smaller than a patch.
        """
        self._backbone, self._settings = backbone, settings
        self._mean, self._std = mean, std
        features = self._features(pixels)
        self._first = features, _patch_labels(mask, features)
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.context)

    def track(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Find the objects in the next frame: a mask (H, W) with the numbers of the first."""
        features = self._features(pixels)
        context = [self._first, *self._recent]
        labels = propagate_labels(
            features,
            torch.stack([known for known, _ in context]),
            torch.stack([known for _, known in context]),
            radius=self._settings.radius,
            top=self._settings.top,
            temp=self._settings.temp,
        )
        self._recent.append((features, labels))
        size = (pixels.shape[0], pixels.shape[1])
        return label_image(labels, size=size, patch=_patch(self._backbone))

    def _features(self, pixels: NDArray[np.uint8]) -> Tensor:
        return patch_features(
            self._backbone, pixels, mean=self._mean, std=self._std, size=self._settings.size
        )


def working_size(height: int, width: int, *, size: int, patch: int) -> tuple[int, int]:
    """(H, W) at which the network sees a frame: 480 x 854 becomes 480 x 832.

    The short side is `size`, the long one in proportion, cut to a multiple of 64 pixels. Differs:
    where the patch does not divide these (14), both are cut to a multiple of the patch.

    Raises:
        ConfigError: less than a patch is left.
    """
    multiple = LONG_SIDE_MULTIPLE if LONG_SIDE_MULTIPLE % patch == 0 else patch
    short = size // patch * patch
    long = size * max(height, width) // min(height, width) // multiple * multiple
    if min(short, long) < 1:
        raise ConfigError(
            f"size: frames of {width} x {height} pixels with a short side of {size} have no patch "
            f"of {patch}, or no {multiple} pixels along the other side. Use a larger size."
        )
    return (short, long) if height <= width else (long, short)


def _patch(backbone: nn.Module) -> int:
    return int(backbone.patch_size)  # type: ignore[arg-type]  # an int of every ViT


def patch_features(
    backbone: nn.Module,
    pixels: NDArray[np.uint8],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: int,
) -> Tensor:
    """Normalised patch tokens of the last block for a picture (H, W, C), each of norm 1.

    Args:
        backbone: a `VisionTransformer`, in eval mode.
        pixels: uint8.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        size: short side in pixels at which the backbone sees it; see `working_size`.

    Returns:
        (R, C, D) float32, on the device of the backbone.

    Raises:
        ConfigError: the picture is smaller than a patch.
        NonFiniteError: a feature is not a finite number.
    """
    weight = next(backbone.parameters())
    patch = _patch(backbone)
    height, width = working_size(*pixels.shape[:2], size=size, patch=patch)
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(weight.device).float()
    image = F.interpolate(image, (height, width), mode="bilinear", align_corners=False)
    image = normalize_images(image.round(), mean=mean, std=std)  # OpenCV resizes to integers
    rows, columns = height // patch, width // patch
    with torch.no_grad():
        tokens: Tensor = backbone.features(image.to(weight.dtype))  # type: ignore[operator]  # ViT
    patches = require_finite(tokens[0, -rows * columns :].float())
    return F.normalize(patches, dim=1).view(rows, columns, -1)


def _patch_labels(mask: NDArray[np.uint8], features: Tensor) -> Tensor:
    """One-hot labels of the patches by nearest neighbour, (R, C, L)."""
    rows, columns = features.shape[:2]
    small = Image.fromarray(mask).resize((columns, rows), Image.Resampling.NEAREST)
    numbers = torch.from_numpy(np.array(small)).long().to(features.device)
    return F.one_hot(numbers, int(mask.max()) + 1).to(features.dtype)


def label_image(labels: Tensor, *, size: tuple[int, int], patch: int) -> NDArray[np.uint8]:
    """Turn soft labels of patches (R, C, L) into a mask of (H, W) = size.

    Labels are enlarged bilinearly to pixels and scaled to 0..1 each; the largest wins, and the mask
    is resized to the frame by nearest neighbour. Differs: a constant label counts as 0; the
    published code divides by zero there.
    """
    maps = F.interpolate(
        labels.permute(2, 0, 1)[None], scale_factor=patch, mode="bilinear", align_corners=False
    )[0]  # (L, R p, C p)
    least, most = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    spread = most - least
    scaled = torch.where(spread > 0, (maps - least) / spread.clamp(min=1e-30), 0.0)
    winner = scaled.argmax(dim=0).to(torch.uint8).cpu().numpy()
    height, width = size
    return np.array(Image.fromarray(winner).resize((width, height), Image.Resampling.NEAREST))
