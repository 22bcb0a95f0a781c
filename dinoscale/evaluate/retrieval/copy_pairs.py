"""Pairs of copy detection: which query is a copy of which original.

There are three rules. A CSV file has the columns `query` and `original` (paths relative to their
folders, several lines for several originals). Or the file names share their first characters (4 in
Copydays: 200001.jpg is a copy of 200000.jpg). Or the name of the query is that of the original, or
begins with it before a separator, which is no letter and no digit (`sea_crop.png` is a copy of
`sea.jpg`, `seal.png` is not); the longest such original counts.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence

from dinoscale.errors import ConfigError, DataError


def pairs_of_csv(
    path: str, queries: Sequence[str], originals: Sequence[str]
) -> list[tuple[int, ...]]:
    """Numbers of the originals of every query, from a CSV file.

    Args:
        path: of the file.
        queries: paths relative to their folder.
        originals: paths relative to their folder.

    Raises:
        DataError: the file cannot be read, names an unknown file, or lacks a query.
    """
    number_of = {name: i for i, name in enumerate(originals)}
    found: dict[str, list[int]] = {name: [] for name in queries}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the pairs {path}: {error}.") from None
    for line, row in enumerate(rows, start=2):
        query, original = row.get("query"), row.get("original")
        if query not in found or original not in number_of:
            raise DataError(
                f"{path}, line {line}: need the columns query and original with paths relative to "
                f"their folders; there is no {query!r} or no {original!r}."
            )
        found[query].append(number_of[original])
    return _complete(found, f"{path} has no line for it")


def pairs_of_prefix(
    length: int, queries: Sequence[str], originals: Sequence[str]
) -> list[tuple[int, ...]]:
    """Numbers of the originals of every query, by equal first characters of the file names.

    Raises:
        ConfigError: the length is not positive.
        DataError: a query has no original.
    """
    if length < 1:
        raise ConfigError(f"prefix: need a number of characters above 0, got {length}")
    found: dict[str, list[int]] = {}
    for query in queries:
        start = _stem(query)[:length]
        found[query] = [i for i, name in enumerate(originals) if _stem(name)[:length] == start]
    return _complete(found, f"no original begins with the same {length} characters")


def pairs_of_names(queries: Sequence[str], originals: Sequence[str]) -> list[tuple[int, ...]]:
    """Number of the original of every query, by the longest name before a separator in the query's.

    Raises:
        DataError: two originals have one name, or a query has no original.
    """
    number_of: dict[str, int] = {}
    for i, name in enumerate(originals):
        stem = _stem(name)
        if stem in number_of:
            raise DataError(f"two originals are named {stem}: {originals[number_of[stem]]}, {name}")
        number_of[stem] = i
    found = {}
    for query in queries:
        stem = _stem(query)
        ends = [i for i in range(len(stem), 0, -1) if not stem[i : i + 1].isalnum()]
        starts = [stem[:end] for end in ends]
        found[query] = [number_of[start] for start in starts if start in number_of][:1]
    return _complete(
        found, "its name is that of no original, or one before a separator as in NAME_crop"
    )


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _complete(found: dict[str, list[int]], reason: str) -> list[tuple[int, ...]]:
    without = [query for query, numbers in found.items() if not numbers]
    if without:
        raise DataError(
            f"{len(without)} of {len(found)} queries belong to no original, the first is "
            f"{without[0]} ({reason}). Name the pairs with --pairs FILE.csv, or give --prefix 4 if "
            "these are Copydays."
        )
    return [tuple(sorted(set(numbers))) for numbers in found.values()]
