"""Images of a set, prepared for a backbone, with their names and sizes.

Shape letters: B readable images of a batch, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dinoscale.data.augmentation.multi_crop import eval_transform
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.loader import Failure, failure, map_in_workers
from dinoscale.data.sources.source import Source
from dinoscale.errors import UnavailableError


@dataclass(frozen=True)
class Unreadable:
    """An image that was left out."""

    number: int  # in the set
    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Pictures:
    """A batch.

    Attributes:
        images: uint8 (B, C, crop, crop).
        numbers: of the images in their set.
        names: where each lies, as the set says it.
        sizes: height and width of each in its file, upright, in pixels.
        unreadable: what was left out.
    """

    images: Tensor
    numbers: list[int]
    names: list[str]
    sizes: list[tuple[int, int]]
    unreadable: list[Unreadable]

    def pin_memory(self) -> Pictures:
        """Copy the images to page-locked memory (called by the DataLoader)."""
        return replace(self, images=self.images.pin_memory())


def pictures(
    source: Source,
    requests: Iterable[range],
    *,
    resize: int,
    crop: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Pictures]:
    """Yield a batch for each request, a range of numbers of images.

    Args:
        source: the images.
        requests: taken as far as the workers are ahead.
        resize: short side after resizing, in pixels.
        crop: side of the centre crop, in pixels.
        num_workers: worker processes; 0 decodes in this process.
        pin_memory: hand out page-locked memory.

    Raises:
        DataError: a worker failed.
        UnavailableError: a file cannot be read, which says nothing about its content.
    """
    prepare = _Prepare(source, resize=resize, crop=crop)
    return map_in_workers(prepare, requests, num_workers=num_workers, pin_memory=pin_memory)


class _Prepare(Dataset[Pictures | Failure]):
    """Numbers of images -> Pictures; runs in the workers."""

    def __init__(self, source: Source, *, resize: int, crop: int) -> None:
        self._source, self._resize, self._crop = source, resize, crop

    def __getitem__(self, numbers: range) -> Pictures | Failure:
        try:
            return self._batch(numbers)
        except Exception as error:
            return failure(error)

    def _batch(self, numbers: range) -> Pictures:
        images: list[NDArray[np.uint8]] = []
        batch = Pictures(torch.empty(0, dtype=torch.uint8), [], [], [], [])
        for number in numbers:
            try:
                picture = self._source.picture(number)
                pixels = picture.pixels()
            except UnavailableError:  # without it, the features would be those of another set
                raise
            except BadSampleError as error:
                lost = Unreadable(number, self._source.path(number), error.reason)
                batch.unreadable.append(lost)
                continue
            images.append(eval_transform(pixels, resize=self._resize, crop=self._crop))
            batch.numbers.append(number)
            batch.names.append(picture.path)
            batch.sizes.append((pixels.shape[0], pixels.shape[1]))
        return replace(batch, images=torch.from_numpy(np.stack(images))) if images else batch
