"""Features of augmented views of images, which LiDAR compares within and between images.

Shape letters: n readable images, q views of each, M crops of a forward, C channels, H rows and
columns, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinoscale.data.augmentation.color_jitter import finish_crops
from dinoscale.data.augmentation.multi_crop import MultiCrop
from dinoscale.data.sources.source import Source
from dinoscale.data.transfer import to_device
from dinoscale.evaluate.across_ranks import over_ranks
from dinoscale.evaluate.features import Forward, Part
from dinoscale.evaluate.label_free.views import augmented_views
from dinoscale.runtime import distributed


def view_crops(*, size: int, channels: int) -> MultiCrop:
    """The global crops of pre-training, as published, at another size in pixels."""
    return MultiCrop(global_size=size, num_local=0, channels=channels)


def extract_views(
    backbone: nn.Module,
    source: Source,
    *,
    multi_crop: MultiCrop,
    num_views: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    device: torch.device,
    num_workers: int,
    progress: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """Run a backbone over augmented views of all undamaged images of a source.

    All ranks of a job call it; each runs its share, and all get the features of the whole set. It
    costs `num_views` forwards of an image.

    Args:
        backbone: takes a list of images (M, C, H, H), returns (M, D); in eval mode meanwhile.
        source: the images; damaged ones are left out with a warning.
        multi_crop: its first two crops are drawn; the draws are a function of (image, view).
        num_views: q, of each image.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        batch_size: views in one forward.
        device: of the backbone and of the result.
        num_workers: processes that decode; 0 decodes in this one.
        progress: draw a bar (`bar_options`).
        on_batch: called after each batch, to feed a watchdog.

    Returns:
        Features (n, q, D) float32, not normalised.

    Raises:
        NonFiniteError: a feature is not a finite number.
        RunFailedError: a batch needs more memory than available.
        UnavailableError: the file of an image cannot be read at all.
    """
    at_once = max(1, batch_size // num_views)  # images
    forward = Forward(
        *(backbone, device),
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress and distributed.rank() == 0,
        on_batch=on_batch,
    )
    views = _Views(
        *(forward, source, multi_crop, num_views, tuple(mean), tuple(std)), images_at_once=at_once
    )
    features, _ = over_ranks(views, num_images=len(source), batch_size=at_once)
    return features


@dataclass(frozen=True)
class _Views:
    """The views of the images of a source, and how they are prepared for a backbone."""

    forward: Forward
    source: Source
    multi_crop: MultiCrop
    num_views: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images_at_once: int

    def __call__(self, ids: NDArray[np.int64], check: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Features (n, q, D) of the readable images, and their numbers (n,)."""
        forward = self.forward
        parts, empty = self._parts(ids), forward.empty(self.num_views)
        return forward.joined(
            parts, check, empty=empty, most=len(ids), of="view", of_each=self.num_views
        )

    def _parts(self, ids: NDArray[np.int64]) -> Iterator[Part]:
        batches = augmented_views(
            *(self.source, self.multi_crop, ids),
            num_views=self.num_views,
            batch_size=self.images_at_once,
            num_workers=self.forward.num_workers,
            pin_memory=self.forward.device.type == "cuda",
        )
        for batch in batches:
            rows = None
            if len(batch.ids):
                found = self._features(batch.crops, batch.params)
                rows = found.unflatten(0, (len(batch.ids), self.num_views))
            yield Part(rows, batch.ids, self.num_views * (len(batch.ids) + len(batch.bad)))

    def _features(self, crops: Tensor, params: NDArray[np.void]) -> Tensor:
        """Features (M, D) of crops (M, H, H, C), at most a batch at a time."""
        forward, parts = self.forward, []
        for first in range(0, len(crops), forward.batch_size):
            finished = finish_crops(
                to_device(crops[first : first + forward.batch_size], forward.device),
                params[first : first + forward.batch_size],
                mean=self.mean,
                std=self.std,
                compiled=False,
            )
            parts.append(forward.backbone([finished.to(forward.dtype)]).float())
        return torch.cat(parts)
