"""Features of a set of images: those of a backbone, and raw pixels as a baseline.

Shape letters: N readable images of the source, C channels, H, W pixels, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dinoscale.data.augmentation.multi_crop import by_plane
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.decoding.decode import Picture
from dinoscale.data.loader import eval_batches
from dinoscale.data.sources.source import Source
from dinoscale.data.transfer import to_device
from dinoscale.errors import ConfigError, DataError, NonFiniteError, RunFailedError
from dinoscale.evaluate.across_ranks import over_ranks
from dinoscale.evaluate.feature_cache import (
    CachedSet,
    InFiles,
    Preparation,
    features_key,
    through_cache,
)
from dinoscale.evaluate.progress import bar_options
from dinoscale.runtime import distributed
from dinoscale.runtime.float32 import exact_float32

log = logging.getLogger(__name__)

_Counted = Literal["image", "view"]
_UNITS: dict[_Counted, str] = {"image": "img", "view": "view"}  # of a bar

PART = 2**16  # images of a large set that are extracted and cached at a time
PIXEL_SIDE = 16  # of the thumbnails whose pixels are the baseline


def check_labels(source: Source, *, name: str) -> NDArray[np.int64]:
    """Return the class numbers (N,) of a set in which every image has one.

    Raises:
        DataError: there are no labels, or some are missing.
    """
    labels = source.labels
    if labels is None:
        raise DataError(
            f"{name}: the images have no labels; use one subfolder per class, or .cls members"
        )
    unknown = np.flatnonzero(labels < 0)
    if len(unknown):
        raise DataError(
            f"{name}: {len(unknown)} of {len(labels)} images have no label, the first is "
            f"{source.path(int(unknown[0]))}"
        )
    return labels


def find_device(name: str | None) -> torch.device:
    """Return the named device, or the accelerator if there is one, or the CPU.

    Every measurement calls this: from here on float32 products of this process are exact.

    Raises:
        ConfigError: there is no such device here.
    """
    exact_float32()
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"device: {name!r} cannot be used here ({first})") from error


def extract_features(
    backbone: nn.Module,
    source: Source,
    *,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    device: torch.device | str,
    num_workers: int,
    output_key: str | None = None,
    progress: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Run a backbone over all undamaged images of a labelled source, without augmentation.

    All ranks of a job call it and get the features of the whole set. The backbone is switched to
    eval mode and back. Images are cast to the dtype of its weights.

    Args:
        backbone: takes a list of images (N, C, H, W), returns (N, D).
        source: labelled images; damaged images are left out with a warning.
        resize: short side after the bicubic resize, in pixels.
        crop: side of the center crop, in pixels.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        batch_size: images in one forward.
        device: of the backbone and of the result.
        num_workers: processes that decode; 0 decodes in this one.
        output_key: all that the output depends on besides weights and images (architecture,
            layers, decoder), in words. None does not cache; synthetic sets are never cached.
        progress: draw a bar (`bar_options`).
        on_batch: called after each batch.

    Returns:
        Features (N, D) float32, not normalised, and labels (N,) int64, both on `device`.

    Raises:
        DataError: an image has no label.
        NonFiniteError, RunFailedError: a feature is not finite; a batch needs too much memory.
        UnavailableError: the file of an image cannot be read at all.
    """
    labels = check_labels(source, name="evaluation")
    features, numbers = extract_unlabelled(
        backbone,
        source,
        resize=resize,
        crop=crop,
        mean=mean,
        std=std,
        batch_size=batch_size,
        device=device,
        num_workers=num_workers,
        output_key=output_key,
        progress=progress,
        on_batch=on_batch,
    )
    return features, torch.from_numpy(labels)[numbers.cpu()].to(features.device)


def extract_unlabelled(
    backbone: nn.Module,
    source: Source,
    *,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    device: torch.device | str,
    num_workers: int,
    output_key: str | None = None,
    progress: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Run a backbone over all undamaged images of a source, as `extract_features` does.

    Returns:
        Features (N, D) float32, not normalised, and the numbers of their images in the source,
        (N,) int64, both on `device`.

    Raises:
        NonFiniteError, RunFailedError, UnavailableError: as `extract_features`.
    """
    device = torch.device(device)
    preparation = Preparation(resize, crop, tuple(mean), tuple(std))
    forward = Forward(
        *(backbone, device),
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress and distributed.rank() == 0,
        on_batch=on_batch,
    )
    images = _Images(forward, source, preparation)
    if output_key is None or not isinstance(source, InFiles):
        return over_ranks(images, num_images=len(source), batch_size=batch_size)
    key = partial(features_key, backbone, source, preparation, output_key=output_key, device=device)
    return _cached_in_parts(images, cache(key))


def _cached_in_parts(images: _Images, key: Callable[[], str]) -> tuple[Tensor, Tensor]:
    """Features and numbers of all images, of a large set part by part: those done are kept.

    Batches are the same with and without parts, so where a part ends depends on the batch size: all
    that divide `PART`, as powers of two do, share their parts; with another, all are extracted.
    """
    forward, whole = images.forward, CachedSet(len(images.source))
    part = max(1, PART // forward.batch_size) * forward.batch_size  # so that batches are whole

    def found(first: int, end: int) -> tuple[Tensor, Tensor]:
        return through_cache(
            key if part >= whole.num_images else partial(_key_of_part, key, first, end),
            partial(over_ranks, images, num_images=end, batch_size=forward.batch_size, first=first),
            num_images=end - first,
            device=forward.device,
            part_of=whole,
        )

    if part >= whole.num_images:
        return found(0, whole.num_images)
    rows, filled, numbers = forward.empty(), 0, []
    for first in range(0, whole.num_images, part):
        of_part, some = found(first, min(whole.num_images, first + part))
        numbers.append(some)
        if not len(of_part):
            continue
        if not filled:  # at once: joining the parts would take twice the memory
            shape = whole.num_images, *of_part.shape[1:]
            rows = distributed.together(partial(of_part.new_empty, shape))
        rows[filled : filled + len(of_part)] = of_part
        filled += len(of_part)
    return rows[:filled], torch.cat(numbers)


def _key_of_part(key: Callable[[], str], first: int, end: int) -> str:
    return f"{key()} {first} to {end}"


class Part(NamedTuple):
    """What one batch of images gave: rows (n, ...) or None, their numbers (n,)."""

    rows: Tensor | None
    numbers: Tensor
    seen: int  # images or views, for the bar


@dataclass(frozen=True)
class Forward:
    """How images go through a backbone without gradients, batch by batch.

    Attributes:
        backbone: on the device.
        device: of the rows.
        batch_size: inputs of one forward.
        num_workers: processes that decode.
        progress: draw a bar (`bar_options`).
        on_batch: called after each batch.
    """

    backbone: nn.Module
    device: torch.device
    batch_size: int
    num_workers: int
    progress: bool
    on_batch: Callable[[], None]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, to which images are cast."""
        weight = next(self.backbone.parameters(), None)
        return torch.float32 if weight is None else weight.dtype

    def empty(self, *shape: int) -> Tensor:
        """No rows, of (*shape, D); D is 0 where the backbone does not tell its width."""
        width = int(getattr(self.backbone, "embed_dim", 0))
        return torch.zeros(0, *shape, width, device=self.device)

    def joined(
        self,
        parts: Iterable[Part],
        check: Callable[[], None],
        *,
        empty: Tensor,
        most: int,
        of: _Counted,
        of_each: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Join what the batches give, each computed in eval mode.

        Args:
            parts: computed one by one, as they are asked for.
            check: called after each batch.
            empty: the rows if there are none: a rank's share may be empty, or wholly unreadable.
            most: rows of all parts where every image can be read; memory is taken for as many.
            of: what is counted.
            of_each: how many of them make a row.

        Returns:
            Rows (N, ...), and their numbers (N,), on the device.

        Raises:
            NonFiniteError: a feature is not a finite number.
            RunFailedError: a batch needs more memory than available.
        """
        rows, filled = empty, 0
        numbers = [torch.zeros(0, dtype=torch.int64)]
        bar = tqdm(total=most * of_each, unit=_UNITS[of], **bar_options(shown=self.progress))
        try:
            with bar, eval_mode(self.backbone), torch.no_grad():
                for part in parts:
                    if part.rows is not None:
                        if not filled:  # at once: joining the parts would take twice the memory
                            rows = part.rows.new_empty(most, *part.rows.shape[1:])
                        rows[filled : filled + len(part.rows)] = part.rows
                        filled += len(part.rows)
                        numbers.append(part.numbers)
                    bar.update(part.seen)
                    self.on_batch()
                    check()
            return require_finite(rows[:filled]), torch.cat(numbers).to(self.device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise RunFailedError(
                f"evaluating {self.batch_size} {of}s at once needs more memory than available"
                f" ({str(error).split('. ')[0]}); lower the batch size (eval.batch_size of a run)"
            ) from error


@dataclass(frozen=True)
class _Images:
    """The images of a source, and how they are prepared for a backbone."""

    forward: Forward
    source: Source
    preparation: Preparation

    def __call__(self, ids: NDArray[np.int64], check: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Features of the readable images, and their indices, on the device."""
        forward = self.forward
        parts, empty = self._parts(ids), forward.empty()
        return forward.joined(parts, check, empty=empty, most=len(ids), of="image")

    def _parts(self, ids: NDArray[np.int64]) -> Iterator[Part]:
        forward, preparation = self.forward, self.preparation
        batches = eval_batches(
            self.source,
            ids=ids,
            resize=preparation.resize,
            crop=preparation.crop,
            batch_size=forward.batch_size,
            num_workers=forward.num_workers,
            pin_memory=forward.device.type == "cuda",
        )
        dtype = forward.dtype
        for images, _, numbers in batches:
            moved = to_device(images, forward.device)
            pixels = normalize_images(moved, mean=preparation.mean, std=preparation.std)
            rows = forward.backbone([pixels.to(dtype)]).float()
            yield Part(rows, numbers, len(numbers))


def require_finite(features: Tensor) -> Tensor:
    """Return features, if all of them are finite.

    Raises:
        NonFiniteError: one is not.
    """
    # The extremes are not finite if one value is not, and take no memory beside the features.
    if features.numel() and not torch.stack(torch.aminmax(features)).isfinite().all():
        raise NonFiniteError("the backbone's features are not finite; its weights have diverged")
    return features


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and restore its mode afterwards."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def pixel_features(
    source: Source, *, batch_size: int = 256, num_workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Shrink every whole image to 16 x 16 by area averaging (PIL's BOX), whatever its shape.

    The k-NN accuracy of these pixels, minus the mean image of the bank, is a baseline for learned
    features: what color and layout alone tell about the classes. The ranks share the images.

    Args:
        source: damaged images are left out with a warning.
        batch_size: images that a worker sends at a time.
        num_workers: processes that decode; 0 decodes in this one.

    Returns:
        Pixels (N, 256 C) float32 in 0..1, neither centered nor normalised, and the numbers of
        their images in the source, (N,) int64.

    Raises:
        DataError: no image can be read.
        UnavailableError: the file of an image cannot be read at all.
    """

    def extract(ids: NDArray[np.int64], check: Callable[[], None]) -> tuple[Tensor, Tensor]:
        batches = eval_batches(
            _Thumbnails(source),
            ids=ids,
            resize=PIXEL_SIDE,  # the size of the thumbnails: no further resize
            crop=PIXEL_SIDE,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        rows = [torch.zeros(0, 0)]
        numbers = [torch.zeros(0, dtype=torch.int64)]
        for images, _, of_batch in batches:
            rows.append(images.flatten(1).float() / 255)
            numbers.append(of_batch)
            check()
        return torch.cat(rows[1:] or rows), torch.cat(numbers)

    pixels, numbers = over_ranks(extract, num_images=len(source), batch_size=batch_size)
    if not len(pixels):
        raise DataError(f"none of the {len(source)} images can be read")
    return pixels, numbers


class _Thumbnails:
    """A source whose images are shrunk to 16 x 16."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def path(self, index: int) -> str:
        return self._source.path(index)

    def picture(self, index: int) -> Picture:
        pixels = self._source.picture(index).pixels()
        return Picture.of(by_plane(pixels, _thumbnail), self.path(index))

    @property
    def labels(self) -> NDArray[np.int64] | None:
        return self._source.labels

    @property
    def class_names(self) -> list[str] | None:
        return self._source.class_names


def _thumbnail(image: Image.Image) -> Image.Image:
    return image.resize((PIXEL_SIDE, PIXEL_SIDE), Image.Resampling.BOX)
