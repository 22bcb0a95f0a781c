"""A table on disk: for each image a few whole numbers and a name, read one row at a time.

Reading a row is one `pread`, so a process holds no memory per image and workers share the kernel's
page cache. The file is not memory-mapped: the touched pages of a map count as memory of the
process, and a process dies when a mapped file becomes shorter.

File: header | N + 1 rows | names | metadata, all little-endian.
  row: where its name begins (8 bytes), the numbers, CRC-32 of both. The last row only marks the end
    of the last name.
  header: magic, format of the numbers, N, bytes of names and of metadata, CRC-32 of this and of the
    metadata.
  metadata: JSON, what the rows were made from.
Magic, length and checksums reveal a file of another kind, a truncated or a damaged one.
"""

import hashlib
import json
import os
import shutil
import struct
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from dinoscale.errors import DataError
from dinoscale.runtime.retry import read_error, with_retries

_MAGIC = b"dinoscale-index1"
_HEADER = struct.Struct("<16s16sQQQI")
_SUM = struct.Struct("<I")  # CRC-32, ends a row
_CHUNK_BYTES = 2**20  # read at once, of rows and names in sequence
_MAX_METADATA_BYTES = 2**30  # a million shards need a tenth


class DamagedTableError(DataError):
    """The file is not a table, is incomplete, or has another format."""


class RowTable:
    """N rows of a table file, which stays open.

    Picklable: a copy opens the file by its path and checks that it is still the same.

    Attributes:
        path: the file.
        metadata: what the rows were made from.

    Args:
        path: the file.
        numbers: format of the numbers of a row, as in `struct`, e.g. "QQ".
        temporary: remove the file together with this object.

    Raises:
        DamagedTableError: it is not a table of this format, or damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: str, numbers: str, *, temporary: bool = False):
        self.path = path
        self._row = row_format(numbers)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        if temporary:
            weakref.finalize(self, _remove, path, os.getpid())
        self._header = os.pread(self._descriptor, _HEADER.size, 0)
        self._num_rows, self._names_bytes, self.metadata = self._checked(numbers)
        self._names_at = _HEADER.size + (self._num_rows + 1) * self._row.size

    def __len__(self) -> int:
        """N."""
        return self._num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self._header)

    def numbers(self, index: int) -> tuple[int, ...]:
        """The numbers of a row.

        Raises:
            DataError: the file was damaged since it was opened.
        """
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of {self._num_rows}")
        return self._unpacked(self._read(self._row.size, _HEADER.size + index * self._row.size))[1:]

    def name(self, index: int) -> str:
        """The name of a row.

        Raises:
            DataError: the file was damaged since it was opened.
        """
        ((name, _),) = self.rows(index, index + 1)
        return name

    def rows(self, first: int, stop: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and numbers of the rows from `first` to `stop`, exclusive, in large reads.

        Raises:
            DataError: the file was damaged since it was opened.
        """
        if not 0 <= first <= stop <= self._num_rows:
            raise IndexError(f"rows {first} to {stop} of {self._num_rows}")
        at_once = _CHUNK_BYTES // self._row.size
        for begin in range(first, stop, at_once):
            count = min(at_once, stop - begin)
            size = (count + 1) * self._row.size
            packed = self._read(size, _HEADER.size + begin * self._row.size)
            yield from self._named([*map(self._unpacked, _split(packed, self._row.size))])

    def digest(
        self, *, number: int | None = None, heartbeat: Callable[[], None] = lambda: None
    ) -> str:
        """SHA-256 of all names in order and, with `number`, of that number of each row.

        `heartbeat` is called repeatedly.

        Raises:
            DataError: the file was damaged since it was opened.
        """
        letters = self._row.format[2:-1]  # between the start of the name and the sum
        kinds = [f"<{'i8' if letter == 'q' else 'u8'}" for letter in letters]
        fields = [
            ("begin", "<u8"),
            *((f"{i}", kind) for i, kind in enumerate(kinds)),
            ("sum", "<u4"),
        ]
        parts = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        size, at_once = self._row.size, _CHUNK_BYTES // self._row.size
        for begin in range(0, self._num_rows + 1, at_once):
            count = min(at_once, self._num_rows + 1 - begin)
            table = np.frombuffer(self._read(count * size, _HEADER.size + begin * size), fields)
            parts[0].update(table["begin"].tobytes())
            if number is not None:
                parts[1].update(table[f"{number}"].tobytes())
            heartbeat()
        for begin in range(0, self._names_bytes, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, self._names_bytes - begin)
            parts[2].update(self._read(count, self._names_at + begin))
            heartbeat()
        return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()

    def _named(self, rows: list[tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """All rows but the last, with their names; a few long names may need several reads."""
        have = b""
        at = rows[0][0]  # where `have` begins
        for (begin, *numbers), (end, *_) in pairwise(rows):
            if not begin <= end <= self._names_bytes:
                raise self._damaged()
            if end > at + len(have):
                size = max(end, min(rows[-1][0], begin + _CHUNK_BYTES)) - begin
                have, at = self._read(size, self._names_at + begin), begin
            yield os.fsdecode(have[begin - at : end - at]), tuple(numbers)

    def _unpacked(self, row: bytes) -> tuple[int, ...]:
        *numbers, stated = self._row.unpack(row)
        if zlib.crc32(row[: -_SUM.size]) != stated:
            raise self._damaged()
        return tuple(numbers)

    def _read(self, size: int, offset: int) -> bytes:
        try:
            data = read_at(self._descriptor, size, offset)
        except OSError as error:
            raise read_error(f"the index {self.path}", error) from error
        if len(data) < size:
            raise self._damaged()
        return data

    def _checked(self, numbers: str) -> tuple[int, int, dict[str, Any]]:
        """Number of rows, bytes of the names, and the metadata."""
        if len(self._header) < _HEADER.size:
            raise self._damaged()
        magic, row, num_rows, names_bytes, metadata_bytes, stated = _HEADER.unpack(self._header)
        if magic != _MAGIC or row.rstrip(b"\0") != numbers.encode():
            raise DamagedTableError(f"{self.path} is not an index of this kind")
        metadata_at = _HEADER.size + (num_rows + 1) * self._row.size + names_bytes
        length = os.fstat(self._descriptor).st_size
        if length != metadata_at + metadata_bytes or metadata_bytes > _MAX_METADATA_BYTES:
            raise self._damaged()
        metadata = read_at(self._descriptor, metadata_bytes, metadata_at)
        if stated != _sum_of(self._header, metadata):
            raise self._damaged()
        loaded: dict[str, Any] = json.loads(metadata)
        return num_rows, names_bytes, loaded

    def _damaged(self) -> DamagedTableError:
        return DamagedTableError(
            f"the index {self.path} is damaged. Remove it and start again to rebuild it."
        )


def row_format(numbers: str) -> struct.Struct:
    """Layout of a row: where its name begins, its numbers, their sum."""
    return struct.Struct(f"<Q{numbers}I")


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of a file; fewer only at its end."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # a signal or a network file system may cut a read short
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _split(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def _sum_of(header: bytes, metadata: bytes) -> int:
    return zlib.crc32(metadata, zlib.crc32(header[: -_SUM.size]))


def _remove(path: str, owner: int) -> None:
    """Remove a temporary file, but not in a forked worker, which has a copy of the object."""
    if os.getpid() == owner and os.path.exists(path):
        os.unlink(path)


def _reopened(path: str, header: bytes) -> RowTable:
    numbers = _HEADER.unpack(header)[1].rstrip(b"\0").decode()
    index = with_retries(lambda: RowTable(path, numbers), f"the index {path}")
    if index._header != header:
        raise DataError(f"the index {path} has changed: another run rebuilt it. Start again.")
    return index


class RowTableWriter:
    """Writes a table row by row, in bounded memory, and puts it in place when it is finished.

    A context manager; without `finish` nothing remains.

    Args:
        numbers: format of the numbers of a row, as in `struct`, one letter each.
        path: path of the table; "" makes a temporary one, in the folder that TMPDIR names.

    Raises:
        OSError: it cannot be written (also from every method).
    """

    def __init__(self, numbers: str, path: str = ""):
        self._numbers = numbers
        self._path = path
        self._row = row_format(numbers)
        folder, name = os.path.split(path)
        prefix = f"{name}." if path else "dinoscale-"
        descriptor, self._partial = tempfile.mkstemp(".partial", prefix, folder or None)
        self._rows = os.fdopen(descriptor, "wb")
        # The number of rows is known only at the end: the names wait in a file of their own.
        self._names = tempfile.TemporaryFile(dir=os.path.dirname(self._partial))  # noqa: SIM115  # closed with this object
        self._rows.write(bytes(_HEADER.size))
        self._num_rows = self._names_bytes = 0

    def __enter__(self) -> "RowTableWriter":
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._partial, os.getpid())  # first: closing may fail on a full disk
        self._names.close()
        self._rows.close()

    def add(self, name: str, *numbers: int) -> None:
        """Append a row."""
        self._add_row(numbers)
        encoded = os.fsencode(name)
        self._names.write(encoded)
        self._names_bytes += len(encoded)
        self._num_rows += 1

    def _add_row(self, numbers: tuple[int, ...]) -> None:
        row = self._row.pack(self._names_bytes, *numbers, 0)[: -_SUM.size]
        self._rows.write(row + _SUM.pack(zlib.crc32(row)))

    def finish(self, metadata: dict[str, Any]) -> RowTable:
        """Put the table in place, whole or not at all, and open it.

        Args:
            metadata: what the rows were made from, for JSON.
        """
        self._add_row((0,) * len(self._numbers))
        self._names.seek(0)
        shutil.copyfileobj(self._names, self._rows, _CHUNK_BYTES)
        encoded = json.dumps(metadata).encode()
        self._rows.write(encoded)
        sizes = (self._num_rows, self._names_bytes, len(encoded))
        header = _HEADER.pack(_MAGIC, self._numbers.encode(), *sizes, 0)
        self._rows.seek(0)
        self._rows.write(header[: -_SUM.size] + _SUM.pack(_sum_of(header, encoded)))
        self._rows.flush()
        if not self._path:
            self._path = self._partial.removesuffix(".partial") + ".index"
            os.replace(self._partial, self._path)
            return RowTable(self._path, self._numbers, temporary=True)
        os.fsync(self._rows.fileno())  # or a crash may leave the name with other content
        os.replace(self._partial, self._path)
        return RowTable(self._path, self._numbers)
