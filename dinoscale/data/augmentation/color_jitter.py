"""Colour jitter, blur and solarization of many crops at once, on the training device.

Every step does to 8-bit pixels what Pillow does, rounding included, so the pictures equal those of
`reference_crops`: whole numbers from 0 to 255, held in float32. Hue is the exception: Pillow keeps
it in 8 bits, and pure colours then differ by up to 9 of 255 levels, by 0.5 on average, without a
bias (below 0.15). The workers drew which crop takes which steps, so the host knows it without
asking the device.
Shape letters: M crops, C channels, H rows and columns of a crop.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from dinoscale.data.augmentation.crop_params import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NOT_SOLARIZED,
    NOTHING,
    SATURATION,
    Params,
)
from dinoscale.data.transfer import to_device
from dinoscale.runtime.logs import not_compiled

log = logging.getLogger(__name__)

# Bytes of the crops that are changed together; few on a CPU, so that they stay in its cache.
_PASS_BYTES = {"cpu": 2**20}
_DEVICE_PASS_BYTES = 2**29
_PLANES = torch.contiguous_format
_COMPILED_ON = {"cuda"}  # a compiler for the CPU may be missing, and takes a minute

_LUMA = (19595 / 2**16, 38470 / 2**16, 7471 / 2**16)  # ITU-R 601-2, as Pillow rounds it
_BLUR_PASSES = 3  # box blurs that make up Pillow's Gaussian
_BAND = 48  # rows that a blur on a CPU computes together


@torch.no_grad()
def finish_crops(
    crops: Tensor,
    params: Params,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    compiled: bool = True,
) -> Tensor:
    """Flip, change the colours, blur, solarize and normalise, all as drawn for each crop.

    Args:
        crops: cut and resized, uint8 (M, H, H, C), on the device.
        params: what happens to each, records of PARAMS (M,).
        mean: mean of each channel, in [0, 1].
        std: standard deviation of each channel, in [0, 1].
        compiled: compile the pointwise steps on a GPU.

    Returns:
        float32 (M, C, H, H), (x / 255 - mean) / std.
    """
    device = crops.device
    count, height, width, channels = crops.shape
    finished = torch.empty((count, channels, height, width), device=device)
    scale, shift = _normalisation(mean, std, device=device)
    plan = _planned(params)
    for some in _groups(params, device=device, crop_bytes=4 * channels * height * width):
        rows = some if isinstance(some, slice) else _on(device, some)
        cut = crops[rows] if isinstance(rows, slice) else crops.index_select(0, rows)
        pixels = cut.permute(0, 3, 1, 2).to(torch.float32, memory_format=_PLANES)
        changed = _change(pixels, _steps(plan, some), compiled=compiled)
        if isinstance(rows, slice):
            torch.mul(changed, scale, out=finished[rows]).add_(shift)
        else:
            for row, crop in zip(rows.tolist(), changed, strict=True):
                torch.mul(crop, scale, out=finished[row]).add_(shift)
    return finished


def _groups(
    params: Params, *, device: torch.device, crop_bytes: int
) -> Iterator[slice | NDArray[np.int64]]:
    """Yield the crops in groups to change together; on a CPU those with the same order of steps."""
    at_once = max(1, _PASS_BYTES.get(device.type, _DEVICE_PASS_BYTES) // crop_bytes)
    if device.type != "cpu" or at_once == 1:
        for first in range(0, len(params), at_once):
            yield slice(first, first + at_once)
        return
    order = params["order"]
    rows = np.lexsort((params["flip"], params["blur_radius"] > 0, *order.T))
    differs = (order[rows[1:]] != order[rows[:-1]]).any(axis=1)
    for group in np.split(rows, differs.nonzero()[0] + 1):
        for first in range(0, len(group), at_once):
            yield group[first : first + at_once]


def _normalisation(
    mean: Sequence[float], std: Sequence[float], *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and shift (C, 1, 1) that do the same as (x / 255 - mean) / std."""
    both = torch.tensor([[1 / (255 * s), -m / s] for m, s in zip(mean, std, strict=True)])
    scale, shift = to_device(both, device).T
    return scale[:, None, None], shift[:, None, None]


_Change = Callable[[Tensor, Tensor], Tensor]


class _Step(NamedTuple):
    """One change of some of the crops."""

    change: _Change
    rows: NDArray[np.int64]  # of the crops, rising
    values: NDArray[np.float32]  # one for each of them


class _Plan(NamedTuple):
    """What happens to M crops: a row for each place in the order."""

    numbers: NDArray[np.integer]  # of _CHANGES, or NOTHING, (places, M)
    values: NDArray[np.float32]  # (places, M)


def _change(pixels: Tensor, steps: list[_Step], *, compiled: bool) -> Tensor:
    """Change crops (M, C, H, H), in place or not, in the order of the reference.

    Returns:
        (M, C, H, H), or (M, 1, H, H) where all are gray.
    """
    if not steps:
        return pixels
    # One transfer for all steps: copying each list on its own would keep the host busy.
    all_rows = _on(pixels.device, np.concatenate([step.rows for step in steps]))
    all_values = _on(pixels.device, np.concatenate([step.values for step in steps]))
    sizes = [len(step.rows) for step in steps]
    on_device = zip(all_rows.split(sizes), all_values.split(sizes), strict=True)
    for step, (rows, column) in zip(steps, on_device, strict=True):
        values = column.view(-1, 1, 1, 1)
        if len(rows) == len(pixels):
            pixels = _run(step.change, pixels, values, compiled=compiled)
        else:
            some = pixels.index_select(0, rows)
            changed = _run(step.change, some, values, compiled=compiled)
            pixels.index_copy_(0, rows, changed.expand(-1, pixels.shape[1], -1, -1))
    return pixels


def _run(change: _Change, pixels: Tensor, values: Tensor, *, compiled: bool) -> Tensor:
    """Do a step; on a GPU the pointwise ones are compiled to one or two kernels each.

    A single crop is not compiled: the compiler would specialize on it in the middle of training.
    """
    wanted = compiled and pixels.device.type in _COMPILED_ON and len(pixels) > 1
    if wanted and change in _POINTWISE:
        try:
            return _compiled(change)(pixels, values)
        # Raised before anything has run. Not imported, as importing torch._dynamo takes a second.
        except torch._dynamo.exc.TorchDynamoException as error:
            log.warning("%s", not_compiled("colours", error))
            _POINTWISE.clear()
    return change(pixels, values)


@functools.cache
def _compiled(change: _Change) -> _Change:
    return torch.compile(change, dynamic=True)  # the number of crops differs from step to step


def _on(device: torch.device, numbers: NDArray[np.generic]) -> Tensor:
    return to_device(torch.from_numpy(numbers), device)


def _planned(params: Params) -> _Plan:
    """What happens to each crop, in order."""
    turns = params["factors"][:, HUE]
    # Pillow truncates the turn to 255ths and then the hue, which loses half a level on average;
    # its circle has 256 levels.
    turns = (np.trunc(turns * 255) - 0.5) / 256
    parts = max(1, math.ceil(6 * abs(turns).max(initial=0)))  # `turn_hue` goes up to a sixth
    factors = params["factors"].copy()
    factors[:, HUE] = turns / parts
    places: list[tuple[NDArray[np.integer], NDArray[np.generic]]] = []

    def add(number: int, chosen: NDArray[np.bool_], values: NDArray[np.generic]) -> None:
        places.append((np.where(chosen, number, NOTHING), values))

    add(_FLIP, params["flip"], params["flip"])
    for slot in params["order"].T:
        own = np.take_along_axis(factors, np.minimum(slot, HUE)[:, None], axis=1)[:, 0]
        places.append((slot, own))
        for _ in range(1, parts):
            add(HUE, slot == HUE, own)
    add(_DROP_COLORS, params["gray"], params["gray"])
    add(_BLUR, params["blur_radius"] > 0, box_radius(params["blur_radius"]))
    add(_SOLARIZE, params["solarize_from"] < NOT_SOLARIZED, params["solarize_from"])
    numbers, values = zip(*places, strict=True)
    return _Plan(np.stack(numbers), np.stack(values).astype(np.float32))


def _steps(plan: _Plan, some: slice | NDArray[np.int64]) -> list[_Step]:
    """What happens to which of some crops, in order."""
    steps: list[_Step] = []
    for numbers, values in zip(plan.numbers[:, some], plan.values[:, some], strict=True):
        for number in sorted({*numbers.tolist()} - {NOTHING}):
            rows = (numbers == number).nonzero()[0]
            steps.append(_Step(_CHANGES[number], rows, values[rows]))
    return steps


def _flip(pixels: Tensor, _: Tensor) -> Tensor:
    return pixels.flip(-1)


def adjust_brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with black (Pillow's ImageEnhance.Brightness); may work in place.

    Args:
        pixels: whole numbers 0..255, float32 (M, C, H, W); likewise in the functions below.
        factor: one factor per crop, (M, 1, 1, 1); 1 changes nothing.
    """
    return pixels.mul_(factor).clamp_(max=255).floor_()


def adjust_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean lightness of the crop (ImageEnhance.Contrast); may work in place."""
    means = pixels.mean((-2, -1), keepdim=True)  # (M, C, 1, 1)
    mean = _lightness(means).add_(0.5).floor_()
    return pixels.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 255).floor_()


def adjust_saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray picture (ImageEnhance.Color); may work in place."""
    gray = _luma(pixels)
    return pixels.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 255).floor_()


def turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by a fraction of the colour circle; may work in place.

    Around the circle a channel is a triangular wave, twice the channel minus the middle one,
    clipped to the range from the lowest to the highest channel. In a full turn it changes by six
    times this range; the other two channels tell whether it rises or falls. Its peaks lie too far
    beyond the clipping to matter.
    Differs: Pillow keeps hue and saturation in 8 bit.

    Args:
        pixels: RGB, as above.
        turn: (M, 1, 1, 1), from -1/6 to 1/6.
    """
    levels = pixels.to(torch.int16)  # moves half as much memory
    channels = red, green, blue = levels.unbind(1)  # (M, H, W), likewise everything below
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    minus_middle = torch.clamp(red, low, high).neg_()
    highest, lowest = torch.maximum(red, high, out=high), torch.minimum(red, low, out=low)
    swing = (highest - lowest).float().mul_(6 * turn[:, 0]).round_().to(torch.int16)
    for i in range(3):  # no writes into views, which the compiler leaves alone
        wave = (channels[i - 1] - channels[i - 2]).sign_().mul_(swing).add_(minus_middle)
        pixels[:, i] = wave.add_(channels[i], alpha=2).clamp_(lowest, highest)
    return pixels


def _drop_colors(pixels: Tensor, _: Tensor) -> Tensor:
    return _luma(pixels)


def _luma(pixels: Tensor) -> Tensor:
    """Lightness (M, 1, H, W), whole numbers."""
    return _lightness(pixels).add_(0.5).floor_()


def _lightness(pixels: Tensor) -> Tensor:
    """Luma of RGB, else the mean of the channels: (M, C, H, W) to (M, 1, H, W)."""
    if pixels.shape[1] != 3:
        return pixels.mean(1, keepdim=True)
    red, green, blue = pixels.unbind(1)
    light: Tensor = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return light[:, None]


def blur(pixels: Tensor, half: Tensor) -> Tensor:
    """Gaussian blur as three box blurs in each direction, as in Pillow.

    A box blur is a matrix product along the rows and along the columns; three of them, with edge
    pixels repeated each time, are its third power. Differs: Pillow rounds after each box blur.

    Args:
        pixels: whole numbers 0..255, float32 (M, C, H, H).
        half: half the width of each box, (M, 1, 1, 1); see `box_radius`.
    """
    count, channels, height, width = pixels.shape
    reach, size = width, width
    if pixels.device.type == "cpu":
        reach = _BLUR_PASSES * (int(half.max()) + 1)
        size = min(width, _BAND + 2 * reach)
    box = _box_blur(half[:, 0], size=size)
    matrix = box @ box @ box
    columns = _blur_lines(matrix, pixels.flatten(1, 2), reach=reach)  # (M, W, C * H)
    rows = _blur_lines(matrix, columns.view(count, width * channels, height), reach=reach)
    blurred = rows.round_().view(count, height, width, channels)
    return blurred.permute(0, 3, 1, 2)


def _blur_lines(matrix: Tensor, lines: Tensor, *, reach: int) -> Tensor:
    """Blur lines (M, N, L), which become columns (M, L, N).

    Away from the edges every row of the matrix is the row above, shifted by a pixel, so a matrix
    (M, S, S) for S pixels serves L >= S as well. Zeros far off the diagonal are left out.
    """
    x = lines.mT
    length, size = x.shape[1], matrix.shape[-1]
    if length == size:
        return matrix @ x
    blurred = torch.empty_like(x, memory_format=torch.contiguous_format)
    for top in range(0, length, _BAND):
        bottom = min(top + _BAND, length)
        first, last = max(0, top - reach), min(length, bottom + reach)
        # Rows of the matrix at its upper edge, at its lower edge, or between them.
        up = 0 if first == 0 else length - size if last == length else first
        band = matrix[:, top - up : bottom - up, first - up : last - up]
        torch.bmm(band, x[:, first:last], out=blurred[:, top:bottom])
    return blurred


def box_radius(sigma: NDArray[np.float32]) -> NDArray[np.float32]:
    """Half the width of a box, three of which have the variance of the Gaussian.

    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering", eq. 2 to 4.
    """
    variance = sigma**2 / _BLUR_PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    half: NDArray[np.float32] = whole + rest / (6 * (variance - (whole + 1) ** 2))
    return half


def _box_blur(radius: Tensor, *, size: int) -> Tensor:
    """Matrices (M, size, size) of box blurs with fractional radius (M, 1, 1), edges repeated."""
    places = torch.arange(size, device=radius.device, dtype=radius.dtype)
    ahead = places[:-1] - places[:, None]
    # The part of the box up to each pixel; beyond an edge the box sees the edge pixel again.
    share = ((ahead + (radius + 1)) / (2 * radius + 1)).clamp_(0, 1)
    return pad(share, (0, 1), value=1.0) - pad(share, (1, 0))


def solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values from the threshold (M, 1, 1, 1) on (ImageOps.solarize)."""
    inverted = (
        (pixels - threshold).add_(1).clamp_(0, 1)
    )  # 1 from the threshold on, for whole numbers
    return pixels.addcmul_(inverted, 255 - 2 * pixels)


# Steps of the jitter have the numbers of `crop_params`.
_FLIP, _DROP_COLORS, _BLUR, _SOLARIZE = range(NOTHING + 1, NOTHING + 5)
_CHANGES: dict[int, _Change] = {
    BRIGHTNESS: adjust_brightness,
    CONTRAST: adjust_contrast,
    SATURATION: adjust_saturation,
    HUE: turn_hue,
    _FLIP: _flip,
    _DROP_COLORS: _drop_colors,
    _BLUR: blur,
    _SOLARIZE: solarize,
}
_POINTWISE: set[_Change] = {
    *(adjust_brightness, adjust_contrast, adjust_saturation, turn_hue, solarize)
}
