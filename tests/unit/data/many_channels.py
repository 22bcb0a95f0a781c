"""Files of any number of channels, for tests."""

import io
import struct
import zlib

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image


def pixels(seed: int, *, channels: int, dtype: str = "uint8", side: int = 24) -> np.ndarray:
    """(side, side, channels) that use the whole range of the type, floats 0 to 1."""
    noise = np.random.default_rng(seed).random((side, side, channels))
    noise.flat[0], noise.flat[1] = 0, 1
    top = 1 if dtype.startswith("float") else np.iinfo(dtype).max
    return (noise * top).astype(dtype)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    """By default one page of interleaved samples."""
    buffer = io.BytesIO()
    contiguous = {"planarconfig": "contig"} if array.shape[-1] > 1 else {}
    options = {"photometric": "minisblack"} | contiguous | options
    tifffile.imwrite(buffer, array, **options)  # type: ignore[arg-type]  # many types of options
    return buffer.getvalue()


def png(array: np.ndarray) -> bytes:
    """8 bit of 1, 3 or 4 channels, or 16 bit of 1."""
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def deep_png(array: NDArray[np.uint16]) -> bytes:
    """16 bit of 4 channels, which Pillow does not write."""
    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">2I5B", width, height, 16, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
