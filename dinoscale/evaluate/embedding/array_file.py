"""A .npy file that is written row by row, in the memory of one batch.

Source: the format, version 1.0, is documented with numpy (`numpy.lib.format`).
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import DTypeLike, NDArray

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER_BYTES = 128  # a multiple of 64, with room for any shape of ours


class ArrayFile:
    """Rows of one dtype and shape, appended; the number of rows enters the header at the end.

    The file appears under its name when the block ends, whole; if the block fails, not at all.

    Args:
        path: of the file; one that is there is replaced.
        dtype: of the rows.
        row_shape: shape of one row.
    """

    def __init__(self, path: Path, *, dtype: DTypeLike, row_shape: tuple[int, ...]) -> None:
        self._path, self._beside = path, path.with_name(f".{path.name}.part")
        self._dtype, self._row_shape, self._rows = np.dtype(dtype), row_shape, 0

    def __enter__(self) -> ArrayFile:
        self._file = self._beside.open("wb")
        self._file.write(self._header())
        return self

    def append(self, rows: NDArray[np.generic]) -> None:
        """Write rows (n, *row_shape).

        Raises:
            ValueError: they have another dtype or shape.
            OSError: they cannot be written.
        """
        if rows.dtype != self._dtype or rows.shape[1:] != self._row_shape:
            raise ValueError(
                f"need rows {[*self._row_shape]} of {self._dtype}, got {[*rows.shape[1:]]} of"
                f" {rows.dtype}"
            )
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._file.write(self._header())
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None:
            os.replace(self._beside, self._path)
        else:
            self._beside.unlink(missing_ok=True)

    def _header(self) -> bytes:
        """The header for the rows so far, always of the same length."""
        shape = (self._rows, *self._row_shape)
        text = f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
        length = _HEADER_BYTES - len(_MAGIC) - 2
        padded = text.encode().ljust(length - 1) + b"\n"
        assert len(padded) == length
        return _MAGIC + length.to_bytes(2, "little") + padded
