"""Random crops of images with their targets: resized, cut and mirrored together.

Shape letters: N images of a batch, C channels, H, W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinoscale.data.augmentation.labelled_crops import FLIP_PROB, endless_sampler
from dinoscale.data.augmentation.multi_crop import by_plane
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.loader import Failure, failure, map_in_workers
from dinoscale.data.order.sampler import Draws
from dinoscale.data.seeding import Stream, generator
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.evaluate.dense_probes.pairs import Pairs, Target, naming, read_target

log = logging.getLogger(__name__)

MAX_PIXELS = 2**26  # of a resized image: 8192 x 8192


@dataclass(frozen=True)
class CropRule:
    """How crops are drawn.

    Attributes:
        height: H in pixels.
        width: W in pixels.
        size: short side of an image after the resize, in pixels, times a ratio; None keeps images
            as they are.
        ratio: lowest and highest, drawn uniformly.
    """

    height: int
    width: int
    size: int | None
    ratio: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.ratio
        sizes = (self.height, self.width, *([] if self.size is None else [self.size]))
        if min(sizes) < 1 or not 0 < low <= high:
            raise ConfigError(
                f"need sizes of at least 1 pixel and 0 < low <= high ratio, got {sizes} and"
                f" {[*self.ratio]}"
            )


@dataclass(frozen=True)
class ResizeShort:
    """Resize the short side to `size` pixels, bicubically; None keeps images as they are."""

    size: int | None

    def __call__(self, image: Image.Image, /) -> Image.Image:
        """As of `Resize`."""
        width, height = resized(*image.size, size=self.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)


def resized(width: int, height: int, *, size: float | None) -> tuple[int, int]:
    """Width and height after the short side was resized to `size` pixels, rounded.

    Raises:
        DataError: the image is so long that it would become too large.
    """
    scale = 1.0 if size is None else size / min(width, height)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    if wide * high > MAX_PIXELS:
        raise DataError(
            f"{width} x {height} pixels become {wide} x {high}, more than {MAX_PIXELS}. Crop the"
            " image, or choose a smaller --size."
        )
    return wide, high


class PairCrops(NamedTuple):
    """A batch of crops.

    Attributes:
        images: uint8 (N, C, H, W).
        inside: bool (N, H, W), false where the crop is larger than the image.
        targets: (N, H, W).
    """

    images: Tensor
    inside: Tensor
    targets: Tensor


def pair_crops(
    pairs: Pairs,
    rule: CropRule,
    *,
    fill: float,
    batch_size: int,
    steps: int,
    first_step: int,
    seed: int,
    num_workers: int,
) -> Iterator[PairCrops]:
    """Yield a batch for each step; what it holds is a function of (set, seed, step).

    Args:
        pairs: the set.
        rule: how crops are drawn.
        fill: target outside of an image.
        batch_size: images of a batch, including unreadable ones.
        steps: number of batches, including those before `first_step`.
        first_step: begin with the batch of this step.
        seed: seeds order and crops, >= 0.
        num_workers: worker processes; 0 decodes in this process.

    Raises:
        DataError: not one image of a batch can be read, or a worker failed.
        UnavailableError: a file cannot be read, which says nothing about its content.
    """
    sampler = endless_sampler(len(pairs.indices), batch_size=batch_size, steps=steps, seed=seed)
    requests = (sampler.step(step) for step in range(first_step, steps))
    cropper = _Cropper(pairs, rule, fill=fill, seed=seed)
    reported: set[str] = set()
    for batch in map_in_workers(cropper, requests, num_workers=num_workers, pin_memory=False):
        for reason in set(batch.bad) - reported:
            log.warning("left out an unreadable image: %s", reason)
        reported.update(batch.bad)
        if batch.crops is None:
            raise DataError(
                f"none of the {batch_size} images of a batch can be read, e.g. {batch.bad[0]}"
            )
        yield batch.crops


class _Batch(NamedTuple):
    crops: PairCrops | None
    bad: list[str]


class _Cropper(Dataset[_Batch | Failure]):
    """Draws -> _Batch; runs in the workers."""

    def __init__(self, pairs: Pairs, rule: CropRule, *, fill: float, seed: int) -> None:
        self._source, self._targets, self._indices = pairs.source, pairs.targets, pairs.indices
        self._rule, self._fill, self._seed = rule, fill, seed

    def __getitem__(self, draws: Draws) -> _Batch | Failure:
        try:
            return self._batch(draws)
        except Exception as error:
            return failure(error)

    def _batch(self, draws: Draws) -> _Batch:
        crops, bad = [], []
        for place, repeat in zip(draws.ids.tolist(), draws.repeats.tolist(), strict=True):
            index = int(self._indices[place])
            try:
                pixels = self._source.picture(index).pixels()
            except UnavailableError:
                raise
            except BadSampleError as error:
                bad.append(str(error))
                continue
            target = read_target(self._targets, self._source, index)
            rng = generator(self._seed, Stream.CROPS, repeat, index)
            with naming(self._source.path(index)):
                crops.append(cut_pair(pixels, target, self._rule, rng, fill=self._fill))
        if not crops:
            return _Batch(None, bad)
        images, inside, targets = (torch.from_numpy(np.stack(x)) for x in zip(*crops, strict=True))
        return _Batch(PairCrops(images.permute(0, 3, 1, 2).contiguous(), inside, targets), bad)


def cut_pair(
    pixels: NDArray[np.uint8],
    target: Target,
    rule: CropRule,
    rng: np.random.Generator,
    *,
    fill: float,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], Target]:
    """Cut a random crop of an image and of its target, which may have another size.

    The image is resized bicubically, the target by nearest neighbour.

    Args:
        pixels: uint8, (height, width, C).
        target: uint8 or float32, of the same shape.
        rule: how the crop is drawn.
        rng: draws it.
        fill: target outside of the image.

    Returns:
        uint8 (H, W, C); bool (H, W), true inside of the image; target (H, W).
    """
    ratio = rng.uniform(*rule.ratio)
    size = resized(
        *(pixels.shape[1], pixels.shape[0]), size=None if rule.size is None else rule.size * ratio
    )
    left, wide = _place(size[0], rule.width, rng)
    top, high = _place(size[1], rule.height, rng)
    box = (left, top, left + wide, top + high)
    image = by_plane(pixels, lambda one: _cut(one, size, box, Image.Resampling.BICUBIC))
    cut = np.asarray(_cut(Image.fromarray(target), size, box, Image.Resampling.NEAREST))
    crop = np.zeros((rule.height, rule.width, pixels.shape[2]), dtype=np.uint8)
    inside = np.zeros((rule.height, rule.width), dtype=np.bool_)
    numbers = np.full((rule.height, rule.width), fill, dtype=target.dtype)
    crop[:high, :wide], inside[:high, :wide], numbers[:high, :wide] = image, True, cut
    if rng.random() < FLIP_PROB:
        crop, inside, numbers = (np.ascontiguousarray(x[:, ::-1]) for x in (crop, inside, numbers))
    return crop, inside, numbers


def _place(length: int, wanted: int, rng: np.random.Generator) -> tuple[int, int]:
    """First pixel and number of pixels of a crop along one side."""
    taken = min(length, wanted)
    return int(rng.integers(0, length - taken, endpoint=True)), taken


def _cut(
    image: Image.Image,
    size: tuple[int, int],
    box: Sequence[int],
    how: Image.Resampling,
) -> Image.Image:
    left, top, right, bottom = box
    return image.resize(size, how).crop((left, top, right, bottom))
