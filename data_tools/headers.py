"""What the first bytes of an image file say, without decoding its pixels."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

from dinoscale.data.decode import RGB, BadSampleError


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
        BadSampleError: it is not an image, or one that a training would refuse at once.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size, bad metadata: it opens or it fails
            with Image.open(io.BytesIO(data)) as opened:
                header = Header(str(opened.format), opened.mode, opened.width, opened.height)
    except Exception:  # decoders raise anything; the training's own has the words for it
        RGB.open(data, path)
        raise BadSampleError(path, "its header cannot be read") from None
    if header.format == "EPS" or min(header.width, header.height) < 1:
        RGB.open(data, path)  # refused with a reason
    return header
