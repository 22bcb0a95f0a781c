"""Read the folder of features that `dinoscale embed` has written, without holding it in memory.

Rows are read from the memory-mapped arrays when they are asked for, and names of images from the
line of their shard in the manifest. A row is one image; images that could not be read have none.

Shape letters: N rows, n rows of one request, D width of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.journal import Json
from dinoscale.errors import DataError
from dinoscale.evaluate.embedding.folder import FORMAT, MANIFEST, UNFINISHED
from dinoscale.runtime.fingerprint import digest_of
from dinoscale.runtime.outputs import sha256

_USUAL = ("cls", "pooled", "mean_patch")  # the first that there is, unless others are asked for
_SHARDS = b'"shards": ['  # begins the lines of the shards in the manifest


@dataclass(frozen=True)
class _Shard:
    """A run of images: where their rows and names lie."""

    rows: int
    arrays: Mapping[str, Any]  # feature -> file, bytes, sha256
    line: int  # its place in the manifest, in bytes


class Embeddings:
    """Rows of a folder of features; `open_embeddings` checks the folder.

    Attributes:
        path: of the folder.
        features: which make a row, side by side.
        normalized: whether a row has the length 1, after all its features are joined.
        width: D.
        about: the manifest without its shards.
    """

    def __init__(
        self,
        path: Path,
        about: Json,
        shards: Sequence[_Shard],
        *,
        features: tuple[str, ...],
        normalize: bool,
    ) -> None:
        self.path, self.about, self.features, self.normalized = path, about, features, normalize
        self._shards = [*shards]
        self._widths = [int(about["features"][name]["shape"][1]) for name in features]
        self.width = sum(self._widths)
        # First row of each shard, and N.
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def digest(self) -> str:
        """Of all that the rows and their names depend on."""
        sums = [[shard.arrays[name]["sha256"] for name in self.features] for shard in self._shards]
        settings = self.about["settings"]
        return digest_of([self.features, self.normalized, settings["data"], sums])

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """The rows start..stop - 1, (n, D) float32; they do not depend on where n begins or ends.

        Raises:
            DataError: a number is not finite, a row to normalise is all zero, or an array cannot be
                read.
        """
        found = np.empty((stop - start, self.width), dtype=np.float32)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = start
        for number in range(first, len(self._shards)):
            if at >= stop:
                break
            inside = at - int(self._starts[number])
            end = min(stop, int(self._starts[number + 1]))
            column = 0
            for name, width in zip(self.features, self._widths, strict=True):
                array = self._array(number, name)[inside : inside + end - at]
                found[at - start : end - start, column : column + width] = array
                column += width
            at = end
        return self._checked(found, np.arange(start, stop))

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows of these numbers, in any order, (n, D) float32.

        Raises:
            DataError: as `rows`.
        """
        found = np.empty((len(numbers), self.width), dtype=np.float32)
        for number, here in self._by_shard(numbers):
            inside = numbers[here] - self._starts[number]
            column = 0
            for name, width in zip(self.features, self._widths, strict=True):
                found[here, column : column + width] = self._array(number, name)[inside]
                column += width
        return self._checked(found, numbers)

    def names(self, numbers: NDArray[np.int64]) -> list[str]:
        """The names of the images of these rows, as the set says them.

        A shard's line of the manifest is read once for all its rows among them.
        """
        found = [""] * len(numbers)
        for number, here in self._by_shard(numbers):
            images = self._record(number)["images"]
            for place in here.tolist():
                found[place] = images[int(numbers[place] - self._starts[number])]
        return found

    def pixels(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Height times width of the images of these rows, (n,)."""
        found = np.empty(len(numbers), dtype=np.int64)
        for number, here in self._by_shard(numbers):
            sizes = np.array(self._record(number)["sizes"], dtype=np.int64)
            found[here] = sizes[numbers[here] - self._starts[number]].prod(axis=1)
        return found

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers (N,), -1 where unknown; None for a set without classes."""
        found = np.empty(len(self), dtype=np.int64)
        for number, first in enumerate(self._starts[:-1].tolist()):
            record = self._record(number)  # one at a time: its names are longer than its labels
            if "labels" not in record:
                return None
            found[first : int(self._starts[number + 1])] = record["labels"]
        return found

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, None where only numbers are known."""
        names: list[str] | None = self.about["classes"]
        return names

    def verify(self) -> None:
        """Compare the arrays of these features with their SHA-256, which reads all of them.

        Raises:
            DataError: one has changed since it was written.
        """
        arrays = [shard.arrays[name] for shard in self._shards for name in self.features]
        for array in tqdm(arrays, unit="shard", desc="checksums", disable=None):
            path = self.path / array["file"]
            try:
                same = sha256(path) == array["sha256"]
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from error
            if not same:
                raise DataError(
                    f"{path} is damaged: its SHA-256 is not that of {MANIFEST}. Remove the folder"
                    " and compute the features again"
                )

    def _by_shard(self, numbers: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each shard that has some of these rows, with the places of these among the numbers."""
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(shard_of[order])) + 1):
            if len(here):  # there is one empty part of no numbers
                yield int(shard_of[here[0]]), here

    def _array(self, shard: int, feature: str) -> NDArray[Any]:
        """A memory-mapped array; unmapped with its last view, so that memory stays that of rows."""
        path = self.path / self._shards[shard].arrays[feature]["file"]
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the features {path}: {error}") from error
        return array

    def _checked(
        self, rows: NDArray[np.float32], numbers: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Refuse numbers that are not finite; divide by the length, which must not be 0."""
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            wrong = numbers[np.flatnonzero(~finite)[:1]]
            raise DataError(
                f"{self.path}: the features of {self.names(wrong)[0]} (row {wrong[0]}) are not"
                " finite. Compute them again, with --dtype float32 if they are float16"
            )
        if self.normalized:
            largest = np.abs(rows).max(axis=1, keepdims=True)
            if not largest.all():
                wrong = numbers[np.flatnonzero(largest == 0)[:1]]
                raise DataError(
                    f"{self.path}: the features of {self.names(wrong)[0]} (row {wrong[0]}) are all"
                    " zero, and have no direction to compare. Leave the image out, or name other"
                    " features"
                )
            # By a power of two, which rounds nothing: squares could leave the range of float32.
            np.ldexp(rows, -np.frexp(largest)[1], out=rows)
            rows /= np.sqrt((rows * rows).sum(axis=1, keepdims=True))
        return rows

    def _record(self, shard: int) -> Json:
        with (self.path / MANIFEST).open("rb") as file:
            file.seek(self._shards[shard].line)
            return _parsed(file.readline())


def open_embeddings(
    path: Path, *, features: Sequence[str] = (), normalize: bool = True
) -> Embeddings:
    """Open a finished folder of features.

    Args:
        path: the folder, as `dinoscale embed` wrote it.
        features: which of its features make a row, side by side; none takes the class token, or
            what the network has in its place.
        normalize: divide each row by its length.

    Raises:
        DataError: it is no such folder, unfinished, damaged, or has no such feature.
    """
    about, shards = _read_manifest(path)
    chosen = _chosen(path, about, tuple(features))
    for shard in shards:
        for name in chosen:
            _require_whole(path / shard.arrays[name]["file"], shard, name, about)
    return Embeddings(path, about, shards, features=chosen, normalize=normalize)


def verify(*embeddings: Embeddings) -> None:
    """Compare the arrays with their SHA-256, those of one folder once; all ranks call it.

    Raises:
        DataError: one has changed since it was written, on every rank.
    """
    # Not on top: it imports torch, which reading a folder does not need.
    from dinoscale.runtime.opening import on_first_rank

    def compare(_: object) -> None:
        for one in {one.path.resolve(): one for one in embeddings}.values():
            one.verify()

    on_first_rank(compare)


def _read_manifest(path: Path) -> tuple[Json, list[_Shard]]:
    """The manifest without its shards, and these, a line at a time: it may be larger than memory.

    Raises:
        DataError: there is none, or it is not as it was written.
    """
    manifest = path / MANIFEST
    try:
        with manifest.open("rb") as file:
            about = _head(file)
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r}, not {FORMAT!r}")
            shards = [*_shards(file)]
            if sum(shard.rows for shard in shards) != about["images"]:
                raise ValueError("shards are missing")
    except FileNotFoundError:
        raise DataError(_no_manifest(path)) from None
    except OSError as error:
        raise DataError(f"cannot read {manifest}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{manifest} is not as `dinoscale embed` writes it ({error}). Compute the features"
            " again, or restore the file"
        ) from error
    return about, shards


def _no_manifest(path: Path) -> str:
    if (path / UNFINISHED).exists():
        return f"{path} is unfinished: start the same `dinoscale embed` again, which completes it"
    return f"{path} is no folder of features: it has no {MANIFEST}. Make one with `dinoscale embed`"


def _head(file: BinaryIO) -> Json:
    """What stands before the shards."""
    lines = []
    while (line := file.readline()).strip() != _SHARDS:
        if not line:
            raise ValueError("it has no list of shards")
        lines.append(line)
    return _parsed(b"".join(lines).rstrip().removesuffix(b",") + b"}")


def _shards(file: BinaryIO) -> list[_Shard]:
    found = []
    place = file.tell()
    while (line := file.readline()).strip() != b"]":
        if not line:
            raise ValueError("it was cut off")
        record = _parsed(line)
        found.append(_Shard(len(record["images"]), record["arrays"], place))
        place = file.tell()
    return found


def _parsed(line: bytes) -> Json:
    loaded = json.loads(line.rstrip().removesuffix(b","))
    if not isinstance(loaded, dict):
        raise ValueError("a line is no object")
    return loaded


def _chosen(path: Path, about: Json, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The features that make a row.

    Raises:
        DataError: one is not there, or has several rows for an image.
    """
    there = about["features"]
    single = [name for name, array in there.items() if len(array["shape"]) == 2]
    usual = [name for name in _USUAL if name in single][:1]
    for name in asked or usual or ("cls",):
        if name not in single:
            what = "has several rows for an image" if name in there else "is not there"
            raise DataError(
                f"{path}: the feature {name!r} {what}; it has {', '.join(single) or 'no other'}."
                " Name others, or write them with `dinoscale embed --features`"
            )
    return asked or tuple(usual)


def _require_whole(path: Path, shard: _Shard, feature: str, about: Json) -> None:
    """Refuse an array that is not there, or not as long as its record says."""
    try:
        same = path.stat().st_size == shard.arrays[feature]["bytes"]
        width = about["features"][feature]["shape"][1]
        same = same and np.load(path, mmap_mode="r").shape == (shard.rows, width)
    except (OSError, ValueError):
        same = False
    if not same:
        raise DataError(
            f"{path} is missing or damaged: it is not what {MANIFEST} says. Remove the folder and"
            " compute the features again"
        )
