"""The random parameters of each crop: drawn here, applied elsewhere.

The distributions are those of torchvision's transforms in DINO v1 (Caron et al. 2021,
arXiv:2104.14294, section 3.2). Shape letter: V crops of a picture.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BRIGHTNESS, CONTRAST, SATURATION, HUE, NOTHING = range(5)  # steps of a colour jitter

# One record per crop. A step that does not happen has its neutral value, so that all crops of a
# batch are one array.
PARAMS = np.dtype(
    [
        ("box", np.int32, 4),  # top, left, height, width in pixels of the picture
        ("flip", np.bool_),  # mirror left and right
        ("order", np.uint8, 4),  # of the four colour steps, or four times NOTHING
        ("factors", np.float32, 4),  # brightness, contrast, saturation; turn of the hue circle
        ("gray", np.bool_),  # drop the colours
        ("blur_radius", np.float32),  # standard deviation in pixels, 0 without a blur
        ("solarize_from", np.int16),  # values from here on are inverted; NOT_SOLARIZED
    ]
)
NOT_SOLARIZED = 256
Params = NDArray[np.void]  # records of PARAMS

_ASPECT_RATIO = (3 / 4, 4 / 3)  # width / height before resizing; Szegedy et al. 2015, section 6
_BOX_ATTEMPTS = 10  # torchvision's RandomResizedCrop
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.uint8)  # (24, 4)
# Numbers drawn for a crop: area, ratio, top, left of each attempt; order, four factors and radius;
# flip, jitter, gray, blur, solarize.
_BOX_DRAWS = 4 * _BOX_ATTEMPTS
_NUM_DRAWS = _BOX_DRAWS + 6 + 5


@dataclass(frozen=True)
class CropSpec:
    """The settings of one kind of crops.

    Attributes:
        size: height and width in pixels after resizing.
        scale: bounds of the area of the crop as a fraction of the picture.
        blur_prob: probability of the blur.
        solarize_prob: probability of solarisation.
    """

    size: int
    scale: tuple[float, float]
    blur_prob: float
    solarize_prob: float


@dataclass(frozen=True)
class ColorSpec:
    """The settings that all crops share.

    Attributes:
        flip_prob: probability of the horizontal flip.
        jitter_prob: probability of the four colour changes together.
        brightness: factor drawn from [max(0, 1 - x), 1 + x]; likewise contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: turn of the colour circle drawn from [-x, x], as a fraction of it, 0 <= x <= 0.5.
        gray_prob: probability of dropping the colours.
        blur_radius: bounds of the standard deviation in pixels.
        solarize_threshold: values from here on are inverted, of 255.
    """

    flip_prob: float
    jitter_prob: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    gray_prob: float
    blur_radius: tuple[float, float]
    solarize_threshold: int


def draw_params(
    rng: np.random.Generator,
    *,
    width: int,
    height: int,
    specs: Sequence[CropSpec],
    color: ColorSpec,
    colored: bool,
) -> Params:
    """Draw the parameters of all crops of one picture.

    Each crop draws the same count of random numbers, used or not: neither the number of crops nor
    a probability in the config changes the other draws.

    Args:
        rng: generator of this picture.
        width: width of the picture in pixels.
        height: height of the picture in pixels.
        specs: the kind of each crop.
        color: the settings that all crops share.
        colored: whether pictures are RGB; if not, saturation, hue and gray are off.

    Returns:
        Records of PARAMS (V,).
    """
    u = rng.random((len(specs), _NUM_DRAWS))
    params = np.empty(len(specs), dtype=PARAMS)
    scale = np.array([spec.scale for spec in specs])
    params["box"] = draw_boxes(
        u[:, :_BOX_DRAWS].reshape(-1, _BOX_ATTEMPTS, 4), width=width, height=height, scale=scale
    )
    order, brightness, contrast, saturation, hue, radius, *events = u[:, _BOX_DRAWS:].T
    flips, jitters, grays, blurs, solarizes = events
    params["flip"] = flips < color.flip_prob
    params["order"] = np.where(
        (jitters < color.jitter_prob)[:, None], _ORDERS[(order * len(_ORDERS)).astype(int)], NOTHING
    )
    params["factors"] = np.stack(
        [
            _between(brightness, max(0.0, 1 - color.brightness), 1 + color.brightness),
            _between(contrast, max(0.0, 1 - color.contrast), 1 + color.contrast),
            _between(saturation, max(0.0, 1 - color.saturation), 1 + color.saturation),
            _between(hue, -color.hue, color.hue),
        ],
        axis=-1,
    )
    params["gray"] = grays < color.gray_prob
    blur_probs = np.array([spec.blur_prob for spec in specs])
    params["blur_radius"] = np.where(blurs < blur_probs, _between(radius, *color.blur_radius), 0.0)
    solarize_probs = np.array([spec.solarize_prob for spec in specs])
    params["solarize_from"] = np.where(
        solarizes < solarize_probs, color.solarize_threshold, NOT_SOLARIZED
    )
    if not colored:
        params["gray"] = False
        params["order"][params["order"] >= SATURATION] = NOTHING
    return params


def gram_params(params: Params, *, magnified: float, colors: bool) -> Params:
    """The parameters of Gram crops: the boxes and flips of their global crops.

    Args:
        params: of the global crops, records of PARAMS, any shape.
        magnified: side of a Gram crop over that of a global crop.
        colors: keep the changes of the colours, with a blur as wide for the picture; else none.
    """
    own = params.copy()
    if colors:
        own["blur_radius"] *= magnified
        return own
    own["order"], own["factors"], own["gray"] = NOTHING, (1, 1, 1, 0), False
    own["blur_radius"], own["solarize_from"] = 0, NOT_SOLARIZED
    return own


def draw_boxes(
    u: NDArray[np.float64], *, width: int, height: int, scale: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Boxes of random resized crops: uniform in area, log-uniform in aspect ratio.

    The first of ten boxes that fits is taken; if none does, the largest centred box within the
    ratios. Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6, as in torchvision.

    Args:
        u: uniform in [0, 1), (V, 10, 4): area, ratio, top and left of each attempt.
        width: width of the picture in pixels.
        height: height of the picture in pixels.
        scale: bounds of the area as a fraction of the picture, (V, 2).

    Returns:
        top, left, height, width in pixels (V, 4); inside the picture, at least 1 x 1.
    """
    area = width * height * _between(u[..., 0], scale[:, :1], scale[:, 1:])
    ratio = np.exp(_between(u[..., 1], math.log(_ASPECT_RATIO[0]), math.log(_ASPECT_RATIO[1])))
    w = np.rint(np.sqrt(area * ratio))
    h = np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.arange(len(u)), fits.argmax(axis=1)
    w, h = w[first], h[first]
    top = np.floor(u[..., 2][first] * (height - h + 1))
    left = np.floor(u[..., 3][first] * (width - w + 1))
    boxes = np.stack([top, left, h, w], axis=-1).astype(np.int64)
    boxes[~fits.any(axis=1)] = _centred_box(width=width, height=height)
    return boxes


def _centred_box(*, width: int, height: int) -> tuple[int, int, int, int]:
    w, h = width, height
    if width / height < _ASPECT_RATIO[0]:
        h = round(width / _ASPECT_RATIO[0])
    elif width / height > _ASPECT_RATIO[1]:
        w = round(height * _ASPECT_RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _between(
    u: NDArray[np.float64], low: float | NDArray[np.float64], high: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    return low + (high - low) * u
