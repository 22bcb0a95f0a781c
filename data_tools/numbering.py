"""One numbering of classes for shards of several folders with numberings of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.files import Files
from data_tools.journal import read_if_there
from dinoscale.data.sources.classes import FILE_NAME, name_key, read_classes
from dinoscale.data.sources.folder import in_order
from dinoscale.errors import DataError

_Names = tuple[str, ...]  # of one class


@dataclass(frozen=True)
class Numbering:
    """Class numbers and their names.

    Attributes:
        labels: (N,) int64, -1 where unknown; None without classes.
        listed: content of the `classes.txt` for them; None if only numbers are known.
        names: number -> name, for a folder, or if the numbers are not those of the shards.
    """

    labels: NDArray[np.int64] | None
    listed: bytes | None = None
    names: Mapping[int, str] | None = None


def numbering_of(source: Files) -> Numbering:
    """Number the classes of a source: a name has one number, wherever its images lie.

    Shards hold only numbers; `classes.txt` beside them names these. If such lists disagree, all
    their classes are renumbered in the order of their names.

    Raises:
        DataError: only some of the shards have a list, a list lacks a number of its shards, or two
            lists give one class different names.
    """
    labels, names = source.labels, source.class_names
    if labels is None or names is not None:
        listed = None if names is None else class_lines([(name,) for name in names])
        return Numbering(labels, listed, dict(enumerate(names or ())) or None)
    folders, place = _folders(source, labels)
    lists = [Path(folder, FILE_NAME) for folder in folders]
    texts = [read_if_there(path.read_bytes, path) for path in lists]
    if len(set(texts)) <= 1:
        return Numbering(labels, next(iter(texts), None))
    bare = [path for path, text in zip(lists, texts, strict=True) if text is None]
    if bare:
        raise DataError(
            f"{bare[0]} is missing, and other shards of this set have a list of classes: nothing"
            " says which number is which class. Add it, or build these shards separately."
        )
    return _joined(labels, place, [read_classes(str(path)) for path in lists], lists)


def _folders(source: Files, labels: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """Folders of the shards with labelled images; for each image the place of its folder, or -1."""
    only = list(dict.fromkeys(os.path.dirname(path) for path in source.files()))
    if len(only) == 1:
        return only, np.where(labels >= 0, 0, -1)
    met: dict[str, int] = {}
    place = np.full(len(labels), -1, dtype=np.int64)
    for index in np.flatnonzero(labels >= 0).tolist():
        folder = os.path.dirname(source.path(index).partition(".tar::")[0])
        place[index] = met.setdefault(folder, len(met))
    return list(met), place


def _joined(
    labels: NDArray[np.int64],
    place: NDArray[np.int64],
    classes: Sequence[Mapping[int, _Names]],
    lists: Sequence[Path],
) -> Numbering:
    names: dict[str, _Names] = {}  # by what tells the classes apart: the first name
    for of_list in classes:
        for called in of_list.values():
            key = name_key(called[0])
            names[key] = max(names.get(key, ()), called, key=len)
    _require_one_name(names, lists)
    number = {name: i for i, name in enumerate(in_order(names))}
    joined = labels.copy()
    for folder, (of_list, path) in enumerate(zip(classes, lists, strict=True)):
        here = place == folder
        new = {old: number[name_key(called[0])] for old, called in of_list.items()}
        lacking = set(np.unique(labels[here]).tolist()) - new.keys()
        if lacking:
            raise DataError(f"{path} names no class {min(lacking)}, which its shards have.")
        joined[here] = [new[old] for old in labels[here].tolist()]
    ordered = [names[name] for name in number]
    return Numbering(joined, class_lines(ordered), {i: c[0] for i, c in enumerate(ordered)})


def _require_one_name(names: Mapping[str, _Names], lists: Sequence[Path]) -> None:
    for key, called in names.items():
        for other in called[1:]:
            if name_key(other) in names and name_key(other) != key:
                raise DataError(
                    f"{', '.join(map(str, lists))}: {other!r} is a class of its own in one of them"
                    f" and another name of {called[0]!r} in another. Name it alike in all."
                )


def class_lines(classes: Sequence[_Names]) -> bytes:
    """`classes.txt`: number, tab, names.

    Raises:
        DataError: a name does not fit a line.
    """
    for name in (name for names in classes for name in names):
        if any(letter in name for letter in "\n\r\t"):
            raise DataError(f"the class {name!r} has a line break or tab in its name; rename it")
    return b"".join(
        b"%d\t%s\n" % (number, os.fsencode("\t".join(names)))
        for number, names in enumerate(classes)
    )
