"""Headers of image files, read without decoding pixels."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from dinoscale.data.decoding.arrays import NPY_START, TIFF_STARTS, array_header
from dinoscale.data.decoding.decode import RGB, BadSampleError

_PILLOW_CHANNELS = 4


@dataclass(frozen=True)
class Header:
    """Format and mode in Pillow's names, size in pixels as stored."""

    format: str
    mode: str
    width: int
    height: int


def read_header(data: bytes, path: str) -> Header:
    """Read the header of an image file.

    Args:
        data: the whole file.
        path: its name, for messages.

    Raises:
        BadSampleError: it is not an image, or one that a training would refuse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size, bad metadata: it opens or it fails
            with Image.open(io.BytesIO(data)) as opened:
                header = Header(str(opened.format), opened.mode, opened.width, opened.height)
    except Exception:  # decoders raise anything; the decoder of the training explains it
        if data.startswith((NPY_START, *TIFF_STARTS)):
            return _array_header(data, path)
        RGB.open(data, path)
        raise BadSampleError(path, "its header cannot be read") from None
    if header.format == "EPS" or min(header.width, header.height) < 1:
        RGB.open(data, path)  # refused with a reason
    return header


def _array_header(data: bytes, path: str) -> Header:
    """Header of an NPY file, or of a TIFF file with more channels than Pillow opens."""
    try:
        shape, dtype = array_header(data)
        if data.startswith(NPY_START):
            return Header("NPY", dtype, *_sides(shape))
        if len(shape) != 3 or min(shape[0], shape[-1]) <= _PILLOW_CHANNELS:
            raise ValueError("damaged, or of a kind unknown to Pillow")
        return Header("TIFF", dtype, *_sides(shape))
    except Exception as error:  # damaged files fail in any way
        raise BadSampleError(path, f"its header cannot be read ({error})") from None


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Width and height of (H, W), (H, W, C) or (C, H, W); there are fewer channels than pixels."""
    if len(shape) == 3:
        shape = shape[1:] if shape[0] < shape[-1] else shape[:-1]
    height, width = shape
    return width, height
