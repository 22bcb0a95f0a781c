"""Images that have a target, a number for every pixel: all are checked before a network starts.

Shape letters: C channels, H, W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dinoscale.data.augmentation.multi_crop import by_plane
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.loader import Failure, failure, map_in_workers
from dinoscale.data.sources.source import Source
from dinoscale.data.transfer import to_device
from dinoscale.errors import DataError, UnavailableError
from dinoscale.evaluate.beside_images import still_there
from dinoscale.evaluate.dense_probes.target_files import Part
from dinoscale.evaluate.feature_cache import InFiles
from dinoscale.evaluate.overlap import find_overlap
from dinoscale.evaluate.progress import bar_options

log = logging.getLogger(__name__)

Target = NDArray[Any]  # (H, W)


class Targets(Protocol):
    """Reads the targets of images; picklable."""

    @property
    def name(self) -> str:
        """Of one, for messages."""
        ...

    def read(self, source: Source, index: int) -> Target | None:
        """The target of an image; None if it has none.

        Raises:
            DataError: it cannot be used.
        """
        ...

    def path(self, source: Source, index: int) -> str | None:
        """Its file, if it has one of its own."""
        ...

    def summary(self, target: Target) -> NDArray[Any]:
        """Numbers of a target, whose sums over the set are wanted."""
        ...


@dataclass(frozen=True)
class Pairs:
    """The images of a set that have a target.

    Attributes:
        part: what they were opened from.
        source: all images.
        targets: reads their targets.
        indices: of the images that have one, in order.
        without_target: paths of those that have none.
        unreadable: `path: reason` of those that cannot be read.
        total: sum of the summaries of all targets.
    """

    part: Part
    source: Source
    targets: Targets
    indices: NDArray[np.int64]
    without_target: tuple[str, ...]
    unreadable: tuple[str, ...]
    total: NDArray[Any]

    @property
    def about(self) -> dict[str, object]:
        """What was read, ready for JSON."""
        return {
            "spec": self.part.images,
            "targets": self.part.targets,
            "images": len(self.indices),
            "without_target": len(self.without_target),
            "unreadable": len(self.unreadable),
        }

    def with_targets(self, targets: Targets) -> Pairs:
        """The same with another reader."""
        return replace(self, targets=targets)

    def files(self) -> Iterator[str]:
        """All files that were read, in a fixed order; none of synthetic images."""
        if isinstance(self.source, InFiles):
            yield from self.source.files()
        paths = (self.targets.path(self.source, index) for index in self.indices.tolist())
        yield from (path for path in paths if path is not None)


@dataclass(frozen=True)
class Reading:
    """How whole images are read and forwarded.

    Attributes:
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        device: of the network.
        batch_size: images of one size in one forward.
        num_workers: processes that decode.
        progress: draw bars.
    """

    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    batch_size: int
    num_workers: int
    progress: bool

    def normalized(self, images: Tensor) -> Tensor:
        """Images uint8 (N, C, H, W) as inputs of a network, on its device."""
        return normalize_images(to_device(images, self.device), mean=self.mean, std=self.std)


def open_pairs(part: Part, source: Source, targets: Targets, reading: Reading) -> Pairs:
    """Check the targets of all images, and keep the images that have one.

    Args:
        part: what the images were opened from.
        source: the images.
        targets: reads their targets.
        reading: how they are read.

    Raises:
        DataError: a target cannot be used, its shape is not that of its image, or no image has one.
        UnavailableError: a file cannot be read, which says nothing about its content.
    """
    found = map_in_workers(
        _Checks(source, targets),
        range(len(source)),
        num_workers=reading.num_workers,
        pin_memory=False,
    )
    indices, without, unreadable, total = [], [], [], np.zeros(())
    bar = tqdm(found, total=len(source), unit="img", **bar_options(shown=reading.progress))
    for index, checked in enumerate(bar):
        if checked.unreadable:
            unreadable.append(checked.unreadable)
            log.warning("left out %s", checked.unreadable)
        elif checked.summary is None:
            without.append(source.path(index))
        else:
            indices.append(index)
            total = total + checked.summary
    if not indices:
        examples = [*without[:1], *unreadable[:1]]
        raise DataError(
            f"{part.images}: none of {len(source)} images can be read and has a {targets.name},"
            f" e.g. {examples[0]}. A {targets.name} has the name of its image, and the same"
            " subfolders."
        )
    if without:
        said = (part.images, len(without), len(source), targets.name, without[0])
        log.warning("%s: %d of %d images have no %s and are left out, e.g. %s", *said)
    return Pairs(
        *(part, source, targets, np.array(indices)), tuple(without), tuple(unreadable), total
    )


def warn_of_shared_pictures(train: Pairs, test: Pairs) -> None:
    """Log how many pictures of the test set are in the train set too, byte for byte."""
    if train.part.names is not None and test.part.names is not None:
        return  # the lists of one folder, each of which names a picture once
    shared = find_overlap(test.source, train.source)
    if shared.found:
        log.warning(
            "%d of the %d pictures of test that were looked for are in train, byte for byte, as %s:"
            " the score is too high",
            *(shared.found, shared.looked_for, shared.example),
        )


class _Checked(NamedTuple):
    """What was found of one image: why it is unreadable, or the summary of its target."""

    unreadable: str = ""
    summary: NDArray[Any] | None = None


class _Checks(Dataset[_Checked | Failure]):
    """Index -> _Checked; runs in the workers."""

    def __init__(self, source: Source, targets: Targets) -> None:
        self._source, self._targets = source, targets

    def __getitem__(self, index: int) -> _Checked | Failure:
        try:
            return self._checked(index)
        except Exception as error:
            return failure(error)

    def _checked(self, index: int) -> _Checked:
        target = self._targets.read(self._source, index)
        if target is None:
            return _Checked()
        try:
            picture = self._source.picture(index)
        except UnavailableError:
            raise
        except BadSampleError as error:
            return _Checked(unreadable=str(error))
        _require_same_shape(self._source.path(index), picture.width, picture.height, target)
        return _Checked(summary=self._targets.summary(target))


def _require_same_shape(path: str, width: int, height: int, target: Target) -> None:
    """Refuse a target of another aspect ratio; up to a pixel is rounding of a smaller one."""
    rows, columns = target.shape
    by_width = abs(rows - columns * height / width)
    by_height = abs(columns - rows * width / height)
    if min(by_width, by_height) > 1:
        raise DataError(
            f"{path}: the image has {width} x {height} pixels, its target {columns} x {rows}. Both"
            " must show the same, the image upright; their sizes may differ, their shape may not."
        )


def read_target(targets: Targets, source: Source, index: int) -> Target:
    """The target of an image that had one when the set was opened.

    Raises:
        DataError: it has vanished, or cannot be used.
    """
    return still_there(targets.read(source, index), source.path(index), targets.name)


class Whole(NamedTuple):
    """Images of one size, uint8 (N, C, H, W), and the target of each at its own size."""

    images: Tensor
    targets: list[Target]
    indices: list[int]


class Resize(Protocol):
    """Resizes an image; picklable."""

    def __call__(self, image: Image.Image, /) -> Image.Image:
        """The image that a network sees."""
        ...


def whole_images(pairs: Pairs, resize: Resize, reading: Reading) -> Iterator[Whole]:
    """All images of a set in order, consecutive ones of one size together.

    Args:
        pairs: the set.
        resize: of each image.
        reading: how they are read.

    Raises:
        DataError: none can be read.
        UnavailableError: a file cannot be read, which says nothing about its content.
    """
    read = map_in_workers(
        _Reads(pairs.source, pairs.targets, resize),
        pairs.indices.tolist(),
        num_workers=reading.num_workers,
        pin_memory=False,
    )
    held: list[_Read] = []
    used = 0
    number = len(pairs.indices)
    for one in tqdm(read, total=number, unit="img", **bar_options(shown=reading.progress)):
        if one.image is None:
            log.warning("left out %s", one.unreadable)
            continue
        used += 1
        if held and (len(held) == reading.batch_size or _shape(held[0]) != _shape(one)):
            yield _joined(held)
            held = []
        held.append(one)
    if not used:
        raise DataError(f"{pairs.part.images}: none of {number} images can be read")
    yield _joined(held)


class _Read(NamedTuple):
    number: int  # of the image in its set
    image: Tensor | None  # uint8 (C, H, W)
    target: Target
    unreadable: str = ""


def _shape(one: _Read) -> torch.Size | None:
    return None if one.image is None else one.image.shape


def _joined(held: list[_Read]) -> Whole:
    images = [one.image for one in held if one.image is not None]
    return Whole(torch.stack(images), [one.target for one in held], [one.number for one in held])


class _Reads(Dataset[_Read | Failure]):
    """Index -> _Read; runs in the workers."""

    def __init__(self, source: Source, targets: Targets, resize: Resize) -> None:
        self._source, self._targets, self._resize = source, targets, resize

    def __getitem__(self, index: int) -> _Read | Failure:
        try:
            return self._read(index)
        except Exception as error:
            return failure(error)

    def _read(self, index: int) -> _Read:
        target = read_target(self._targets, self._source, index)
        try:
            pixels = self._source.picture(index).pixels()
        except UnavailableError:
            raise
        except BadSampleError as error:
            return _Read(index, None, target, str(error))
        with naming(self._source.path(index)):
            resized = by_plane(pixels, self._resize)
        return _Read(index, torch.from_numpy(resized.transpose(2, 0, 1).copy()), target)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the image in an error that does not."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
