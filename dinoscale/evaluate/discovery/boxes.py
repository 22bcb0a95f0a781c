"""Boxes of the objects in images, as they are annotated: XML of PASCAL VOC, or one JSON file.

A folder holds NAME.xml for NAME.jpg, in the same subfolders. A JSON file has the layout of COCO,

    {"images": [{"id": 1, "file_name": "a.jpg"}, ...],
     "annotations": [{"image_id": 1, "bbox": [left, top, width, height], "iscrowd": 0}, ...]}

or is a mapping {"a.jpg": [[left, top, right, bottom], ...]}; names may leave the extension out.
Corners are in pixels of the upright image, from 0 at its left upper edge; those of VOC name the
first and the last pixel of the object, from 1. Crowds of COCO are left out, as in the papers.

Shape letter: M objects.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from dinoscale.errors import DataError

Boxes = NDArray[np.float64]  # (M, 4): left, top, right, bottom

# The boxes of the image of a name; None if it has no annotation.
BoxesOf = Callable[[str], Boxes | None]


def find_boxes(path: str) -> BoxesOf:
    """Return a function that reads the boxes of an image by its relative path.

    Args:
        path: a folder of XML files, or a JSON file.

    Raises:
        DataError: it is neither, or cannot be read.
    """
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        return lambda name: _of_xml((place / name).with_suffix(".xml"))
    found = _of_json(place)
    return lambda name: found.get(name, found.get(str(PurePosixPath(name).with_suffix(""))))


def iou_of_boxes(box: Boxes, others: Boxes) -> Boxes:
    """Intersection over union of one box (4,) with each of M (M, 4): (M,), 0..1."""
    corners = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    both = (corners[1] - corners[0]).clip(0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return np.asarray(both / (areas - both))


def check_boxes(boxes: Boxes, *, width: int, height: int) -> None:
    """Refuse boxes that are empty or not on the image, up to a pixel of rounding.

    Raises:
        DataError: one is.
    """
    wrong = [box for box in boxes.tolist() if not _fits(box, width=width, height=height)]
    if wrong:
        raise DataError(
            f"the box {wrong[0]} (left, top, right, bottom) is empty, or not on the image of "
            f"{width} x {height} pixels. Boxes are those of the image upright, at its own size."
        )


def _fits(box: list[float], *, width: int, height: int) -> bool:
    left, top, right, bottom = box
    return -1 <= left < right <= width + 1 and -1 <= top < bottom <= height + 1


def _of_xml(file: Path) -> Boxes | None:
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from None
    if b"<!" in data.replace(b"<!--", b""):
        raise DataError(f"{file}: declares a document type, which annotations of VOC have none of.")
    try:
        objects = ElementTree.fromstring(data).findall("object/bndbox")
        boxes = [
            [float(box.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax")]
            for box in objects
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file}: is no annotation of VOC ({error}).") from None
    corners = _array(boxes, file)
    corners[:, :2] -= 1  # the first pixel begins at 0
    return corners


def _of_json(file: Path) -> dict[str, Boxes]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}). Name a folder of XML files or a JSON file."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not JSON ({error}).") from None
    try:
        named = _of_coco(content) if "annotations" in content else content
        return {name: _array(boxes, file) for name, boxes in named.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: need COCO's images and annotations, or lists of [left, top, right, bottom] by"
            f" the names of images ({type(error).__name__}: {error})."
        ) from None


def _of_coco(content: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """Corners by file name; images without annotations have none."""
    names = {image["id"]: image["file_name"] for image in content["images"]}
    found: dict[str, list[list[float]]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        left, top, width, height = annotation["bbox"]
        if not annotation.get("iscrowd"):
            found[names[annotation["image_id"]]].append([left, top, left + width, top + height])
    return found


def _array(boxes: list[list[float]], file: Path) -> Boxes:
    array = np.array(boxes, dtype=np.float64).reshape(len(boxes), 4)
    if not math.isfinite(array.sum()):
        raise DataError(f"{file}: a corner of a box is no finite number.")
    return array
