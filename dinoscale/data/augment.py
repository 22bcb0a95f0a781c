"""Multi-crop augmentation of DINO v1 on Pillow pictures (Caron et al. 2021, section 3.2).

Two steps: `draw_crop` draws the parameters of one crop, `apply_crop` applies them and is pure.
The pictures equal those of torchvision's functions on Pillow pictures for the same parameters.
Shape letters: C = 3 channels, H, W rows and columns of the global crops, h, w of the local ones.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinoscale.data.seeding import Stream, generator

_ASPECT_RATIO = (3 / 4, 4 / 3)  # width / height before resizing; Szegedy et al. 2015, section 6
_BOX_ATTEMPTS = 10  # torchvision's RandomResizedCrop
_MAX_ASPECT = 16  # of a picture at evaluation; longer ones are cut first (see eval_transform)


@dataclass(frozen=True)
class CropSpec:
    """What distinguishes the kinds of crops.

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
    """What all crops share.

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


@dataclass(frozen=True)
class Jitter:
    """One colour jitter: three factors, the turn of the hue, and the order of the four."""

    order: tuple[int, ...]  # of 0 brightness, 1 contrast, 2 saturation, 3 hue
    brightness: float
    contrast: float
    saturation: float
    hue: float


@dataclass(frozen=True)
class CropParams:
    """Everything that happens to one crop; None and False leave a step out.

    Attributes:
        box: top, left, height, width in pixels of the picture.
        size: pixels after resizing.
        flip: mirror left and right.
        jitter: colours.
        gray: drop the colours.
        blur_radius: standard deviation in pixels.
        solarize_threshold: of 255.
    """

    box: tuple[int, int, int, int]
    size: int
    flip: bool = False
    jitter: Jitter | None = None
    gray: bool = False
    blur_radius: float | None = None
    solarize_threshold: int | None = None


def draw_box(
    rng: np.random.Generator, *, width: int, height: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop: uniform in area, log-uniform in aspect ratio.

    After ten boxes that do not fit, the largest centred box within the ratios is taken.
    Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6, as in torchvision.

    Returns:
        top, left, height, width in pixels; inside the picture, at least 1 x 1.
    """
    log_ratio = math.log(_ASPECT_RATIO[0]), math.log(_ASPECT_RATIO[1])
    for _ in range(_BOX_ATTEMPTS):
        area = width * height * rng.uniform(scale[0], scale[1])
        ratio = math.exp(rng.uniform(log_ratio[0], log_ratio[1]))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width / height < _ASPECT_RATIO[0]:
        h = round(width / _ASPECT_RATIO[0])
    elif width / height > _ASPECT_RATIO[1]:
        w = round(height * _ASPECT_RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def draw_jitter(rng: np.random.Generator, color: ColorSpec) -> Jitter:
    """Draw an order and four strengths (torchvision's ColorJitter)."""
    order = tuple(int(i) for i in rng.permutation(4))
    brightness, contrast, saturation = (
        float(rng.uniform(max(0.0, 1 - strength), 1 + strength))
        for strength in (color.brightness, color.contrast, color.saturation)
    )
    hue = float(rng.uniform(-color.hue, color.hue))
    return Jitter(order, brightness, contrast, saturation, hue)


def draw_crop(
    rng: np.random.Generator, *, width: int, height: int, crop: CropSpec, color: ColorSpec
) -> CropParams:
    """Draw everything that happens to one crop of a picture of this size.

    All values are drawn even where they are not used, so that a probability in the config does not
    change the other steps.
    """
    box = draw_box(rng, width=width, height=height, scale=crop.scale)
    jitter = draw_jitter(rng, color)
    blur_radius = float(rng.uniform(*color.blur_radius))
    flips, jitters, grays, blurs, solarizes = rng.random(5)
    return CropParams(
        box=box,
        size=crop.size,
        flip=bool(flips < color.flip_prob),
        jitter=jitter if jitters < color.jitter_prob else None,
        gray=bool(grays < color.gray_prob),
        blur_radius=blur_radius if blurs < crop.blur_prob else None,
        solarize_threshold=color.solarize_threshold if solarizes < crop.solarize_prob else None,
    )


def apply_crop(image: Image.Image, params: CropParams) -> Image.Image:
    """Cut, resize and change one crop, in the order of the reference.

    Args:
        image: RGB.
        params: of the crop.

    Returns:
        RGB, size x size.
    """
    crop = resized_crop(image, box=params.box, size=params.size)
    if params.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if params.jitter is not None:
        crop = jitter_colors(crop, params.jitter)
    if params.gray:
        crop = crop.convert("L").convert("RGB")
    if params.blur_radius is not None:
        crop = crop.filter(ImageFilter.GaussianBlur(params.blur_radius))
    if params.solarize_threshold is not None:
        crop = ImageOps.solarize(crop, params.solarize_threshold)
    return crop


def resized_crop(image: Image.Image, *, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """Cut the box (top, left, height, width), then resize bicubically to size x size."""
    top, left, height, width = box
    cut = image.crop((left, top, left + width, top + height))
    return cut.resize((size, size), Image.Resampling.BICUBIC)


def jitter_colors(image: Image.Image, jitter: Jitter) -> Image.Image:
    """Change brightness, contrast, saturation and hue in the drawn order."""
    for step in jitter.order:
        if step == 0:
            image = ImageEnhance.Brightness(image).enhance(jitter.brightness)
        elif step == 1:
            image = ImageEnhance.Contrast(image).enhance(jitter.contrast)
        elif step == 2:
            image = ImageEnhance.Color(image).enhance(jitter.saturation)
        else:
            image = turn_hue(image, jitter.hue)
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn the hue by a fraction of the colour circle, -0.5 <= turn <= 0.5.

    Hue has 256 values here; the turn is cut to a whole number of 255ths, as in torchvision.
    """
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255)
    hue = hue.point([(h + shift) % 256 for h in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


class MultiCrop:
    """Two global crops and `num_local` local crops of a picture, each drawn on its own.

    The arguments are those of the config sections crops and augment; see `CropSpec` and
    `ColorSpec`. `blur_probs` and `solarize_probs` are of global crop 1, global crop 2 and the
    local crops.

    Raises:
        ValueError: a number lies outside its range.
    """

    def __init__(
        self,
        *,
        global_size: int = 224,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_size: int = 96,
        local_scale: tuple[float, float] = (0.05, 0.4),
        num_local: int = 8,
        flip_prob: float = 0.5,
        jitter_prob: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        gray_prob: float = 0.2,
        blur_probs: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_radius: tuple[float, float] = (0.1, 2.0),
        solarize_probs: tuple[float, float, float] = (0.0, 0.2, 0.0),
        solarize_threshold: int = 128,
    ):
        if min(global_size, local_size) < 1 or num_local < 0:
            raise ValueError(f"need sizes >= 1: {global_size}, {local_size}, {num_local} crops")
        if not 0 <= hue <= 0.5:
            raise ValueError(f"need 0 <= hue <= 0.5, got {hue}")
        self.global_specs = tuple(
            CropSpec(global_size, global_scale, blur_probs[i], solarize_probs[i]) for i in (0, 1)
        )
        local = CropSpec(local_size, local_scale, blur_probs[2], solarize_probs[2])
        self.local_size = local_size
        self.local_specs = (local,) * num_local
        self.color = ColorSpec(
            flip_prob=flip_prob,
            jitter_prob=jitter_prob,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            gray_prob=gray_prob,
            blur_radius=blur_radius,
            solarize_threshold=solarize_threshold,
        )

    def __call__(
        self, image: Image.Image, *, seed: int, epoch: int, sample: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Cut all crops of one picture; the same numbers always give the same crops.

        Args:
            image: RGB.
            seed: of the run.
            epoch: from 0.
            sample: number of the picture in its source.

        Returns:
            Global crops uint8 (2, C, H, W) and local crops uint8 (num_local, C, h, w).
        """
        crops = []
        for number, spec in enumerate((*self.global_specs, *self.local_specs)):
            rng = generator(seed, Stream.CROPS, epoch, sample, number)
            params = draw_crop(
                rng, width=image.width, height=image.height, crop=spec, color=self.color
            )
            crops.append(_to_array(apply_crop(image, params)))
        if not self.local_specs:
            no_crops = np.empty((0, 3, self.local_size, self.local_size), dtype=np.uint8)
            return np.stack(crops), no_crops
        return np.stack(crops[:2]), np.stack(crops[2:])


def _to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Uint8 (C, H, W) of an RGB picture."""
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def eval_transform(image: Image.Image, *, resize: int, crop: int) -> NDArray[np.uint8]:
    """Resize the short side bicubically, then cut the centre (v1 evaluation, both as torchvision).

    Differs: of pictures longer than 16 times their width only the middle is resized; the centre
    is all that is kept, and the whole could take gigabytes.

    Args:
        image: RGB.
        resize: short side after resizing, in pixels.
        crop: side of the centre square, in pixels; outside the picture it is black.

    Returns:
        uint8 (C, crop, crop).
    """
    image = _shorten(image)
    width, height = image.size
    short = min(width, height)
    if short != resize:  # the long side is cut to a whole number of pixels
        size = (int(resize * width / short), int(resize * height / short))
        image = image.resize(size, Image.Resampling.BICUBIC)
    if crop > min(image.size):
        image = _pad(image, crop)
    left = round((image.width - crop) / 2)
    top = round((image.height - crop) / 2)
    return _to_array(image.crop((left, top, left + crop, top + crop)))


def _shorten(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = _MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    w, h = min(width, longest), min(height, longest)
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


def _pad(image: Image.Image, crop: int) -> Image.Image:
    """Black margins up to crop x crop, the odd pixel at the right and at the bottom."""
    x, y = max(0, crop - image.width), max(0, crop - image.height)
    padded = Image.new("RGB", (image.width + x, image.height + y))
    padded.paste(image, (x // 2, y // 2))
    return padded
