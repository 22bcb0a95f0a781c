"""Several right classes for each image, from a JSON file beside the images.

The file is ReaL's `real.json`, a list of 50,000 lists of ImageNet's class numbers in the order of
the validation images, which are matched by the number in their names, for a train set of the 1,000
classes of ImageNet; or an object of any images,

    {"a/1.jpg": [3, 7], "a/2.jpg": ["cat"], "a/3.jpg": []}

of paths relative to the folder of the images, or of file names that are there once. A class is a
name or a number, as of the train set; a number only where the classes have numbers of their own,
from folders named by numbers, shards or `classes.txt`. An image without a class is not counted.

Shape letters: N images of the set, n of those that can be read, L classes of an image at most.
Source: Beyer et al. 2020 (arXiv:2006.07159).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.classes import (
    FILE_NAME,
    Classes,
    by_name,
    classes_of,
    name_key,
    same_classes,
    some_names,
)
from dinoscale.data.sources.folder import whole_number
from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError
from dinoscale.evaluate.beside_images import images_root
from dinoscale.runtime.retry import with_retries

log = logging.getLogger(__name__)

NO_CLASS = -2  # fills rows of fewer classes; no answer, which is -1 where there is none
IMAGENET_VAL = 50_000  # images
IMAGENET_CLASSES = 1000
_WORDNET_ID = re.compile(r"n\d{8}")
# SHA-256 of the WordNet ids of ImageNet's classes, sorted, a line each: their order is that of the
# numbers, and other sets of 1000 ids, as parts of ImageNet-21k, have another.
_IMAGENET_IDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
_LEAST_SHARE = 0.5  # ReaL keeps the own class of about 9 of 10 images, a wrong numbering of few
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})(?!\d)")  # maybe _n01440764 before .JPEG


@dataclass(frozen=True, eq=False)
class LabelLists:
    """The right classes of the images of a set.

    Attributes:
        rows: (N, L) int64, L > 0, numbers of classes of the train set, then `NO_CLASS`.
        sha256: of the file.
        own_class_share: of the images with a class in the file, that whose own class, as of their
            folder, is among these, 0 to 1; None where they have none of their own.
    """

    rows: Tensor
    sha256: str
    own_class_share: float | None = None

    def of(self, numbers: Tensor) -> Tensor:
        """Classes (n, L) of images by their numbers (n,), on the device of these."""
        return self.rows.to(numbers.device)[numbers]


def with_a_class(labels: Tensor) -> Tensor:
    """Which images are counted, (n,) bool of labels (n, L).

    Raises:
        DataError: none of them.
    """
    counted = (labels >= 0).any(1)
    if not counted.any():
        raise DataError("labels: none of the images that can be read has one; all lists are empty")
    if left_out := len(counted) - int(counted.sum()):
        log.info("%d of %d images without a label are not counted", left_out, len(counted))
    return counted


def read_label_lists(path: str | Path, source: Source, spec: str, classes: Classes) -> LabelLists:
    """Read the right classes of the images of a set.

    Args:
        path: the JSON file.
        source: the images; classes of their own are compared with those of the file.
        spec: what they were opened from.
        classes: of the train set.

    Raises:
        DataError: the file cannot be read or contradicts itself, names a class that the train set
            lacks, or has no entry for an image; it is ReaL's, and the classes of the train set are
            not known to be those of ImageNet, or are not those of the images.
    """
    data = with_retries(partial(_bytes_of, path), f"the labels {path}")
    try:
        content = json.loads(data, object_pairs_hook=partial(_without_repeats, path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON of labels ({error}).") from error
    if not isinstance(content, list | dict):
        raise DataError(f"{path}: need a list as ReaL's real.json, or an object by image name.")
    images = _images(source, spec)
    if isinstance(content, list):
        entries, keys = _of_imagenet(path, content), _imagenet_keys(path, images)
        by_number = _imagenet_classes(path, classes)
    else:
        entries, keys = content, _keys(path, content, images)
        by_number = {said: number for number, said in classes.numbers.items()}
    numbers = dict(_numbered(path, entries, classes, by_number))
    rows = _padded([numbers[key] for key in keys])
    share = _own_class_share(rows, source, classes)
    if isinstance(content, list) and share is not None:
        _require_own_classes(path, share)
    return LabelLists(
        rows,
        hashlib.sha256(data).hexdigest(),
        share,
    )


def _bytes_of(path: str | Path) -> bytes:
    with open(os.path.expanduser(path), "rb") as file:
        return file.read()


def _without_repeats(path: str | Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise DataError(f"{path}: has {key!r} twice. Remove one entry.")
    return found


def _images(source: Source, spec: str) -> list[str]:
    """Paths of the images, relative to their folder; of shards, names of the members."""
    paths = [source.path(number) for number in range(len(source))]
    if isinstance(source, TarSource):
        return [path.partition("::")[2] for path in paths]
    root = images_root(source, spec)
    return [os.path.relpath(path, root) for path in paths]


def _imagenet_key(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def _of_imagenet(path: str | Path, content: list[object]) -> dict[str, object]:
    """A list, by the names of ImageNet's images."""
    if len(content) != IMAGENET_VAL:
        raise DataError(
            f"{path}: a list has the labels of the {IMAGENET_VAL} validation images of ImageNet,"
            f" this one has {len(content)} entries. Load it again; of other images, write an"
            " object, IMAGE: [CLASSES]."
        )
    return {_imagenet_key(number): labels for number, labels in enumerate(content, start=1)}


def _imagenet_keys(path: str | Path, images: Sequence[str]) -> list[str]:
    """Names in ImageNet of images by the number in their own names.

    Names that are mere numbers may be of any images, unless they are those of all 50,000.
    """
    names = [os.path.basename(image) for image in images]
    bare = [whole_number(os.path.splitext(name)[0]) for name in names]
    if len(bare) == IMAGENET_VAL and {*bare} == {*range(1, IMAGENET_VAL + 1)}:
        return [_imagenet_key(number) for number in bare if number is not None]
    first: dict[int, str] = {}
    for image, name in zip(images, names, strict=True):
        found = _NUMBERED.match(name)
        number = int(found[1]) if found else 0
        if not 1 <= number <= IMAGENET_VAL:
            raise DataError(
                f"{path} is a list by the numbers of ImageNet's validation images, and the image"
                f" {image} is not named as one of them, such as {_imagenet_key(1)}. Keep these"
                " names, or write an object, IMAGE: [CLASSES]."
            )
        if number in first:
            raise DataError(
                f"{path}: the images {first[number]} and {image} have the same number. Remove one."
            )
        first[number] = image
    return [_imagenet_key(number) for number in first]


def _keys(path: str | Path, entries: Mapping[str, object], images: Sequence[str]) -> list[str]:
    """The entry of each image: by its path or, if that is there once, by its name."""
    paths, names = Counter(images), Counter(map(os.path.basename, images))
    keys, missing = list[str](), list[str]()
    for image in images:
        name = os.path.basename(image)
        of_image = [image] if name in paths else [image, name]
        found = [key for key in of_image if key in entries]
        if len(found) > 1:
            raise DataError(f"{path}: {image!r} and {name!r} are one image. Remove one entry.")
        if found and (paths[image] > 1 or (found[0] != image and names[name] > 1)):
            raise DataError(
                f"{path}: {found[0]!r} is the name of several images. Name each by its path in the"
                " folder."
            )
        keys += found
        missing += [] if found else [image]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DataError(
            f"{path}: no labels of the image {missing[0]}{others}. Add them; an empty list leaves"
            " an image out."
        )
    if unused := len(entries) - len(keys):
        log.warning("%s: %d entries are of no image of the set", path, unused)
    return keys


def _imagenet_classes(path: str | Path, classes: Classes) -> dict[int, int]:
    """The train set's number of each of ImageNet's classes, by its number in ImageNet.

    Numbers are trusted where no class has a WordNet id: those of folders named by them, of shards
    and of `classes.txt`. The order of folders with other names is no numbering.
    """
    ids = {
        name: number
        for number, names in classes.names.items()
        for name in names
        if _WORDNET_ID.fullmatch(name)
    }
    by_number = {said: number for number, said in classes.numbers.items()}
    if len({*ids.values()}) == len(classes.present) == IMAGENET_CLASSES:
        lines = "\n".join(sorted(ids))
        if hashlib.sha256(lines.encode()).hexdigest() == _IMAGENET_IDS:
            return {said: ids[name] for said, name in enumerate(sorted(ids))}
    elif not ids and by_number.keys() == {*range(IMAGENET_CLASSES)}:
        return by_number
    raise DataError(
        f"{path} is a list by the numbers of ImageNet's {IMAGENET_CLASSES} classes, and nothing"
        f" says that the {len(classes.present)} classes of train are these:"
        f" {some_names(map(classes.shown, classes.present))}. Name its folders by all the WordNet"
        f" ids, such as n01440764, or number its classes 0 to 999 as ImageNet does in {FILE_NAME}."
    )


def _own_class_share(rows: Tensor, source: Source, classes: Classes) -> float | None:
    """Of images with a class in rows (N, L), the share of those whose own class is among these."""
    labels, counted = source.labels, (rows >= 0).any(1)
    if labels is None or (labels < 0).any() or not counted.any():
        return None
    try:
        same = same_classes(classes, classes_of(source, labels))
    except DataError as error:
        log.warning("the own classes of the images are not compared with their labels: %s", error)
        return None
    own = torch.tensor([same[number] for number in labels.tolist()])
    return float((rows == own[:, None]).any(1)[counted].double().mean())


def _require_own_classes(path: str | Path, share: float) -> None:
    if share < _LEAST_SHARE:
        raise DataError(
            f"{path}: only {100 * share:.1f} % of the images have their own class among their"
            " labels, and about 90 % have in ImageNet: the classes of train are numbered in another"
            " way. Name folders by WordNet ids, such as n01440764, or number the classes 0 to 999"
            f" as ImageNet does in {FILE_NAME}."
        )


def _numbered(
    path: str | Path,
    entries: Mapping[str, object],
    classes: Classes,
    by_number: Mapping[int, int],
) -> Iterator[tuple[str, list[int]]]:
    """Entries with the train set's numbers of their classes, each class once.

    All entries are read, also those of no image: where the numbers of the file, which `by_number`
    has the train set's of, are not those of the train set, some of them are too high.
    """
    names = by_name(classes.names)

    def number_of(said: object) -> int | None:
        if isinstance(said, str):
            return names.get(name_key(said))
        return by_number.get(said) if type(said) is int else None  # no bool

    for key, said in entries.items():
        if not isinstance(said, list):
            raise DataError(f"{path}: {key}: need a list of classes, got {said!r:.80}.")
        found = {}
        for one in said:
            number = number_of(one)
            if number is None:
                as_there = "named or numbered" if by_number else "named"
                raise DataError(
                    f"{path}: {key}: {one!r:.80} is no class of train, which has"
                    f" {some_names(map(classes.shown, classes.present))}. Name classes as they are"
                    f" {as_there} there."
                )
            found[number] = True
        yield key, list(found)


def _padded(labels: Sequence[Sequence[int]]) -> Tensor:
    """Rows of equal length (N, L)."""
    rows = torch.full((len(labels), max(1, *map(len, labels))), NO_CLASS)
    for row, of_one in zip(rows, labels, strict=True):
        row[: len(of_one)] = torch.tensor(of_one, dtype=torch.int64)
    return rows
