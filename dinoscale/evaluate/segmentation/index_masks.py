"""Masks that hold a class number in each pixel.

Shape letters: H, W pixels, R, C rows and columns of patches, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError
from dinoscale.evaluate.dense_probes.target_files import TargetFiles

VOID = 255  # pixels that neither train nor score, as in PASCAL VOC, ADE20k and Cityscapes
MEMBER = "mask.png"  # beside KEY.jpg in a shard
BRIGHT = 127  # of a gray mask of one object: brighter pixels belong to it
BRIGHT_16 = 2**15 - 1  # the same of 16 bits
NOT_A_CLASS = -1  # of patches all of whose pixels are void

Classes = NDArray[np.uint8]  # class numbers from 0, or VOID


@dataclass(frozen=True)
class MaskRule:
    """What the numbers in a mask mean.

    Attributes:
        binary: the mask shows one object, class 1: where a gray mask is brighter than half of its
            range, one with a palette or of 1 bit not 0; 255 of a palette is void.
        ignore_zero: 0 is void and classes begin at 1, as in ADE20k; they become 0, 1, ...
        renumber: class of each number 0..255 instead, as for Cityscapes; empty for none.
        num_classes: K; None if it is not known yet.
    """

    binary: bool = False
    ignore_zero: bool = False
    renumber: tuple[int, ...] = field(default=(), repr=False)
    num_classes: int | None = None

    def protocol(self) -> dict[str, object]:
        """All that changes a class, ready for JSON; `renumber` as pairs of number and class."""
        pairs = [[number, to] for number, to in enumerate(self.renumber) if to != VOID]
        return {"binary": self.binary, "ignore_zero": self.ignore_zero, "renumber": pairs}

    def classes(self, mask: Image.Image, path: str) -> Classes:
        """Class numbers (H, W) of a mask as stored; `path` of its image, for messages.

        Raises:
            DataError: it holds colors, fractions, or numbers that are no class.
        """
        numbers = _numbers(mask, path)
        if self.binary:
            numbers = _object(numbers, mask.mode, path)
        highest = int(numbers.max())
        if highest > VOID or int(numbers.min()) < 0:
            raise DataError(
                f"{path}: its mask holds the number {highest}; classes are numbered from 0 to"
                f" {VOID - 1}, and {VOID} is void. Renumber them."
            )
        found = self._table()[numbers.astype(np.uint8)]
        self._check(found, path)
        return found

    def _table(self) -> Classes:
        if self.renumber:
            return np.array(self.renumber, dtype=np.uint8)
        table = np.arange(VOID + 1, dtype=np.uint8)
        if self.ignore_zero:
            table[1:VOID] -= 1
            table[0] = VOID
        return table

    def _check(self, found: Classes, path: str) -> None:
        counted = found[found != VOID]
        if self.num_classes is None or not counted.size or counted.max() < self.num_classes:
            return
        raise DataError(
            f"{path}: its mask holds class {int(counted.max())}, but there are {self.num_classes}"
            f" classes, from 0 to {self.num_classes - 1}. Correct --classes, or the mask"
            " (255 is void; --ignore-zero for classes that begin at 1)."
        )


def _numbers(mask: Image.Image, path: str) -> NDArray[Any]:
    """The numbers of a mask; of one with a palette those, not its colors."""
    if mask.mode in ("P", "L", "1") or mask.mode.startswith("I"):
        return np.asarray(mask)
    if mask.mode == "RGB":
        red, green, blue = (channel.tobytes() for channel in mask.split())
        if red == green == blue:
            return np.asarray(mask.getchannel(0))
    raise DataError(
        f"{path}: its mask has the mode {mask.mode}, and no class numbers. Save it with a palette,"
        " or gray, with a class number in each pixel."
    )


def _object(numbers: NDArray[Any], mode: str, path: str) -> Classes:
    """Class 1 where a mask shows its object, 0 elsewhere, VOID where a palette says so; (H, W).

    Raises:
        DataError: it is not black, and nowhere bright, as masks of numbers are.
    """
    if mode == "P":
        return np.where(numbers == VOID, VOID, numbers > 0).astype(np.uint8)
    wide = mode.startswith("I")  # I;16, or I of 32 bits, as which PIL opens some of 16
    bright = BRIGHT_16 if wide else 0 if mode == "1" else BRIGHT
    highest = int(numbers.max())
    if 0 < highest <= bright:
        raise DataError(
            f"{path}: its mask holds numbers up to {highest}, and with --binary the object is where"
            f" they are above {bright}; leave --binary out for masks of class numbers"
        )
    return (numbers > bright).astype(np.uint8)


@dataclass(frozen=True)
class MaskTargets:
    """Reads class numbers.

    Attributes:
        files: where the masks lie.
        rule: what their numbers mean.
    """

    files: TargetFiles
    rule: MaskRule
    name: str = "mask"

    def read(self, source: Source, index: int) -> Classes | None:
        """As of `Targets`: uint8 (H, W)."""
        mask = self.files.read(source, index)
        return None if mask is None else self.rule.classes(mask, source.path(index))

    def path(self, source: Source, index: int) -> str | None:
        """As of `Targets`."""
        return None if self.files.folder is None else self.files.path(source, index)

    def summary(self, target: Classes) -> NDArray[np.int64]:
        """Pixels of each number, (256,)."""
        return np.bincount(target.ravel(), minlength=VOID + 1)


def patch_classes(classes: Classes, *, rows: int, columns: int) -> NDArray[np.int64]:
    """The class that most pixels of each patch have, void left out; the lowest of equals.

    Args:
        classes: (H, W), of any size; the grid of patches covers all of it.
        rows: R.
        columns: C.

    Returns:
        (R, C), NOT_A_CLASS where all pixels are void.
    """
    height, width = classes.shape
    classes = classes.repeat(-(-rows // height), axis=0).repeat(-(-columns // width), axis=1)
    height, width = classes.shape
    row = np.arange(height) * rows // height
    column = np.arange(width) * columns // width
    patch = row[:, None] * columns + column
    num_classes = VOID + 1
    counts = np.bincount(
        (patch * num_classes + classes).ravel(), minlength=rows * columns * num_classes
    ).reshape(rows * columns, num_classes)[:, :VOID]
    best = np.where(counts.any(axis=1), counts.argmax(axis=1), NOT_A_CLASS)
    return best.reshape(rows, columns)
