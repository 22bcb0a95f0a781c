"""The colours of many crops at once, on the training device.

Every step does to 8-bit pixels what Pillow does, rounding included, so that the pictures are those
of `plain_crops`: whole numbers from 0 to 255, held in float32. Which crop takes which steps was
drawn by the workers and is known without asking the device.
Shape letters: M crops, C channels, H rows and columns of a crop.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from dinoscale.data.crop_params import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NOT_SOLARIZED,
    NOTHING,
    SATURATION,
    Params,
)

log = logging.getLogger(__name__)

# Crops of one pass over memory: on a CPU they should stay in the cache from step to step.
_PASS_BYTES = {"cpu": 2**21}
_DEVICE_PASS_BYTES = 2**29
_COMPILED_ON = {"cuda"}  # a compiler for the CPU may not be there, and takes a minute

_LUMA = (19595 / 2**16, 38470 / 2**16, 7471 / 2**16)  # ITU-R 601-2, as Pillow rounds it
_BLUR_PASSES = 3  # box blurs that make up Pillow's Gaussian
_BAND = 32  # rows of a blur on a CPU that are worked out together


@torch.no_grad()
def finish_crops(
    crops: Tensor, params: Params, *, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Flip, change the colours, blur, solarize and normalise, all as drawn for each crop.

    Args:
        crops: cut and resized, uint8 (M, H, H, C), on the device.
        params: what happens to each, records of PARAMS (M,).
        mean: of each channel, in [0, 1].
        std: of each channel, in [0, 1].

    Returns:
        float32 (M, C, H, H), (x / 255 - mean) / std.
    """
    device = crops.device
    count, height, width, channels = crops.shape
    finished = torch.empty((count, channels, height, width), device=device)
    room = _PASS_BYTES.get(device.type, _DEVICE_PASS_BYTES)
    at_once = min(count, max(1, room // (4 * channels * height * width)))
    pixels = torch.empty((at_once, channels, height, width), device=device)  # used again
    scale, shift = _normalisation(mean, std, device=device)
    # Neighbours should take the same steps, or a step is many small ones.
    similar = np.lexsort(params["order"].T[::-1]) if 1 < at_once < count else np.arange(count)
    for first in range(0, count, at_once):
        some = similar[first : first + at_once]
        work = pixels[: len(some)].copy_(_rows(crops, some).permute(0, 3, 1, 2))
        _change(work, params[some])
        work.mul_(scale).add_(shift)
        if _adjoin(some):
            finished[int(some[0]) : int(some[-1]) + 1] = work
        else:
            finished.index_copy_(0, _on(device, some), work)
    return finished


def _adjoin(rows: NDArray[np.int64]) -> bool:
    return bool((rows[1:] == rows[:-1] + 1).all())


def _rows(x: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """Some rows of x; without a copy where they adjoin."""
    if _adjoin(rows):
        return x[int(rows[0]) : int(rows[-1]) + 1]
    return x.index_select(0, _on(x.device, rows))


def _normalisation(
    mean: Sequence[float], std: Sequence[float], *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and shift (C, 1, 1) that do the same as (x / 255 - mean) / std."""
    both = torch.tensor([[1 / (255 * s), -m / s] for m, s in zip(mean, std, strict=True)])
    scale, shift = both.to(device, non_blocking=True).T
    return scale[:, None, None], shift[:, None, None]


_Change = Callable[[Tensor, Tensor], Tensor]


class _Step(NamedTuple):
    """One change of some of the crops."""

    change: _Change
    rows: NDArray[np.int64]  # of the crops, rising
    values: NDArray[np.float32]  # one for each of them


def _change(pixels: Tensor, params: Params) -> None:
    """Change crops (M, C, H, H) in place, in the order of the reference."""
    steps = _steps(params)
    if not steps:
        return
    # One transfer for all steps: copying each list on its own would keep the host busy.
    all_rows = _on(pixels.device, np.concatenate([step.rows for step in steps]))
    all_values = _on(pixels.device, np.concatenate([step.values for step in steps]))
    sizes = [len(step.rows) for step in steps]
    on_device = zip(all_rows.split(sizes), all_values.split(sizes), strict=True)
    for step, (rows, values) in zip(steps, on_device, strict=True):
        first, last = int(step.rows[0]), int(step.rows[-1])
        together = last - first == len(step.rows) - 1
        some = pixels[first : last + 1] if together else pixels.index_select(0, rows)
        changed = _run(step.change, some, values[:, None, None, None])
        if not together:
            pixels.index_copy_(0, rows, changed)
        elif changed is not some:
            some.copy_(changed)


def _run(change: _Change, pixels: Tensor, values: Tensor) -> Tensor:
    """Do a step; on a GPU the pointwise ones are compiled to one or two kernels each."""
    if pixels.device.type in _COMPILED_ON and change in _POINTWISE:
        try:
            return _compiled(change)(pixels, values)
        except TorchDynamoException as error:  # before anything has run
            log.warning("colours are not compiled, which costs time only: %s", error)
            _POINTWISE.clear()
    return change(pixels, values)


@functools.cache
def _compiled(change: _Change) -> _Change:
    return torch.compile(change, dynamic=True)  # the number of crops differs from step to step


def _on(device: torch.device, numbers: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(numbers).to(device, non_blocking=True)


def _steps(params: Params) -> list[_Step]:
    """What happens to which crops, in order."""
    steps: list[_Step] = []

    def add(change: _Change, chosen: NDArray[np.bool_], values: NDArray[np.generic]) -> None:
        if chosen.any():
            steps.append(_Step(change, chosen.nonzero()[0], values[chosen].astype(np.float32)))

    add(_flip, params["flip"], params["flip"])
    for slot in params["order"].T:
        for step in np.unique(slot).tolist():
            if step != NOTHING:
                add(_JITTER[step], slot == step, params["factors"][:, step])
    add(_drop_colors, params["gray"], params["gray"])
    add(blur, params["blur_radius"] > 0, params["blur_radius"])
    add(solarize, params["solarize_from"] < NOT_SOLARIZED, params["solarize_from"])
    return steps


def _flip(pixels: Tensor, _: Tensor) -> Tensor:
    return pixels.flip(-1)


def adjust_brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with black (Pillow's ImageEnhance.Brightness); may work in place.

    Args:
        pixels: whole numbers 0..255, float32 (M, C, H, W); likewise in the functions below.
        factor: of each crop, (M, 1, 1, 1); 1 changes nothing.
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
    """Turn the hue by a fraction of the colour circle, as Pillow's 8-bit HSV does; in place.

    Hue and saturation have 256 values there; the turn is cut to a whole number of 255ths.
    Comparisons are clamped differences of whole numbers, and temporaries are used again: both
    make it several times as fast on a CPU, where planes should stay in the cache.

    Args:
        pixels: RGB, as above.
        turn: (M, 1, 1, 1), from -0.5 to 0.5.
    """
    red, green, blue = pixels.unbind(1)  # (M, H, W), likewise everything below
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    blue_above = (blue - green).clamp_(0, 1)  # 1 or 0
    red_below = (high - red).clamp_(0, 1)
    value = torch.maximum(red, high)
    middle = torch.minimum(red, high, out=high)
    # Sixths of the circle: the place of the sextant, and how far into it the middle value leads.
    sextant = red_below.mul_(blue_above.mul(12).sub_(2)).sub_(blue_above, alpha=6)
    hue = torch.sub(middle, low, out=blue_above)
    spread = value - torch.minimum(middle, low, out=low)
    hue.div_(torch.clamp(spread, min=1, out=low)).add_(sextant).abs_()
    steps = (turn[:, 0] * 255).trunc_()
    hue.mul_(255 / 6).floor_().mul_(1 / 256).add_(steps.div_(256).add_(1)).frac_()  # modulo 256
    hue.mul_(256 * 6 / 255)
    saturation = spread.mul_(255).div_(torch.clamp(value, min=1, out=low)).floor_()
    fall = saturation.mul_(value).mul_(1 / 255)
    # A channel falls by `fall` on the far side of the circle, and linearly on the way there.
    value.add_(0.5)  # to round
    torch.sub(hue, 3, out=red).abs_().clamp_(1, 2).mul_(fall).add_(value).sub_(fall, alpha=2)
    red.floor_()
    value.add_(fall)
    for channel, peak in ((green, 5), (blue, 1)):
        torch.sub(hue, peak, out=channel).abs_().sub_(3).abs_().clamp_(1, 2).mul_(fall)
        torch.sub(value, channel, out=channel).floor_()
    return pixels


_JITTER: dict[int, _Change] = {
    BRIGHTNESS: adjust_brightness,
    CONTRAST: adjust_contrast,
    SATURATION: adjust_saturation,
    HUE: turn_hue,
}


def _drop_colors(pixels: Tensor, _: Tensor) -> Tensor:
    return _luma(pixels).expand_as(pixels)


def _luma(pixels: Tensor) -> Tensor:
    """Lightness (M, 1, H, W), whole numbers."""
    return _lightness(pixels).add_(0.5).floor_()


def _lightness(pixels: Tensor) -> Tensor:
    """Weighted mean of the channels, plain where they are not RGB: (M, C, H, W) to (M, 1, H, W)."""
    if pixels.shape[1] != 3:
        return pixels.mean(1, keepdim=True)
    red, green, blue = pixels.unbind(1)
    light: Tensor = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return light[:, None]


def blur(pixels: Tensor, radius: Tensor) -> Tensor:
    """Gaussian blur as three box blurs in each direction, as in Pillow.

    A box blur is a matrix along the rows and along the columns; the three of them, with the
    repeated edge pixels between, are its third power. Differs: Pillow rounds after each of them.

    Args:
        pixels: whole numbers 0..255, float32 (M, C, H, H).
        radius: standard deviation in pixels, (M, 1, 1, 1), above 0.
    """
    half = _box_radius(radius[:, 0])
    size = pixels.shape[-1]
    if pixels.device.type != "cpu":
        matrix = _cube(_box_blur(half, size=size))
        return _round(matrix @ (pixels @ matrix.mT))
    reach = _BLUR_PASSES * (int(half.max()) + 1)
    matrix = _cube(_box_blur(half, size=min(size, 2 * (_BAND + reach))))
    columns = _banded(matrix, pixels.mT, reach=reach).mT
    return _round(_banded(matrix, columns, reach=reach))


def _cube(box: Tensor) -> Tensor:
    """Three box blurs after each other, (M, 1, S, S)."""
    return (box @ box @ box)[:, None]


def _round(pixels: Tensor) -> Tensor:
    return pixels.add_(0.5).floor_()


def _banded(matrix: Tensor, x: Tensor, *, reach: int) -> Tensor:
    """Blur (M, C, H, W) along H on a CPU, without the zeros off the diagonal.

    Away from the edges every row of the matrix is the one above it, moved by a pixel; a matrix
    (M, 1, S, S) for S pixels therefore serves H >= S as well.
    """
    height, size = x.shape[-2], matrix.shape[-1]
    if height <= size:
        return matrix @ x
    blurred = torch.empty_like(x, memory_format=torch.contiguous_format)
    for top in range(0, height, _BAND):
        bottom = min(top + _BAND, height)
        first, last = max(0, top - reach), min(height, bottom + reach)
        # Rows of the matrix at its upper edge, at its lower edge, or in the middle between.
        up = 0 if first == 0 else height - size if last == height else first
        band = matrix[..., top - up : bottom - up, first - up : last - up]
        blurred[..., top:bottom, :] = band @ x[..., first:last, :]
    return blurred


def _box_radius(sigma: Tensor) -> Tensor:
    """Half the width of a box, three of which have the variance of the Gaussian.

    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering", eq. 2 to 4.
    """
    variance = sigma.square() / _BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + rest / (6 * (variance - (whole + 1).square()))


def _box_blur(radius: Tensor, *, size: int) -> Tensor:
    """Matrices (M, size, size) of box blurs with fractional radius (M, 1, 1), edges repeated."""
    places = torch.arange(size, device=radius.device, dtype=radius.dtype)
    distance = (places - places[:, None]).abs_()
    matrix = torch.sub(radius + 1, distance).clamp_(0, 1).div_(2 * radius + 1)
    beyond = (1 + matrix[:, :1, 0]) / 2 - matrix[:, 0].cumsum(-1)  # (M, size)
    matrix[:, :, 0] += beyond  # what reaches over the edge sees the edge pixel again
    matrix[:, :, -1] += beyond.flip(-1)
    return matrix


def solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values from the threshold (M, 1, 1, 1) on (ImageOps.solarize)."""
    inverted = (pixels - threshold).add_(1).clamp_(0, 1)  # 1 where it is, for whole numbers
    return pixels.addcmul_(inverted, 255 - 2 * pixels)


_POINTWISE: set[_Change] = {*_JITTER.values(), solarize}
