"""The worker's part of DINO v1's multi-crop augmentation (Caron et al. 2021, section 3.2).

A picture is decoded once, and each crop is cut and resized. The changes of its colours are drawn
here and applied in batches on the training device (`color_jitter`), or here with Pillow
(`reference_crops`).
Shape letters: B pictures, V = 2 + n crops of each, C channels, H rows and columns of the global
crops, h of the local ones, G of the Gram network's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from dinoscale.data.augmentation.crop_params import (
    PARAMS,
    ColorSpec,
    CropSpec,
    Params,
    draw_params,
    gram_params,
)
from dinoscale.data.augmentation.reference_crops import reference_crop
from dinoscale.data.decoding.decode import Picture
from dinoscale.data.seeding import Stream, generator

NUM_GLOBAL = 2
Interpolation = Literal["bicubic", "bilinear"]
_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_SHRINKS = (8, 4, 2)  # JPEG files can be decoded at 1 / this
# Pixels of the shrunk picture for each pixel of a crop. On photographs the crops then differ from
# those of the full picture by half of one of 255 levels on average, by one at most.
_MIN_DETAIL = 3.0
_MAX_ASPECT = 16  # of a picture at evaluation; longer ones are cut first (see eval_transform)


class CropArrays(NamedTuple):
    """The crops of B pictures.

    Attributes:
        global_crops: uint8 (2, B, H, H, C).
        local_crops: uint8 (n, B, h, h, C).
        gram_crops: of the boxes of the global crops, uint8 (2, B, G, G, C); (0, B, 0, 0, C) if
            there are none.
        params: what was drawn for each global and local crop, records of `crop_params.PARAMS`
            (2 + n, B).
    """

    global_crops: NDArray[np.uint8]
    local_crops: NDArray[np.uint8]
    gram_crops: NDArray[np.uint8]
    params: Params


class MultiCrop:
    """Two global crops and `num_local` local crops of a picture, each drawn independently.

    The arguments are those of the config sections crops and augment; see `CropSpec` and
    `ColorSpec`. `blur_probs` and `solarize_probs` are for global crop 1, global crop 2 and the
    local crops. With a `gram_size` there are two crops more, of the boxes and flips of the global
    ones, whose colours change with `gram_colors` only. Only pictures of 3 channels have colours:
    for others the jitter changes brightness and contrast alone. With `plain` the colours change
    here, crop by crop, for 1 or 3 channels, instead of later on the device.

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
        gram_size: int | None = None,
        gram_colors: bool = False,
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
        channels: int = 3,
        plain: bool = False,
    ):
        if plain and channels not in (1, 3):
            raise ValueError(f"need 1 or 3 channels for plain crops, got {channels}")
        if min(global_size, local_size) < 1 or num_local < 0:
            raise ValueError(f"need sizes >= 1: {global_size}, {local_size}, {num_local} crops")
        if not 0 <= hue <= 0.5:
            raise ValueError(f"need 0 <= hue <= 0.5, got {hue}")
        global_1, global_2 = (
            CropSpec(global_size, global_scale, blur_probs[i], solarize_probs[i]) for i in (0, 1)
        )
        local = CropSpec(local_size, local_scale, blur_probs[2], solarize_probs[2])
        self.specs = (global_1, global_2, *[local] * num_local)
        self.local_size, self.gram_size = local_size, gram_size or 0
        self._gram_colors = gram_colors
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
        self.channels, self.colored, self.plain = channels, channels == 3, plain

    def __call__(
        self, picture: Picture, into: CropArrays, place: int, *, seed: int, epoch: int, sample: int
    ) -> None:
        """Cut all crops of one picture; the same numbers always give the same crops.

        Args:
            picture: has as many channels as the arrays.
            into: the arrays to write to; Gram crops are cut if there is room for them.
            place: index of the picture in them.
            seed: seed of the run.
            epoch: from 0.
            sample: number of the picture in its source.

        Raises:
            BadSampleError: the picture cannot be decoded; nothing was written.
        """
        params = draw_params(
            generator(seed, Stream.CROPS, epoch, sample),
            width=picture.width,
            height=picture.height,
            specs=self.specs,
            color=self.color,
            colored=self.colored,
        )
        sizes, of_crops = [spec.size for spec in self.specs], params
        if len(into.gram_crops):
            sizes += [self.gram_size] * NUM_GLOBAL
            of_gram = gram_params(
                params[:NUM_GLOBAL],
                magnified=self.gram_size / self.specs[0].size,
                colors=self._gram_colors,
            )
            of_crops = np.concatenate((params, of_gram))
        if self.plain:
            image = to_image(picture.pixels())
            crops = [
                to_pixels(reference_crop(image, row, size=size))
                for row, size in zip(of_crops, sizes, strict=True)
            ]
        else:
            crops = cut_crops(picture, of_crops["box"], sizes)
        into.params[:, place] = params
        views = [*into.global_crops, *into.local_crops, *into.gram_crops]
        for view, crop in zip(views, crops, strict=True):
            view[place] = crop

    def arrays(self, *, count: int, with_gram: bool = True) -> CropArrays:
        """Uninitialized arrays for the crops of `count` pictures, with Gram crops or without."""
        large, small = self.specs[0].size, self.local_size
        gram = self.gram_size if with_gram else 0
        num_local, num_gram = len(self.specs) - NUM_GLOBAL, NUM_GLOBAL if gram else 0
        return CropArrays(
            np.empty((NUM_GLOBAL, count, large, large, self.channels), dtype=np.uint8),
            np.empty((num_local, count, small, small, self.channels), dtype=np.uint8),
            np.empty((num_gram, count, gram, gram, self.channels), dtype=np.uint8),
            np.empty((len(self.specs), count), dtype=PARAMS),
        )


def cut_crops(
    picture: Picture,
    boxes: NDArray[np.int32],
    sizes: Sequence[int],
    *,
    interpolation: Interpolation = "bicubic",
) -> list[NDArray[np.uint8]]:
    """Cut boxes out of a picture and resize each, as Pillow does up to rounding.

    A large JPEG file is decoded at a fraction of its size if every crop still has at least three
    source pixels for each of its own in each direction.

    Args:
        picture: not decoded yet.
        boxes: top, left, height, width of each crop in pixels of the full picture, (V, 4).
        sizes: height and width of each crop after resizing, in pixels.
        interpolation: how boxes are resized; antialiased, as in Pillow.

    Returns:
        uint8 (size, size, C) of each crop.

    Raises:
        BadSampleError: the picture cannot be decoded.
    """
    detail = float((boxes[:, 2:].min(axis=1) / np.asarray(sizes)).min())
    shrink = next((by for by in _SHRINKS if detail >= by * _MIN_DETAIL), 1)
    pixels = picture.pixels(shrink=shrink)
    if pixels.shape[:2] == (picture.height, picture.width):
        pairs = zip(boxes, sizes, strict=True)
        return [_resized(pixels, box, size, interpolation) for box, size in pairs]
    image = to_image(pixels)
    crops = []
    for (top, left, height, width), size in zip(boxes / shrink, sizes, strict=True):
        box = (left, top, left + width, top + height)
        crops.append(to_pixels(image.resize((size, size), _PILLOW[interpolation], box=box)))
    return crops


def _resized(
    pixels: NDArray[np.uint8], box: NDArray[np.int32], size: int, interpolation: Interpolation
) -> NDArray[np.uint8]:
    """Cut and resize one box; torch's 8-bit kernel does what Pillow does, several times as fast."""
    top, left, height, width = box.tolist()
    cut = torch.from_numpy(pixels[None, top : top + height, left : left + width].copy())
    # The strides must be those of channels-last memory, or the kernel packs and unpacks planes.
    resized = F.interpolate(
        cut.permute(0, 3, 1, 2), size=(size, size), mode=interpolation, antialias=True
    )
    crop: NDArray[np.uint8] = resized.permute(0, 2, 3, 1).numpy()[0]
    return crop


def to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """Pillow's image of uint8 (H, W, C), for 1 or 3 channels."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def to_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Uint8 (H, W, C) of an image of mode L or RGB."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def by_plane(
    pixels: NDArray[np.uint8], change: Callable[[Image.Image], Image.Image]
) -> NDArray[np.uint8]:
    """Change uint8 pixels (H, W, C) with Pillow: channel by channel unless C is 1 or 3."""
    channels = pixels.shape[-1]
    parts = [pixels] if channels in (1, 3) else np.split(pixels, channels, axis=-1)
    changed = [to_pixels(change(to_image(part))) for part in parts]
    return changed[0] if len(changed) == 1 else np.concatenate(changed, axis=-1)


def eval_transform(pixels: NDArray[np.uint8], *, resize: int, crop: int) -> NDArray[np.uint8]:
    """Resize the short side bicubically, then cut the centre (v1 evaluation, both as torchvision).

    Differs: of a picture more than 16 times as long as wide only the middle is resized. Only the
    centre is kept, and resizing the whole picture could take gigabytes.

    Args:
        pixels: uint8 (H, W, C).
        resize: short side after resizing, in pixels.
        crop: side of the centre square, in pixels; outside the picture it is black.

    Returns:
        uint8 (C, crop, crop).
    """
    square = by_plane(pixels, partial(_middle, resize=resize, crop=crop))
    return square.transpose(2, 0, 1)


def _middle(image: Image.Image, *, resize: int, crop: int) -> Image.Image:
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
    return image.crop((left, top, left + crop, top + crop))


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
    padded = Image.new(image.mode, (image.width + x, image.height + y))
    padded.paste(image, (x // 2, y // 2))
    return padded
