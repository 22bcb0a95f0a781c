"""Index of a checkpoint: the position of every piece of every tensor in the shard files.

It is written when a checkpoint is finished, so that opening one reads a single file instead of the
headers of all ranks' files, and a rank then reads only the bytes that it needs. For a checkpoint
of an older version, without an index, it is built from those headers.

File: safetensors, with "rows" (P, 4) int64 sorted by tensor and first element, "ends" (T,) int64,
the row after the last of each tensor, and the names of tensors and files as metadata.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from dinoscale.checkpoint.read_errors import with_retries

_LENGTH_BYTES = 8  # of the header's length, little-endian
_MAX_HEADER_BYTES = 100 * 2**20  # the limit of safetensors
_ITEM_BYTES = 4  # shards hold float32 only
_START, _NUMEL, _FILE, _OFFSET = range(4)  # columns; the offset in bytes from the file's beginning


@dataclass(frozen=True)
class ShardIndex:
    """The index, a table of P pieces.

    Attributes:
        files: names of the shard files.
        spans: "kind/name" of a tensor -> its first row and the row after its last.
        rows: (P, 4) int64: first element, number of elements, number of the file, first byte in it.
    """

    files: tuple[str, ...]
    spans: Mapping[str, tuple[int, int]]
    rows: NDArray[np.int64]

    def find(self, key: str, start: int, stop: int) -> Iterator[tuple[int, int, str, int]]:
        """First element, number of elements, file and first byte of the pieces in a range."""
        low, high = self.spans.get(key, (0, 0))
        starts = self.rows[low:high, _START]
        row = low + max(0, int(np.searchsorted(starts, start, side="right")) - 1)
        while row < high and self.rows[row, _START] < stop:
            first, count, file, offset = self.rows[row].tolist()
            yield first, count, self.files[file], offset
            row += 1

    def numel(self, key: str) -> int:
        """Number of elements of a tensor in all files."""
        low, high = self.spans.get(key, (0, 0))
        return int(self.rows[low:high, _NUMEL].sum())

    def require_within(self, sizes: Sequence[int]) -> None:
        """Refuse rows that do not fit into files of `sizes` bytes, one size for each of `files`.

        Raises:
            ValueError: a file is too short, which the message names, or a row is impossible.
        """
        numels, files, offsets = (self.rows[:, i] for i in (_NUMEL, _FILE, _OFFSET))
        if (self.rows < 0).any() or (files >= len(self.files)).any():
            raise ValueError("its index has impossible rows")
        room = np.array([*sizes, 0], np.int64)[files]
        beyond = (numels > room // _ITEM_BYTES) | (offsets > room - numels * _ITEM_BYTES)
        if beyond.any():
            raise ValueError(f"{self.files[files[beyond.argmax()]]} is cut off")

    def to_bytes(self) -> bytes:
        """Contents of the index file."""
        ends = torch.tensor([end for _, end in self.spans.values()], dtype=torch.int64)
        names = {"tensors": json.dumps(list(self.spans)), "files": json.dumps(self.files)}
        return save({"rows": torch.from_numpy(self.rows), "ends": ends}, metadata=names)


def index_from_bytes(data: bytes) -> ShardIndex:
    """The index in the bytes that `to_bytes` wrote.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: these are not the bytes of an index.
    """
    length = _header_length(data[:_LENGTH_BYTES])
    begin = _LENGTH_BYTES + length
    header = json.loads(data[_LENGTH_BYTES:begin])
    names = header["__metadata__"]

    def integers(name: str) -> NDArray[np.int64]:
        first, last = (begin + index(at) for at in header[name]["data_offsets"])
        return np.frombuffer(data[first:last], "<i8")

    tensors, files = json.loads(names["tensors"]), json.loads(names["files"])
    ends, rows = integers("ends").tolist(), integers("rows").reshape(-1, 4)
    spans = zip([0, *ends], ends, strict=False)
    if [*ends, len(rows)] != sorted([*ends, len(rows)]) or [0, *ends][-1] != len(rows):
        raise ValueError("its index contradicts itself")
    return ShardIndex(tuple(files), dict(zip(tensors, spans, strict=True)), rows)


def index_of_headers(folder: Path, names: Sequence[str]) -> ShardIndex:
    """The index of a folder's shard files, built from their headers.

    Raises:
        UnreadableError: a file cannot be read.
        ValueError, TypeError, LookupError, AttributeError, OverflowError: a header is not ours.
    """
    numbers: dict[str, int] = {}  # of tensors, in the order met
    tables = [np.empty((0, 5), np.int64)]
    for file, name in enumerate(names):
        path = folder / name
        header, begin = with_retries(lambda path=path: _read_header(path), path)  # type: ignore[misc]
        starts = json.loads(header.pop("__metadata__")["starts"])
        rows = []
        for key, about in header.items():
            (numel,) = about["shape"]
            first, last = about["data_offsets"]
            if about["dtype"] != "F32" or last - first != index(numel) * _ITEM_BYTES:
                raise ValueError(f"{name} holds a {key} of another type than float32")
            tensor = numbers.setdefault(key, len(numbers))
            rows.append((index(starts[key.split("/", 1)[1]]), numel, file, begin + first, tensor))
        tables.append(np.array(rows, np.int64).reshape(-1, 5))
    table = np.concatenate(tables)
    keys = sorted(numbers)
    place = np.empty(len(keys), np.int64)  # number of a tensor -> its place in sorted names
    place[[numbers[key] for key in keys]] = np.arange(len(keys))
    tensors = place[table[:, -1]]
    ends = np.cumsum(np.bincount(tensors, minlength=len(keys))).tolist()
    spans = dict(zip(keys, zip([0, *ends], ends, strict=False), strict=True))
    order = np.lexsort((table[:, _START], tensors))
    return ShardIndex(tuple(names), spans, np.ascontiguousarray(table[order, :-1]))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, and the offset of its data."""
    with path.open("rb") as file:
        length = _header_length(file.read(_LENGTH_BYTES))
        header: dict[str, Any] = json.loads(file.read(length))
    return header, _LENGTH_BYTES + length


def _header_length(data: bytes) -> int:
    length = int.from_bytes(data, "little")
    if len(data) < _LENGTH_BYTES or length > _MAX_HEADER_BYTES:
        raise ValueError("not a safetensors file")
    return length
