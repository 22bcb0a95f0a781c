"""Rotary position embedding on two axes: queries and keys of patches turn with their position.

A pair of channels of a head turns by 2 pi c / t, with the coordinate c of the patch's centre and a
period t. A quarter of the channels each is the first half of the pairs of rows and of columns; the
other halves follow in the same order. Tables and rotation are float32, or float64 for a float64
network, whatever the weights' type: bfloat16 has 8 bits, too few for angles of many turns.

Shape letters: P patches and L = S + P tokens of an image, S special tokens (class token and
registers), d channels of a head, A blocks.
Source: Su et al. 2021 (arXiv:2104.09864); Heo et al. 2024 (arXiv:2403.13298) for two axes; code of
Simeoni et al. 2025 (arXiv:2508.10104), whose training has tables in bfloat16.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Coordinates = Literal["separate", "min", "max"]

CHUNK = 2**17  # elements at a time on a CPU, whose cache holds them through all passes


@dataclass(frozen=True)
class Rope:
    """Which positions turn by how much.

    Attributes:
        base: periods are base^(2i / (d/2)); None for `min_period` to `max_period`, both included,
            evenly spaced in their logarithm.
        min_period: of the first channel, in units of the coordinates; None with `base`.
        max_period: of the last channel.
        coordinates: both axes run from -1 to 1 (separate); the longer one does (max), so that the
            other is as much shorter; the shorter one does (min).
    """

    base: float | None = 100.0
    min_period: float | None = None
    max_period: float | None = None
    coordinates: Coordinates = "separate"

    def periods(self, head_dim: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Periods (d/4,), the same for rows and columns.

        Raises:
            ValueError: d is no multiple of 4, or neither `base` nor both ends are given.
        """
        if head_dim % 4:
            raise ValueError(f"need heads of a multiple of 4 channels, got {head_dim}")
        count = head_dim // 4
        if self.base is not None:
            steps = torch.arange(count, dtype=dtype, device=device)
            return self.base ** (2 * steps / (head_dim // 2))
        if self.min_period is None or self.max_period is None:
            raise ValueError("need a base, or both min_period and max_period")
        steps = torch.linspace(0, 1, count, dtype=dtype, device=device)
        return self.min_period * (self.max_period / self.min_period) ** steps

    def centres(
        self, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Coordinates of the patches' centres (P, 2), row and column, row by row."""
        spans = {
            "separate": (rows, columns),
            "max": (max(rows, columns),) * 2,
            "min": (min(rows, columns),) * 2,
        }[self.coordinates]
        axes = [
            2 * (torch.arange(count, dtype=dtype, device=device) + 0.5) / span - 1
            for count, span in zip((rows, columns), spans, strict=True)
        ]
        return torch.cartesian_prod(*axes)


class Rotation(NamedTuple):
    """By how much the tokens of an image turn; class token and registers do not.

    Attributes:
        cos: (L, d), or (A, L, d) of many blocks.
        sin: likewise, negative for the first half of each pair.
    """

    cos: Tensor
    sin: Tensor


def sine_and_cosine(
    rope: Rope,
    grid: tuple[int, int],
    *,
    head_dim: int,
    changes: Tensor | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Sines and cosines of the angles of patches, one of each pair of channels: (..., P, d/2).

    Args:
        rope: the periods and coordinates.
        grid: rows and columns of patches.
        head_dim: d.
        changes: (..., 5), see `coordinate_changes`; None for none.
        dtype: of the arithmetic and the results.
        device: of the results.
    """
    centres = rope.centres(*grid, dtype=dtype, device=device)
    if changes is not None:
        shift, jitter, rescale = changes.to(device, dtype)[..., None, :].split((2, 2, 1), dim=-1)
        centres = (centres + shift) * jitter * rescale  # (..., P, 2)
    periods = rope.periods(head_dim, dtype=dtype, device=device)
    angles = (2 * math.pi * centres[..., None] / periods).flatten(-2)  # rows' d/4, columns' d/4
    return angles.sin(), angles.cos()


def rotation(
    rope: Rope,
    grid: tuple[int, int],
    *,
    num_special: int,
    head_dim: int,
    changes: Tensor | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> Rotation:
    """The rotation of an image's tokens, of which the first `num_special` stay as they are.

    Args:
        rope: as in `sine_and_cosine`, like the others.
        grid: rows and columns of patches.
        num_special: S, tokens before the patches.
        head_dim: d.
        changes: of the coordinates, or None.
        dtype: of the tables.
        device: of the tables.
    """
    sin, cos = sine_and_cosine(
        rope, grid, head_dim=head_dim, changes=changes, dtype=dtype, device=device
    )
    before = (0, 0, num_special, 0)
    return Rotation(
        F.pad(torch.cat((cos, cos), dim=-1), before, value=1.0),
        F.pad(torch.cat((-sin, sin), dim=-1), before),
    )


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn queries or keys (N, heads, L, d): the dtype stays, the arithmetic is that of the tables.

    (a, b) -> (a cos - b sin, b cos + a sin) for channels i and i + d/2, in three passes.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * by.cos, swapped, by.sin).to(x.dtype)


def turn(x: Tensor, by: Rotation, *, into: Tensor, back: bool = False) -> None:
    """Write x (N, L, ..., d), turned as by `rotate` or back, to `into`, which may be x itself.

    Without gradient. Turned back is what the backward of a rotation does to gradients.
    """
    between = [1] * (x.ndim - 3)
    cos, sin = (table.view(len(table), *between, -1) for table in by)
    images = CHUNK // x.shape[1:].numel() if x.device.type == "cpu" else len(x)
    for part, target in zip(x.split(max(images, 1)), into.split(max(images, 1)), strict=True):
        wide = part.to(cos.dtype)
        swapped = wide.roll(x.shape[-1] // 2, dims=-1)
        same = wide is part
        turned = torch.mul(wide, cos, out=target) if same else wide * cos
        turned.addcmul_(swapped, sin, value=-1 if back else 1)
        if not same:
            target.copy_(turned)


def coordinate_changes(uniforms: Tensor, *, shift: float, jitter: float, rescale: float) -> Tensor:
    """Turn uniform numbers into changes of coordinates: (c + shift) * jitter * rescale.

    Args:
        uniforms: (..., 5) in [0, 1).
        shift: s >= 0; each axis is shifted by a number in [-s, s].
        jitter: j >= 1; each axis is multiplied by a number in [1/j, j], uniform in its logarithm.
        rescale: r >= 1; both axes are multiplied by one number in [1/r, r], likewise.

    Returns:
        (..., 5), dtype of `uniforms`: shift, then jitter, of rows and of columns; rescale.
    """
    between = 2 * uniforms - 1
    shifts, jitters, rescales = between.split((2, 2, 1), dim=-1)
    factors = (jitters * math.log(jitter)).exp(), (rescales * math.log(rescale)).exp()
    return torch.cat((shift * shifts, *factors), dim=-1)
