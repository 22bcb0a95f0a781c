"""The true objects of images, from masks or from boxes, read before a network starts.

Shape letters: M objects, H, W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.evaluate.any_size import Fit
from dinoscale.evaluate.beside_images import still_there
from dinoscale.evaluate.dense.object_masks import (
    Objects,
    find_masks,
    relative_names,
    report_left_out,
    split_objects,
    usable_images,
)
from dinoscale.evaluate.discovery.boxes import Boxes, check_boxes, find_boxes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Truth:
    """The objects of one image.

    Attributes:
        boxes: (M, 4) in pixels, M at least 1.
        objects: their masks; None if only boxes are known.
    """

    boxes: Boxes
    objects: Objects | None


@dataclass(frozen=True)
class TrueObjects:
    """The images of a set that can be scored.

    Attributes:
        indices: of these images.
        of: gives the objects of one of them; DataError if they have vanished.
        left_out: the other images by reason, ready for JSON.
    """

    indices: list[int]
    of: Callable[[int], Truth]
    left_out: dict[str, object]


@dataclass(frozen=True)
class Annotations:
    """Where the true objects are: in masks or in boxes.

    Attributes:
        masks: folder of masks with the names of the images; None takes the set's own, if `boxes`
            is None too.
        boxes: a folder of VOC's XML files, or a JSON file, see `boxes`.
        indexed: gray masks of 8 bits hold object numbers, see `object_masks.split_objects`.
    """

    masks: str | None = None
    boxes: str | None = None
    indexed: bool = False

    def find(self, source: Source, spec: str, fit: Fit) -> TrueObjects:
        """Find the objects of all images.

        Args:
            source: the images.
            spec: what they were opened from.
            fit: how they become inputs of the network.

        Raises:
            ConfigError: masks and boxes are given.
            DataError: they cannot be read or do not fit, or no image can be scored.
            UnavailableError: a file cannot be read, which says nothing about its content.
        """
        if self.boxes is None:
            return _of_masks(source, spec, fit, masks=self.masks, indexed=self.indexed)
        if self.masks is not None or self.indexed:
            raise ConfigError("discover: give --boxes, or --masks and --indexed, not both")
        return _of_boxes(source, spec, fit, self.boxes)


def _of_masks(
    source: Source, spec: str, fit: Fit, *, masks: str | None, indexed: bool
) -> TrueObjects:
    mask_of = find_masks(source, spec, masks)
    indices, left_out = usable_images(source, mask_of, fit, indexed=indexed)

    def of(index: int) -> Truth:
        mask = still_there(mask_of(index), source.path(index), "mask")
        objects = split_objects(mask, indexed=indexed)
        return Truth(boxes_of_masks(objects), objects)

    return TrueObjects(indices, of, asdict(left_out))


def boxes_of_masks(objects: Objects) -> Boxes:
    """The smallest box around each object, (M, 4)."""
    found = []
    for mask in objects.masks.numpy():
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        found.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return np.array(found, dtype=np.float64)


@dataclass
class _LeftOut:
    """Images that are not scored, by reason, as `path: reason` each."""

    unreadable: list[str] = field(default_factory=list)
    without_boxes: list[str] = field(default_factory=list)


def _of_boxes(source: Source, spec: str, fit: Fit, path: str) -> TrueObjects:
    boxes_of, name = find_boxes(path), relative_names(source, spec)
    found, left_out = dict[int, Boxes](), _LeftOut()
    for index in range(len(source)):
        where = source.path(index)
        try:
            picture = source.picture(index)
            fit.grid(picture.width, picture.height)
        except UnavailableError:  # it says nothing about the image
            raise
        except DataError as error:
            reason = str(error) if where in str(error) else f"{where}: {error}"
            left_out.unreadable.append(reason)
            log.warning("left out %s", reason)
            continue
        boxes = boxes_of(name(index))
        if boxes is None or not len(boxes):
            left_out.without_boxes.append(where)
            continue
        try:
            check_boxes(boxes, width=picture.width, height=picture.height)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        found[index] = boxes
    report_left_out(
        {"cannot be read": left_out.unreadable, "have no box": left_out.without_boxes},
        num_usable=len(found),
        num_images=len(source),
        hint=f"{path} names boxes by the names of the images.",
    )
    return TrueObjects(list(found), lambda index: Truth(found[index], None), asdict(left_out))
