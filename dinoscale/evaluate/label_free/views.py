"""Augmented views of images: the global crops that the network was pre-trained on.

Each picture is decoded once. Views with even numbers are drawn as global crop 1, the others as
global crop 2; the draws are a function of (image, view), whatever the ranks and batches.

Shape letters: n readable images of a batch, q views of each, C channels, H rows and columns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dinoscale.data.augmentation.crop_params import PARAMS, Params, draw_params
from dinoscale.data.augmentation.multi_crop import NUM_GLOBAL, MultiCrop, cut_crops
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.loader import Failure, failure, map_in_workers
from dinoscale.data.seeding import Stream, generator
from dinoscale.data.sources.source import Source
from dinoscale.errors import UnavailableError

log = logging.getLogger(__name__)

SEED = 0


@dataclass(frozen=True, eq=False)
class Views:
    """A batch.

    Attributes:
        crops: uint8 (n q, H, H, C), the views of an image one after another.
        params: what was drawn for each, records of `crop_params.PARAMS` (n q,).
        ids: numbers of the images, int64 (n,).
        bad: errors of the images that could not be read.
    """

    crops: Tensor
    params: Params
    ids: Tensor
    bad: list[str]

    def pin_memory(self) -> Views:
        """Copy the crops to page-locked memory (called by the DataLoader)."""
        return replace(self, crops=self.crops.pin_memory())


def augmented_views(
    source: Source,
    multi_crop: MultiCrop,
    ids: NDArray[np.int64],
    *,
    num_views: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[Views]:
    """Yield the views of images, for `color_jitter.finish_crops` to finish.

    Args:
        source: the images; damaged ones are left out with a warning.
        multi_crop: its first two crops are drawn.
        ids: numbers of the images to take.
        num_views: q.
        batch_size: images of one batch.
        num_workers: worker processes; 0 decodes in this process.
        pin_memory: hand out page-locked memory.

    Raises:
        DataError: a worker failed.
        UnavailableError: a file cannot be read, which says nothing about its content.
    """
    requests = [ids[first : first + batch_size] for first in range(0, len(ids), batch_size)]
    cutter = _Cutter(source, multi_crop, num_views=num_views)
    for batch in map_in_workers(cutter, requests, num_workers=num_workers, pin_memory=pin_memory):
        for reason in batch.bad:
            log.warning("left out an unreadable image: %s", reason)
        yield batch


class _Cutter(Dataset[Views | Failure]):
    """Numbers of images -> Views; runs in the workers."""

    def __init__(self, source: Source, multi_crop: MultiCrop, *, num_views: int) -> None:
        self._source, self._multi_crop = source, multi_crop
        self._specs = [multi_crop.specs[view % NUM_GLOBAL] for view in range(num_views)]

    def __getitem__(self, ids: NDArray[np.int64]) -> Views | Failure:
        try:
            return self._batch(ids)
        except Exception as error:
            return failure(error)

    def _batch(self, ids: NDArray[np.int64]) -> Views:
        crops, params, read, bad = [], [], [], []
        for sample in ids.tolist():
            try:
                cut, drawn = self._cut(sample)
            except UnavailableError:
                raise
            except BadSampleError as error:
                bad.append(str(error))
                continue
            crops += cut
            params.append(drawn)
            read.append(sample)
        return Views(
            torch.from_numpy(np.stack(crops)) if crops else torch.empty(0, dtype=torch.uint8),
            np.concatenate(params) if params else np.empty(0, dtype=PARAMS),
            torch.tensor(read, dtype=torch.int64),
            bad,
        )

    def _cut(self, sample: int) -> tuple[list[NDArray[np.uint8]], Params]:
        """Crops (H, H, C) of one image, and what was drawn for them, (q,)."""
        picture = self._source.picture(sample)
        params = draw_params(
            generator(SEED, Stream.CROPS, 0, sample),
            width=picture.width,
            height=picture.height,
            specs=self._specs,
            color=self._multi_crop.color,
            colored=self._multi_crop.colored,
        )
        return cut_crops(picture, params["box"], [spec.size for spec in self._specs]), params
