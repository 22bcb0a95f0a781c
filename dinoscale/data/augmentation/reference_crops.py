"""The augmentation crop by crop with Pillow: the slow reference of the other modules here.

The pictures equal those of torchvision's functions on Pillow pictures for the same parameters.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinoscale.data.augmentation.crop_params import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NOT_SOLARIZED,
    SATURATION,
    Params,
)


def reference_crop(image: Image.Image, params: Params, *, size: int) -> Image.Image:
    """Cut, resize and change one crop, in the order of the reference.

    Args:
        image: mode RGB or L.
        params: parameters of the crop, one record.
        size: height and width in pixels after resizing.

    Returns:
        Picture of the same mode, size x size.
    """
    crop = resized_crop(image, box=params["box"], size=size)
    if params["flip"]:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    crop = jitter_colors(crop, order=params["order"], factors=params["factors"])
    if params["gray"]:
        crop = crop.convert("L").convert("RGB")
    if params["blur_radius"] > 0:
        crop = crop.filter(ImageFilter.GaussianBlur(float(params["blur_radius"])))
    if params["solarize_from"] < NOT_SOLARIZED:
        crop = ImageOps.solarize(crop, int(params["solarize_from"]))
    return crop


def resized_crop(image: Image.Image, *, box: NDArray[np.int32], size: int) -> Image.Image:
    """Cut the box (top, left, height, width), then resize bicubically to size x size."""
    top, left, height, width = (int(x) for x in box)
    cut = image.crop((left, top, left + width, top + height))
    return cut.resize((size, size), Image.Resampling.BICUBIC)


def jitter_colors(
    image: Image.Image, *, order: NDArray[np.uint8], factors: NDArray[np.float32]
) -> Image.Image:
    """Change brightness, contrast, saturation and hue in the drawn order."""
    for step in order:
        if step == BRIGHTNESS:
            image = ImageEnhance.Brightness(image).enhance(float(factors[step]))
        elif step == CONTRAST:
            image = ImageEnhance.Contrast(image).enhance(float(factors[step]))
        elif step == SATURATION:
            image = ImageEnhance.Color(image).enhance(float(factors[step]))
        elif step == HUE:
            image = turn_hue(image, float(factors[step]))
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn the hue by a fraction of the colour circle, -0.5 <= turn <= 0.5.

    Hue has 256 values here; the turn is truncated to 255ths, as in torchvision.
    """
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255)
    hue = hue.point([(h + shift) % 256 for h in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
