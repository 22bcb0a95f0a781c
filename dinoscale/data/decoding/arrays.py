"""Images beyond 8-bit RGB: NPY files, TIFF files of many channels, and scaling to 8 bits.

The files are untrusted: sizes are checked before memory is allocated, and nothing is unpickled.
Shape letters: H rows, W columns, C channels.
"""

import io
import logging
import math
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

NPY_START = b"\x93NUMPY"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF

_DTYPES = ("uint8", "uint16", "int16", "float32", "float64")
INTEGER_WHITES = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # 8, 10, 12, 14, 16 bit
_FLOAT_WHITES = (1.0, 255.0)

_MAX_PAGES = 2**16
_TIFF_ORIENTATION = 274
_DEFLATE = (8, 32946)
_COMPRESSIONS = (1, *_DEFLATE, 32773)  # none, Deflate, PackBits: what tifffile reads on its own
_INFLATE_CHUNK = 2**20  # bytes
_INFLATED_ALLOWANCE = 2**26  # bytes; tiles may reach far beyond a small picture

# TIFF 6.0, tag 274, the same as Exif: how to turn the stored picture (H, W, C) upright.
_UPRIGHT = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}  # exchange rows and columns first, then the direction of rows and of columns


def read_npy(data: bytes, *, channels: int) -> NDArray[Any]:
    """The array of an NPY file as (H, W, C), without a copy.

    Args:
        data: the whole file; its array is (H, W), (H, W, C) or (C, H, W).
        channels: C.

    Raises:
        ValueError: another shape or dtype, or shorter or longer than its header says.
    """
    stream = io.BytesIO(data)
    shape, fortran, dtype = _npy_header(stream)
    num_bytes, there = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if num_bytes != there:
        raise ValueError(
            f"its header says {shape} of {dtype.name}, {num_bytes} bytes; there are {there}"
        )
    axis = _channel_axis(shape, channels)
    numbers = np.frombuffer(data, dtype, offset=stream.tell())
    return _channels_last(numbers.reshape(shape, order="F" if fortran else "C"), axis)


def _npy_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, dtype; leaves the stream at the data."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"NPY of version {version}, need 1.0 or 2.0")
    _require_dtype(dtype)
    return shape, fortran, dtype


def array_header(data: bytes) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the array in an NPY or TIFF file, whatever its channels.

    Raises:
        Exception: it is neither, or damaged: whatever numpy or tifffile raises.
    """
    if data.startswith(NPY_START):
        shape, _, dtype = _npy_header(io.BytesIO(data))
        return shape, dtype.name
    with _opened_tiff(data) as tiff:
        _require_few_pages(tiff)
        series = tiff.series[0]
        require_few_values(math.prod(series.shape), series.shape)
        return series.shape, str(series.dtype)


def read_tiff(data: bytes, *, channels: int) -> NDArray[Any]:
    """The first picture of a TIFF file as (H, W, C), upright.

    Its channels are samples of one page, interleaved or plane after plane, or pages of one size.

    Args:
        data: the whole file, uncompressed or compressed with Deflate or PackBits.
        channels: C.

    Raises:
        ValueError: another shape, dtype or compression, or too large.
        Exception: damaged: whatever tifffile raises.
    """
    with _opened_tiff(data) as tiff:
        _require_few_pages(tiff)
        series = tiff.series[0]
        axis = _channel_axis(series.shape, channels)
        _require_readable(tiff, series)
        numbers = series.asarray(maxworkers=1)
        orientation = series.keyframe.tags.valueof(_TIFF_ORIENTATION, 1)
    swapped, down, right = _UPRIGHT.get(orientation, (False, 1, 1))
    pixels = _channels_last(numbers, axis)
    return (pixels.swapaxes(0, 1) if swapped else pixels)[::down, ::right]


def _opened_tiff(data: bytes) -> "TiffFile":
    from tifffile import TiffFile  # slow to import, and most runs need none of it

    # It would log every oddity in addition to the reason given here.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    # These dialects name further files, which would be opened.
    plain = {"is_ome": False, "is_mmstack": False, "is_ndtiff": False}
    return TiffFile(io.BytesIO(data), **plain)  # type: ignore[arg-type]  # is_*: bool


def _require_few_pages(tiff: "TiffFile") -> None:
    """Refuse too many pages: they are a linked list, and tifffile would follow a loop forever."""
    try:
        tiff.pages.get(_MAX_PAGES)
    except IndexError:
        return
    raise ValueError(f"more than {_MAX_PAGES} pages, or a loop of pages")


def _require_readable(tiff: "TiffFile", series: "TiffPageSeries") -> None:
    """Check what the file claims before memory is allocated for it."""
    page = series.keyframe
    _require_dtype(series.dtype)
    for shape in (series.shape, page.chunks):
        require_few_values(math.prod(shape), shape)
    if page.compression not in _COMPRESSIONS:
        name = getattr(page.compression, "name", page.compression)
        raise ValueError(f"TIFF compression {name}; store it uncompressed or with Deflate")
    if page.compression not in _DEFLATE:
        return
    left = 4 * series.nbytes + _INFLATED_ALLOWANCE
    for each in series.pages:
        if each is None:
            continue
        for offset, size in zip(each.dataoffsets, each.databytecounts, strict=True):
            tiff.filehandle.seek(offset)
            left -= _inflated_size(tiff.filehandle.read(size), most=left)
            if left <= 0:
                raise ValueError("a decompression bomb: it holds far more than its picture")


def _inflated_size(data: bytes, *, most: int) -> int:
    """Bytes in a Deflate stream; stops counting at `most`."""
    inflate, size = zlib.decompressobj(), 0
    while data and size < most:
        size += len(inflate.decompress(data, _INFLATE_CHUNK))
        data = inflate.unconsumed_tail
    return size


def require_few_values(count: int, shape: object) -> None:
    """Refuse arrays larger than the largest picture that Pillow would open.

    Raises:
        ValueError: more than twice Pillow's MAX_IMAGE_PIXELS.
    """
    most = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
    if count > most:
        raise ValueError(f"{shape} are {count} numbers, need {most} at most (decompression bomb?)")


def _require_dtype(dtype: np.dtype[Any] | None) -> None:
    if dtype is None or dtype.hasobject or dtype.newbyteorder("=").name not in _DTYPES:
        raise ValueError(f"dtype {dtype}, need one of {', '.join(_DTYPES)}")


def _channel_axis(shape: tuple[int, ...], channels: int) -> int | None:
    """The axis of the channels, the last one if both fit; None: one channel without an axis."""
    if min(shape, default=1) < 1:
        raise ValueError(f"an array {shape} has no pixels")
    if len(shape) == 2 and channels == 1:
        return None
    if len(shape) == 3 and channels in (shape[-1], shape[0]):
        return -1 if shape[-1] == channels else 0
    found = {2: "1 channel", 3: f"{min(shape[0], shape[-1])} channels" if shape else ""}
    raise ValueError(
        f"an array {shape} has {found.get(len(shape), 'no channels to tell')}, "
        f"need {channels} (data.channels)"
    )


def _channels_last(numbers: NDArray[Any], axis: int | None) -> NDArray[Any]:
    """To (H, W, C)."""
    return numbers[..., None] if axis is None else np.moveaxis(numbers, axis, -1)


def to_8bit(numbers: NDArray[Any], *, white: float | None) -> NDArray[np.uint8]:
    """Scale integers or floats to 0..255, with black at 0 wherever no number is negative.

    Files of 16 bits often hold 10, 12 or 14 bits of a sensor, and rarely say so; dividing by 256
    would turn them black. Without `white`, white is therefore the largest value of the smallest
    usual depth that holds all pixels. Floats are assumed to lie in [0, 1] or [0, 255]. Beyond these
    ranges the scale is unknown, and the darkest and brightest number become 0 and 255. The channels
    of a picture share one scale.

    Args:
        numbers: array of any shape; uint8 is returned as it is.
        white: the number that becomes 255; 0 stays 0, and numbers outside are clipped. None guesses
            it for each picture.

    Raises:
        ValueError: no number is finite.
    """
    if numbers.dtype == np.uint8:
        return numbers
    scaled = numbers.astype(np.float64)
    finite = np.isfinite(scaled)
    if not finite.any():
        raise ValueError("every pixel is NaN or infinite")
    low, high = float(scaled[finite].min()), float(scaled[finite].max())
    scaled = np.nan_to_num(scaled, nan=low, posinf=high, neginf=low)
    usual = _FLOAT_WHITES if numbers.dtype.kind == "f" else INTEGER_WHITES
    black, white = _range_of(low, high, usual) if white is None else (0.0, white)
    scaled = (scaled - black) * (255.0 / (white - black))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _range_of(low: float, high: float, whites: tuple[float, ...]) -> tuple[float, float]:
    """The numbers that mean black and white."""
    for white in whites:
        if low >= 0 and high <= white:
            return 0.0, white
    return low, high if high > low else low + 1.0  # a constant picture turns black
