"""The names of the classes of a set, and which classes of two sets are the same.

A folder names its classes; shards number them, and `classes.txt` beside the shards, or in the
folder, says which number has which names. Names that are all whole numbers are numbers: `10` is
class 10, whatever the other folders are.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.folder import FolderSource, whole_number
from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError
from dinoscale.runtime.retry import path_exists, with_retries

log = logging.getLogger(__name__)

FILE_NAME = "classes.txt"

NAMES_SHOWN = 5  # of classes in a message
_MAX_BYTES = 2**26  # of a list of classes
_NUMBERED = re.compile(r"\s*([0-9]{1,18})([\t ]\s*)(\S.*)")


@dataclass(frozen=True)
class Classes:
    """Names and numbers of those classes of a set that have images.

    Attributes:
        present: their numbers in the set, ascending.
        names: number in the set -> its names; empty if the classes have none.
        numbers: number in the set -> number outside the set; empty if only names identify classes.
    """

    present: list[int]
    names: dict[int, tuple[str, ...]]
    numbers: dict[int, int]

    def name(self, number: int) -> str:
        """The first name of a class, else its number, for reports."""
        known = self.names.get(number)
        return known[0] if known else str(self.numbers.get(number, number))

    def shown(self, number: int) -> str:
        """A class for messages."""
        known = self.names.get(number)
        return repr(known[0]) if known else f"number {self.numbers.get(number, number)}"

    @property
    def are_numbers(self) -> bool:
        """Whether the names are whole numbers, which say no more than `numbers`."""
        names = [name for names in self.names.values() for name in names]
        return all(whole_number(name) is not None for name in names)


def classes_of(source: Source, labels: NDArray[np.int64]) -> Classes:
    """The names and numbers of the classes of a set.

    Args:
        source: the set.
        labels: its class numbers (N,), none of them negative.

    Raises:
        DataError: `classes.txt` cannot be read, contradicts itself or lacks a class of its shards.
    """
    present = np.unique(labels).tolist()
    listed = _listed(source)
    if source.class_names is None:
        absent = [number for number in present if listed and number not in listed]
        if absent:
            raise DataError(
                f"{FILE_NAME} of the shards of {source.path(0)} names no class"
                f" {some_names(map(str, absent))}. Complete it, or remove it."
            )
        names = {number: listed[number] for number in present if listed}
        return Classes(present, names, {number: number for number in present})
    names = {number: (source.class_names[number],) for number in present}
    return Classes(present, *_with_list(names, listed))


def _with_list(
    names: dict[int, tuple[str, ...]], listed: dict[int, tuple[str, ...]]
) -> tuple[dict[int, tuple[str, ...]], dict[int, int]]:
    """Names and numbers of the classes of a folder; a list that lacks one of them is ignored.

    Subfolders named by numbers are looked up as names, then as the numbers of the list.

    Raises:
        DataError: two subfolders are one class of the list.
    """
    number_of = by_name(listed)
    as_numbers = {i: whole_number(name) for i, (name,) in names.items()}
    numbers = {i: number for i, number in as_numbers.items() if number is not None}
    matches = {i: number_of.get(name_key(name)) for i, (name,) in names.items()}
    found = {i: number for i, number in matches.items() if number is not None}
    if len(found) < len(names) == len(numbers) and listed.keys() >= {*numbers.values()}:
        found = numbers
    if listed and len(found) == len(names):
        for a, b in _merged(found):
            raise DataError(
                f"the folders {names[a][0]!r} and {names[b][0]!r} are both the class"
                f" {found[a]} of {FILE_NAME}. Put their images together, or correct it."
            )
        return {i: listed[number] for i, number in found.items()}, found
    if listed:
        log.warning("%s in the folder does not name all its classes: not used", FILE_NAME)
    return names, numbers if len(set(numbers.values())) == len(names) else {}


def same_classes(train: Classes, test: Classes) -> dict[int, int]:
    """Which class of the train set each class of the test set is: by name, else by number.

    Returns:
        Number in the test set -> number in the train set, of the classes with images.

    Raises:
        DataError: one set has names and the other numbers that nothing relates, a class of one set
            is two of the other, or the test set has a class that the train set lacks.
    """
    if train.names and test.names and train.are_numbers == test.are_numbers:
        known = by_name(train.names)
        own = by_name(test.names)
        found: dict[int, int | None] = dict.fromkeys(test.present)
        for name in own.keys() & known.keys():
            i, match = own[name], known[name]
            if found[i] not in (None, match):
                raise DataError(
                    f"the names of class {test.shown(i)} of test belong to two classes of train,"
                    f" {train.shown(match)} and another. Correct {FILE_NAME}."
                )
            found[i] = match
    elif train.numbers and test.numbers:
        known_numbers = {number: i for i, number in train.numbers.items()}
        found = {i: known_numbers.get(test.numbers[i]) for i in test.present}
    else:
        named, numbered = ("train", "test") if train.names else ("test", "train")
        raise DataError(
            f"{named} names its classes and {numbered} numbers them, and nothing says which number"
            f" is which name. Put a {FILE_NAME} beside the shards, with a line NUMBER<TAB>NAME for"
            " each class, as `dinoscale data build-shards` writes it."
        )
    missing = [i for i, match in found.items() if match is None]
    if missing:
        raise DataError(
            "test has classes that train has no images of: "
            f"{some_names(map(test.shown, missing))};"
            f" train has {some_names(map(train.shown, train.present))}"
        )
    same = {i: match for i, match in found.items() if match is not None}
    for a, b in _merged(same):
        raise DataError(
            f"two classes of test, {test.shown(a)} and {test.shown(b)}, are one of train,"
            f" {train.shown(same[a])}. Call them as train does, or correct {FILE_NAME}."
        )
    return same


def _merged(numbers: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Pairs of classes that share a number."""
    first: dict[int, int] = {}
    for i, number in numbers.items():
        if first.setdefault(number, i) != i:
            yield first[number], i


def by_name(names: dict[int, tuple[str, ...]]) -> dict[str, int]:
    """Name -> number, for the names that only one class has.

    ImageNet has two cranes: their identifiers tell them apart.

    Raises:
        DataError: all names of a class are those of another one, too.
    """
    pairs = [
        (name_key(name), i) for i, of_class in names.items() for name in {*map(name_key, of_class)}
    ]
    times = Counter(name for name, _ in pairs)
    known = {name: i for name, i in pairs if times[name] == 1}
    unique = set(known.values())
    nameless = [i for i in names if i not in unique]
    if nameless:
        raise DataError(
            f"two classes are called {names[nameless[0]][0]!r}. Give each class a name of its own."
        )
    return known


def name_key(name: str) -> str:
    """Equal for equal names: numbers without leading zeros; composed and decomposed letters."""
    number = whole_number(name)
    return unicodedata.normalize("NFC", name) if number is None else str(number)


def _listed(source: Source) -> dict[int, tuple[str, ...]]:
    """Number -> names, from `classes.txt`; empty without one."""
    folders: Iterable[str] = ()
    if isinstance(source, FolderSource):
        folders = [source.root]
    elif isinstance(source, TarSource):
        folders = dict.fromkeys(os.path.dirname(path) for path in source.files())
    paths = [os.path.join(folder, FILE_NAME) for folder in folders]
    lists = {
        path: read_classes(path) for path in paths if with_retries(partial(path_exists, path), path)
    }
    if lists and (bare := [path for path in paths if path not in lists]):
        log.warning(
            "%s is missing: its shards are assumed to be numbered as in %s",
            bare[0], next(iter(lists)),
        )  # fmt: skip
    first, *others = lists.items() or [("", {})]
    for path, other in others:
        if other != first[1]:
            raise DataError(
                f"{first[0]} and {path} disagree. Put shards of one numbering together."
            )
    return first[1]


def read_classes(path: str) -> dict[int, tuple[str, ...]]:
    """Number -> names, from a list of classes.

    A line is NUMBER<TAB>NAME, with more names after more tabs, or NUMBER NAME where the numbers
    count from 0 or 1; where no line begins with a number, it is a name, and the lines are numbered
    from 0.

    Raises:
        DataError: it cannot be read, gives a number or name twice, or leaves open whether its lines
            begin with the numbers of the classes, as `3 doors` and `5 doors`.
    """

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(_MAX_BYTES + 1)

    data = with_retries(read, path)
    if len(data) > _MAX_BYTES:
        raise DataError(f"{path} is too long for a list of classes.")
    text = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))  # UTF-8 byte order mark
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    matches = [_NUMBERED.fullmatch(line) for line in lines]
    numbered = [match for match in matches if match is not None]
    if len(numbered) == len(lines):
        pairs = [(int(match[1]), tuple(map(str.strip, match[3].split("\t")))) for match in numbered]
        if not (
            all("\t" in match[2] for match in numbered) or _is_consecutive(i for i, _ in pairs)
        ):
            raise DataError(
                f"{path}: nothing says whether its lines begin with the numbers of the classes or"
                f" with names such as {lines[0].strip()!r}. Write NUMBER<TAB>NAME."
            )
    elif any("\t" in match[0] for match in numbered):
        raise DataError(f"{path}: some lines begin with a number and others do not. Number all.")
    else:
        pairs = [(number, (line.strip(),)) for number, line in enumerate(lines)]
    listed = dict(pairs)
    if len(listed) < len(pairs):
        raise DataError(f"{path} gives one number to two classes. Correct it.")
    try:
        by_name(listed)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return listed


def _is_consecutive(numbers: Iterable[int]) -> bool:
    """Whether they are 0, 1, 2 or 1, 2, 3, and so on, in any order."""
    ordered = sorted(numbers)
    return any(ordered == list(range(first, first + len(ordered))) for first in (0, 1))


def some_names(names: Iterable[str]) -> str:
    """The first names for a message, and how many more there are."""
    listed = list(names)
    more = len(listed) - NAMES_SHOWN
    return ", ".join(listed[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
