"""Pictures that two sets share byte for byte, whatever their names."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.folder import FolderSource, ListSource
from dinoscale.data.sources.image_files import read_image_file
from dinoscale.data.sources.source import Source
from dinoscale.errors import UnavailableError

log = logging.getLogger(__name__)

# Limits that keep a comparison of large sets to seconds on a local disk; small ones are compared
# whole.
LOOKED_FOR = 1000  # evenly spaced pictures: enough to find some if 1 % are shared
SIZES_READ = 100_000  # files of a folder whose size is read, besides those of equal names
NAMED = 10  # files per name that is looked for; with more, names are mere numbers within classes
BYTES_READ = 2**28  # of pictures with the same size and another name

Stored = FolderSource | ListSource | TarSource


@dataclass(frozen=True)
class Overlap:
    """How many pictures of a set are in another one.

    Attributes:
        found: pictures that are in both.
        looked_for: pictures that were looked for.
        example: path of one shared picture, empty if there is none.
    """

    found: int
    looked_for: int
    example: str


def find_overlap(some: Source, whole: Source) -> Overlap:
    """Find pictures of a labelled set in another one; a synthetic set overlaps only with itself.

    Where a file cannot be read, a warning says that nothing was looked for.
    """
    if not (isinstance(some, Stored) and isinstance(whole, Stored)):
        labels = some.labels
        found = len(labels) if some == whole and labels is not None else 0
        return Overlap(found, found, some.path(0) if found else "")
    numbers = range(0, len(some), math.ceil(len(some) / LOOKED_FOR))
    try:
        pairs = equal_pictures(some, numbers, whole, sizes_read=SIZES_READ, bytes_read=BYTES_READ)
    except UnavailableError as error:  # whoever needs the image says so
        log.warning("two sets are not searched for pictures that both have: %s", error)
        return Overlap(0, 0, "")
    shared = sorted({number for of_one in pairs.values() for number in of_one})
    return Overlap(len(shared), len(numbers), some.path(shared[0]) if shared else "")


def equal_pictures(
    some: Source,
    numbers: Iterable[int],
    whole: Source,
    *,
    sizes_read: float = math.inf,
    bytes_read: float = math.inf,
) -> dict[int, list[int]]:
    """Find pictures of one set whose bytes equal those of pictures of another.

    Args:
        some: the set whose pictures are looked for.
        numbers: indices of these pictures.
        whole: the set to search.
        sizes_read: about how many of its files, evenly spaced, have their size read.
        bytes_read: about how many bytes of candidates of the right size, evenly spaced, are read;
            files of equal names, if these are few, are read in any case.

    Returns:
        Index in `whole` -> the indices in `some` with the same bytes; empty for synthetic sets.
    """
    if not (isinstance(some, Stored) and isinstance(whole, Stored)):
        return {}
    of_size: dict[int, list[int]] = defaultdict(list)
    for number in numbers:
        of_size[_size(some, number)].append(number)
    names = {_base(some.path(number)) for of_one in of_size.values() for number in of_one}
    if _number_of(names, whole) > NAMED * len(names):  # 0001.jpg in every class identifies nothing
        names = set()
    stride = max(1, math.ceil(len(whole) / sizes_read))
    candidates = [entry for entry in _sizes(whole, names, stride) if entry[1] in of_size]
    stride = max(1, math.ceil(sum(size for _, size, _ in candidates) / bytes_read))
    digests: dict[int, dict[bytes, list[int]]] = {}
    found = {}
    for place, (i, size, is_named) in enumerate(candidates):
        if place % stride and not is_named:
            continue
        if size not in digests:
            digests[size] = _by_digest(some, of_size[size])
        equal = digests[size].get(_digest(whole, i))
        if equal is not None:
            found[i] = equal
    return found


def first_of_equals(source: Source) -> NDArray[np.int64]:
    """For each picture of a set the index of the first one with the same bytes, (N,).

    Only pictures whose size another one has are read; those of synthetic sets are all different.
    """
    first = np.arange(len(source))
    if not isinstance(source, Stored):
        return first
    of_size: dict[int, list[int]] = defaultdict(list)
    for number in range(len(source)):
        of_size[_size(source, number)].append(number)
    for numbers in of_size.values():
        if len(numbers) > 1:
            for equal in _by_digest(source, numbers).values():
                first[equal] = equal[0]
    return first


def _by_digest(source: Stored, numbers: Sequence[int]) -> dict[bytes, list[int]]:
    """Readable pictures by the digest of their bytes."""
    found: dict[bytes, list[int]] = defaultdict(list)
    for number in numbers:
        found[_digest(source, number)].append(number)
    found.pop(b"", None)
    return dict(found)


def _digest(source: Stored, number: int) -> bytes:
    """Digest of the file of a picture; empty for what is no plain file."""
    try:
        if isinstance(source, TarSource):
            data = source.data(number)
        else:
            data = read_image_file(source.path(number))
    except UnavailableError:
        raise
    except BadSampleError:
        return b""
    return hashlib.sha256(data).digest()


def _sizes(source: Stored, names: set[str], stride: int) -> Iterator[tuple[int, int, bool]]:
    """Index, size, and whether the file has one of the names.

    Of files, every `stride`-th and those with one of the names; of shards all, names ignored.
    """
    if isinstance(source, TarSource):
        yield from ((number, size, False) for number, size in enumerate(source.sizes()))
        return
    for number, path in enumerate(source.files()):
        is_named = _base(path) in names
        if is_named or number % stride == 0:
            yield number, _size_of_file(path), is_named


def _number_of(names: set[str], source: Stored) -> int:
    """Number of files with one of these names; 0 for shards, whose names are ignored."""
    if isinstance(source, TarSource):
        return 0
    return sum(_base(path) in names for path in source.files())


def _size(source: Stored, number: int) -> int:
    if isinstance(source, TarSource):
        return source.size(number)
    return _size_of_file(source.path(number))


def _size_of_file(path: str) -> int:
    """Size in bytes, -1 if unknown."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def _base(path: str) -> str:
    """Name of a file, or of a member of a shard, without folders."""
    return path.rpartition("::")[2].rpartition("/")[2]
