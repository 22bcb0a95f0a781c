"""Pairs of pictures with the same key points in both: SPair-71k, or a JSON list of pairs.

SPair-71k is a folder with PairAnnotation/SPLIT/*.json and JPEGImages/CATEGORY/NAME.jpg; the key
points of a pair, and the boxes, are in its PairAnnotation, so ImageAnnotation is not read. A list
of other pairs is

    [{"source": "a.jpg", "target": "b.jpg",
      "source_points": [[x, y], ...], "target_points": [[x, y], ...],
      "target_box": [left, top, right, bottom],     may be left out
      "category": "cat"}, ...]                      likewise

with names of pictures below --images, and points in pixels of the upright pictures, from their left
upper edge, in the same order.

Shape letter: K key points.
Source: Min et al. 2019 (arXiv:1908.10543) for SPair-71k.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoscale.errors import ConfigError, DataError

Points = NDArray[np.float64]  # (K, 2): x, y in pixels

_PAIRS, _IMAGES = "PairAnnotation", "JPEGImages"  # folders of SPair-71k
_SPLIT = "test"  # of the published numbers


@dataclass(frozen=True)
class Pair:
    """Two pictures and what they share.

    Attributes:
        where: its annotation, for messages.
        source: path of the first picture.
        target: path of the second.
        source_points: (K, 2) in pixels.
        target_points: (K, 2) in pixels, the same ones.
        target_box: (4,) left, top, right, bottom of the object in pixels; None if not known.
        category: of the object; empty if not known.
    """

    where: str
    source: Path
    target: Path
    source_points: Points
    target_points: Points
    target_box: NDArray[np.float64] | None
    category: str


def read_pairs(
    path: str, *, images: str | None = None, split: str | None = None, limit: int | None = None
) -> list[Pair]:
    """Read all pairs, those of a category after each other.

    Args:
        path: the folder of SPair-71k, or a JSON file.
        images: folder that the names in a JSON file are relative to; None for SPair-71k.
        split: trn, val or test of SPair-71k; None takes test.
        limit: number of pairs, the first ones; None takes all.

    Raises:
        ConfigError: an option does not fit the pairs.
        DataError: they cannot be read, or a picture of one is missing or outside of `images`.
    """
    place = Path(os.path.expanduser(path))
    is_spair = (place / _PAIRS).is_dir()
    if is_spair == (images is not None):
        rule = (
            f"SPair-71k has its own in {_IMAGES}" if is_spair else "name the folder of the pictures"
        )
        raise ConfigError(f"images: of {path}, {rule}")
    if not is_spair and split is not None:
        raise ConfigError(f"split: {path} is not SPair-71k, which has the folder {_PAIRS}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: need at least one pair, got {limit}")
    entries = _of_spair(place, split or _SPLIT) if is_spair else _of_list(place)
    root = place / _IMAGES if images is None else Path(os.path.expanduser(images))
    pairs = [_pair(where, entry, root) for where, entry in islice(entries, limit)]
    if not pairs:
        raise DataError(f"{path}: holds no pairs.")
    _require_pictures(pairs)
    return sorted(pairs, key=lambda pair: pair.category)


def _of_spair(place: Path, split: str) -> Iterator[tuple[str, object]]:
    folder = place / _PAIRS / split
    files = sorted(folder.glob("*.json"))
    if not files:
        names = sorted(each.name for each in folder.parent.iterdir())
        raise DataError(f"{folder}: holds no pairs; there are {', '.join(names) or 'no splits'}.")
    for file in files:
        entry = _read(file)
        try:
            yield str(file), _renamed(entry)
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}: is no pair of SPair-71k ({error} is missing).") from None


def _renamed(entry: Any) -> dict[str, Any]:
    """A pair of SPair-71k with the keys of the list."""
    category = str(entry["category"])
    return {
        "source": f"{category}/{entry['src_imname']}",
        "target": f"{category}/{entry['trg_imname']}",
        "source_points": entry["src_kps"],
        "target_points": entry["trg_kps"],
        "target_box": entry["trg_bndbox"],
        "category": category,
    }


def _of_list(file: Path) -> Iterator[tuple[str, object]]:
    content = _read(file)
    if not isinstance(content, list):
        raise DataError(f"{file}: need a list of pairs; see --help for its layout.")
    for number, entry in enumerate(content):
        yield f"{file}, pair {number}", entry


def _read(file: Path) -> object:
    try:
        content: object = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}). Name the folder of SPair-71k or a JSON "
            "file of pairs."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not JSON ({error}).") from None
    return content


def _pair(where: str, entry: Any, root: Path) -> Pair:
    try:
        points = _points(entry["source_points"], width=2)
        places = _points(entry["target_points"], width=2)
        box = entry.get("target_box")
        pair = Pair(
            where,
            root / entry["source"],
            root / entry["target"],
            points,
            places,
            target_box=None if box is None else _points([box], width=4)[0],
            category=str(entry.get("category", "")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: need source, target, and source_points and target_points as lists of [x, y]"
            f" ({type(error).__name__}: {error})."
        ) from None
    if len(points) != len(places):
        raise DataError(
            f"{where}: has {len(points)} points in the source, {len(places)} in the target."
            " Name those that both show, in the same order."
        )
    _require_below(root, pair)
    if pair.target_box is not None and not (pair.target_box[2:] > pair.target_box[:2]).all():
        raise DataError(f"{where}: the target's box {pair.target_box.tolist()} is empty.")
    return pair


def _require_below(root: Path, pair: Pair) -> None:
    """Pictures must be below their folder: changes of others would not be noticed."""
    for path in (pair.source, pair.target):
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
            raise DataError(
                f"{pair.where}: its picture {path} is not below {root}. Put it there, or give"
                " --images a folder above all pictures, and names relative to that."
            )


def _points(values: Sequence[Sequence[float]], *, width: int) -> Points:
    points = np.array(values, dtype=np.float64).reshape(len(values), width)
    if not math.isfinite(points.sum()):
        raise ValueError("a coordinate is no finite number")
    return points


def _require_pictures(pairs: Sequence[Pair]) -> None:
    """All pictures must be there: without one, the score would be that of other pairs."""
    where: Mapping[Path, str] = {
        p: pair.where for pair in pairs for p in (pair.source, pair.target)
    }
    missing = [path for path in where if not path.is_file()]
    if missing:
        raise DataError(
            f"{where[missing[0]]}: its picture {missing[0]} does not exist ({len(missing)} of"
            f" {len(where)} pictures are missing). Add them, or correct --images."
        )
