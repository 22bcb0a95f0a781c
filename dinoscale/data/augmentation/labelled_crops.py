"""One random crop of each picture, mirrored half of the time, to train a classifier on.

Shape letters: N pictures of a batch that can be read, C channels, H rows and columns of a crop.
Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6; the probes of Caron et al. 2021
(arXiv:2104.14294) and Oquab et al. 2023 (arXiv:2304.07193) train on nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dinoscale.data.augmentation.crop_params import PARAMS, ColorSpec, CropSpec, Params, draw_params
from dinoscale.data.augmentation.multi_crop import Interpolation, cut_crops
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.loader import Failure, failure, map_in_workers
from dinoscale.data.order.sampler import Draws, StepSampler
from dinoscale.data.seeding import Stream, generator
from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError, UnavailableError

log = logging.getLogger(__name__)

SCALE = (0.08, 1.0)  # area of a crop as a fraction of the picture
FLIP_PROB = 0.5
_UNCOLORED = ColorSpec(
    flip_prob=FLIP_PROB,
    jitter_prob=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    gray_prob=0.0,
    blur_radius=(0.0, 0.0),
    solarize_threshold=256,
)


class LabelledCrops(NamedTuple):
    """A batch of crops, for `color_jitter.finish_crops` to mirror and normalise.

    Attributes:
        crops: uint8 (N, H, H, C).
        params: what was drawn for each, records of `crop_params.PARAMS` (N,).
        labels: int64 (N,).
        ids: numbers of the pictures, int64 (N,).
        unreadable: numbers of the pictures that could not be read, int64.
    """

    crops: Tensor
    params: Params
    labels: Tensor
    ids: Tensor
    unreadable: Tensor


def endless_sampler(size: int, *, batch_size: int, steps: int, seed: int) -> StepSampler:
    """Draw `steps` batches from permutation after permutation of `size` images.

    Every image is drawn once before any is drawn again. A batch may hold the end of one permutation
    and the start of the next, so all batches are full, however few images there are.
    """
    return StepSampler(
        sizes=[size],
        quotas=[steps * batch_size],
        batch_size=batch_size,
        micro_batch_size=batch_size,
        world_size=1,
        seed=seed,
    )


def labelled_crops(
    source: Source,
    *,
    size: int,
    interpolation: Interpolation,
    batch_size: int,
    steps: int,
    seed: int,
    num_workers: int,
    pin_memory: bool = False,
    first_step: int = 0,
) -> Iterator[LabelledCrops]:
    """Yield a batch for each step; what it holds is a function of (source, seed, step).

    Args:
        source: labelled images; damaged ones are left out with a warning.
        size: H in pixels.
        interpolation: how crops are resized.
        batch_size: images of a batch, including unreadable ones.
        steps: number of batches, including those before `first_step`.
        seed: seeds order and crops, >= 0.
        num_workers: worker processes; 0 decodes in this process.
        pin_memory: hand out page-locked memory.
        first_step: begin with the batch of this step.

    Raises:
        DataError: not one image of a batch can be read, or a worker failed.
        UnavailableError: a file cannot be read, which says nothing about its content.
    """
    sampler = endless_sampler(len(source), batch_size=batch_size, steps=steps, seed=seed)
    cropper = _Cropper(source, size=size, interpolation=interpolation, seed=seed)
    requests = (sampler.step(step) for step in range(first_step, steps))
    reported: set[str] = set()
    for batch in map_in_workers(cropper, requests, num_workers=num_workers, pin_memory=pin_memory):
        for reason in set(batch.bad) - reported:
            log.warning("left out an unreadable image: %s", reason)
        reported.update(batch.bad)
        if not len(batch.crops.labels):
            raise DataError(
                f"none of the {batch_size} images of a batch can be read, e.g. {batch.bad[0]}"
            )
        yield batch.crops


class _CroppedBatch(NamedTuple):
    """What a worker returns."""

    crops: LabelledCrops
    bad: list[str]


class _Cropper(Dataset[_CroppedBatch | Failure]):
    """Draws -> _CroppedBatch; runs in the workers."""

    def __init__(self, source: Source, *, size: int, interpolation: Interpolation, seed: int):
        self._source = source
        self._spec = CropSpec(size, SCALE, blur_prob=0.0, solarize_prob=0.0)
        self._interpolation = interpolation
        self._seed = seed

    def __getitem__(self, draws: Draws) -> _CroppedBatch | Failure:
        try:
            return self._batch(draws)
        except Exception as error:
            return failure(error)

    def _batch(self, draws: Draws) -> _CroppedBatch:
        crops, params, read, lost, bad = [], [], [], [], []
        for sample, repeat in zip(draws.ids.tolist(), draws.repeats.tolist(), strict=True):
            try:
                crop, drawn = self._crop(sample, repeat)
            except UnavailableError:
                raise
            except BadSampleError as error:
                lost.append(sample)
                bad.append(str(error))
                continue
            crops.append(crop)
            params.append(drawn)
            read.append(sample)
        labels = self._source.labels
        assert labels is not None
        batch = LabelledCrops(
            torch.from_numpy(np.stack(crops)) if crops else torch.empty(0, dtype=torch.uint8),
            np.concatenate(params) if params else np.empty(0, dtype=PARAMS),
            torch.from_numpy(labels[read].astype(np.int64)),
            torch.tensor(read, dtype=torch.int64),
            torch.tensor(lost, dtype=torch.int64),
        )
        return _CroppedBatch(batch, bad)

    def _crop(self, sample: int, repeat: int) -> tuple[NDArray[np.uint8], Params]:
        """One crop (H, H, C) and what was drawn for it, (1,)."""
        picture = self._source.picture(sample)
        params = draw_params(
            generator(self._seed, Stream.CROPS, repeat, sample),
            width=picture.width,
            height=picture.height,
            specs=[self._spec],
            color=_UNCOLORED,
            colored=False,
        )
        (crop,) = cut_crops(
            picture, params["box"], [self._spec.size], interpolation=self._interpolation
        )
        return crop, params
