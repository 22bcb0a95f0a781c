"""The ground truth of the revisited Oxford and Paris benchmarks, from a JSON file.

    {"imlist": ["all_souls_000000", ...],      names of the database, without .jpg
     "qimlist": ["all_souls_000013", ...],     names of the queries
     "gnd": [{"easy": [12, ...], "hard": [...], "junk": [...]}, ...]}   one per query; indices
                                               into imlist, from 0

Other keys, such as `bbx`, are not read: queries are whole images.
Source: Radenovic et al. 2018 (arXiv:1803.11285).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinoscale.errors import DataError

_CONVERT = (
    'python -c \'import json,pickle,sys; json.dump(pickle.load(open(sys.argv[1],"rb")), '
    'open(sys.argv[2],"w"), default=lambda x: x.tolist())\' gnd.pkl gnd.json'
)
_KINDS = ("easy", "hard", "junk")


@dataclass(frozen=True)
class Truth:
    """Positives of one query, easy or hard, and images that are ignored."""

    easy: tuple[int, ...]
    hard: tuple[int, ...]
    junk: tuple[int, ...]


# Positives, and images that are left out of the ranking, of each setup.
SETUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
    "easy": (("easy",), ("junk", "hard")),
}


@dataclass(frozen=True)
class GroundTruth:
    """Names of the images and of the queries, and the truth of each query."""

    images: tuple[str, ...]
    queries: tuple[str, ...]
    truths: tuple[Truth, ...]


def read_ground_truth(path: str | Path) -> GroundTruth:
    """Read a JSON file; the benchmark's own pickles are not opened, as they could run code.

    Raises:
        DataError: it cannot be read, or does not have the layout above.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the ground truth {path}: {error.strerror}.") from None
    if data[:1] == b"\x80":
        raise DataError(
            f"{path} is a pickle, which can run code when it is read. If you trust it, convert it "
            f"to JSON first: {_CONVERT}"
        )
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON. See --help for its layout.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: need a mapping with imlist, qimlist and gnd.")
    images, queries = (_names(content, key, path) for key in ("imlist", "qimlist"))
    entries = content.get("gnd")
    if not isinstance(entries, list) or len(entries) != len(queries):
        raise DataError(f"{path}: gnd must be a list with one entry for each of qimlist.")
    truths = tuple(_truth(entry, i, len(images), path) for i, entry in enumerate(entries))
    return GroundTruth(images, queries, truths)


def _names(content: Mapping[str, object], key: str, path: str | Path) -> tuple[str, ...]:
    names = content.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(x, str) for x in names):
        raise DataError(f"{path}: {key} must be a list of names of images.")
    return tuple(names)


def _truth(entry: object, number: int, num_images: int, path: str | Path) -> Truth:
    if not isinstance(entry, dict):
        raise DataError(f"{path}: gnd[{number}] must be a mapping with easy, hard and junk.")
    lists = []
    for kind in _KINDS:
        found = entry.get(kind)
        if not isinstance(found, list) or not all(
            type(x) is int and 0 <= x < num_images for x in found
        ):
            raise DataError(
                f"{path}: gnd[{number}].{kind} must be a list of numbers of images, 0 to "
                f"{num_images - 1}."
            )
        lists.append(tuple(found))
    if len(set().union(*lists)) < sum(map(len, lists)):
        raise DataError(f"{path}: gnd[{number}] lists an image twice among easy, hard and junk.")
    return Truth(*lists)
