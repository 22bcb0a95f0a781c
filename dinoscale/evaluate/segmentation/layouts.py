"""Where PASCAL VOC, ADE20k and Cityscapes keep images and masks, as they are unpacked.

Sources: Everingham et al. 2010 (IJCV), Zhou et al. 2017 (CVPR; `ADEChallengeData2016`), Cordts et
al. 2016 (arXiv:1604.01685) with the class numbers of its published scripts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dinoscale.errors import DataError
from dinoscale.evaluate.dense_probes.target_files import Part
from dinoscale.evaluate.segmentation.index_masks import VOID, MaskRule

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
# Name and number in the files of the 19 classes that are scored.
_CITYSCAPES = {
    **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17},
    **{"traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23},
    **{"person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31},
    **{"motorcycle": 32, "bicycle": 33},
}
_ADE_CLASSES = 150
AS_STORED = MaskRule()


@dataclass(frozen=True)
class Layout:
    """Train and test part of a set with masks, and what its masks mean.

    Attributes:
        train: what a head learns from.
        test: what it is measured on.
        rule: of the masks.
        class_names: of the classes in their order; empty if they are not known.
    """

    train: Part
    test: Part
    rule: MaskRule = AS_STORED
    class_names: tuple[str, ...] = ()


def find_layout(folder: str) -> Layout:
    """The layout of a folder that holds PASCAL VOC, ADE20k or Cityscapes.

    Raises:
        DataError: it holds none of them, or not all of one.
    """
    root = Path(os.path.abspath(os.path.expanduser(folder)))
    layouts: dict[str, Callable[[Path], Layout]] = {
        "JPEGImages": _voc,
        "annotations": _ade,
        "leftImg8bit": _cityscapes,
    }
    for name, layout in layouts.items():
        if (root / name).is_dir():
            return layout(root)
    raise DataError(
        f"{folder} has none of the folders JPEGImages (PASCAL VOC), annotations (ADE20k) and"
        " leftImg8bit (Cityscapes). Name one that has, or images and masks with --train,"
        " --train-masks, --test and --test-masks."
    )


def _voc(root: Path) -> Layout:
    def part(name: str) -> Part:
        lines = _lines(root / "ImageSets" / "Segmentation" / f"{name}.txt")
        images, masks = str(root / "JPEGImages"), str(_folder(root / "SegmentationClass"))
        return Part(images, masks, tuple(f"{line}.jpg" for line in lines))

    rule = MaskRule(num_classes=len(VOC_CLASSES))
    return Layout(part("train"), part("val"), rule, VOC_CLASSES)


def _ade(root: Path) -> Layout:
    def part(name: str) -> Part:
        images, masks = (_folder(root / kind / name) for kind in ("images", "annotations"))
        return Part(str(images), str(masks))

    rule = MaskRule(ignore_zero=True, num_classes=_ADE_CLASSES)
    return Layout(part("training"), part("validation"), rule)


def _cityscapes(root: Path) -> Layout:
    def part(name: str) -> Part:
        images, masks = (_folder(root / kind / name) for kind in ("leftImg8bit", "gtFine"))
        return Part(str(images), str(masks), renames=(("_leftImg8bit", "_gtFine_labelIds"),))

    classes = {number: place for place, number in enumerate(_CITYSCAPES.values())}
    table = tuple(classes.get(number, VOID) for number in range(VOID + 1))
    rule = MaskRule(renumber=table, num_classes=len(_CITYSCAPES))
    return Layout(part("train"), part("val"), rule, tuple(_CITYSCAPES))


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(f"{path} is missing. Unpack the whole set, or name its parts one by one.")
    return path


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Unpack the whole set.") from error
    if not lines:
        raise DataError(f"{path} names no images. Unpack the set again.")
    return lines
