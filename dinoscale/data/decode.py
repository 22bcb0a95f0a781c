"""Bytes of an image file to upright 8-bit pixels, or a one-line reason why not.

Pillow decodes; this module decides what the pixels of unusual files mean (16-bit, float, rotated
by EXIF, several frames) and turns every way a decoder can fail into `BadSampleError`.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dinoscale.errors import DataError

_EXIF_ORIENTATION = 0x0112  # Exif 2.3, tag number; values 1 to 8

_FIRST_LYING = 5  # from this orientation on, rows and columns are exchanged

# JPEG files of these modes are decoded by libjpeg-turbo itself, to the same pixels in 2/3 of the
# time: Pillow keeps four bytes a pixel and copies them several times.
_PLAIN_MODES = ("RGB", "L")

_INTEGER_WHITES = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # 8, 10, 12, 14, 16 bit
_FLOAT_WHITES = (1.0, 255.0)

# Exif 2.3 table 6: what to do with the stored rows and columns to see the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What a file that no decoder knows most often is: (bytes at the start, what to tell the user).
_NOT_IMAGES = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the picture, run `git lfs pull`"),
    (b"\x00\x05\x16\x07", "an AppleDouble file of macOS, not a picture"),
    (b"<!doctype html", "an HTML page, not a picture"),
    (b"<html", "an HTML page, not a picture"),
    (b"<?xml", "an XML or SVG document, not a bitmap picture"),
    (b"<svg", "an SVG drawing, not a bitmap picture"),
)


class BadSampleError(DataError):
    """One image cannot be read; the run may go on without it.

    Attributes:
        path: the file, or `shard.tar::member`.
        reason: one line.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both, so that it survives pickling between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Picture:
    """An image whose size is known; the pixels of a JPEG file are decoded when asked for.

    Attributes:
        path: where it lies, for messages.
        width: columns of the upright picture at full resolution.
        height: its rows.
    """

    def __init__(
        self, path: str, *, width: int, height: int, decode: Callable[[int], NDArray[np.uint8]]
    ):
        """`decode` takes `shrink` and returns what `pixels` does."""
        self.path, self.width, self.height = path, width, height
        self._decode = decode

    @classmethod
    def of(cls, pixels: NDArray[np.uint8], path: str) -> "Picture":
        """A picture that is decoded already, uint8 (H, W, C)."""
        height, width = pixels.shape[:2]
        return cls(path, width=width, height=height, decode=lambda _: pixels)

    def pixels(self, *, shrink: int = 1) -> NDArray[np.uint8]:
        """The first frame, upright.

        Args:
            shrink: 1, 2, 4 or 8. A JPEG file is decoded at 1 / shrink of its width and height,
                rounded up, in less time; any other picture keeps its size.

        Returns:
            uint8 (H, W, C), at least 1 x 1; not to be written to.

        Raises:
            BadSampleError: truncated or damaged.
        """
        return self._decode(shrink)


@dataclass(frozen=True)
class Decoder:
    """What the pixels of a file become; picklable.

    RGB: alpha is dropped, as the reference does. Integer and float pixels beyond 8 bit are scaled
    (`_to_8bit`). Differs: the EXIF orientation is applied; the reference loads rotated
    photographs lying on their side.
    """

    def open(self, data: bytes, path: str) -> Picture:
        """Read the header of a JPEG file, or decode any other.

        Args:
            data: the whole file.
            path: its name, for messages.

        Raises:
            BadSampleError: truncated, damaged, too large (more than twice Pillow's
                `MAX_IMAGE_PIXELS`), a PostScript program, or not an image.
        """
        with _reasons(data, path), Image.open(io.BytesIO(data)) as opened:  # the header only
            if opened.format == "EPS":
                raise ValueError(
                    "EPS is a program that Ghostscript would have to run, not a picture"
                )
            if opened.format != "JPEG":
                return Picture.of(_upright_pixels(opened), path)
            width, height = opened.size
            orientation, mode = _orientation(opened), opened.mode
            if orientation >= _FIRST_LYING:
                width, height = height, width

        def decode(shrink: int) -> NDArray[np.uint8]:
            if orientation == 1 and mode in _PLAIN_MODES:
                size = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
                try:
                    return np.asarray(simplejpeg.decode_jpeg(data, "RGB", **size))
                except ValueError:  # anything unusual about it: Pillow says whether it is readable
                    pass
            with _reasons(data, path), Image.open(io.BytesIO(data)) as opened:
                opened.draft(
                    None, (max(1, opened.width // shrink), max(1, opened.height // shrink))
                )
                return _upright_pixels(opened)

        return Picture(path, width=width, height=height, decode=decode)


RGB = Decoder()


def _upright_pixels(opened: Image.Image) -> NDArray[np.uint8]:
    """Load, convert, rotate; raises whatever Pillow raises."""
    opened.load()
    if min(opened.size) < 1:
        raise ValueError(f"the picture is {opened.width} x {opened.height} pixels")
    turn = _UPRIGHT.get(_orientation(opened))
    image = _to_rgb(opened)
    return np.asarray(image if turn is None else image.transpose(turn))


@contextmanager
def _reasons(data: bytes, path: str) -> Iterator[None]:
    """Turn whatever a decoder raises into `BadSampleError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size, bad EXIF, odd palettes: it decodes or it fails
            yield
    except Exception as error:  # decoders raise anything: struct.error, SyntaxError, MemoryError
        raise BadSampleError(path, _reason(error, data)) from None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none; damaged metadata does not spoil the picture."""
    try:
        # Pillow has already turned TIFF files upright and then lists no orientation.
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # any byte of the metadata may be wrong
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8bit(image)).convert("RGB")
    if image.mode == "La":
        return image.convert("LA").convert("RGB")
    if image.mode == "RGBa":
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _to_8bit(image: Image.Image) -> NDArray[np.uint8]:
    """Scale integer or float pixels to 0..255, with black at 0 wherever no pixel is negative.

    Files of 16 bit often hold 10, 12 or 14 bit of a sensor, and rarely say so; dividing by 256
    would turn them black. White is therefore the largest value of the smallest usual depth that
    holds all pixels. Floats are taken to lie in [0, 1] or [0, 255]. Beyond these ranges the scale
    is unknown, and the darkest and brightest pixel become 0 and 255.
    """
    pixels = np.asarray(image).astype(np.float64)  # (H, W)
    finite = np.isfinite(pixels)
    if not finite.any():
        raise ValueError("every pixel is NaN or infinite")
    low, high = float(pixels[finite].min()), float(pixels[finite].max())
    pixels = np.nan_to_num(pixels, nan=low, posinf=high, neginf=low)
    black, white = _range_of(image, low, high)
    scaled = (pixels - black) * (255.0 / (white - black))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _range_of(image: Image.Image, low: float, high: float) -> tuple[float, float]:
    """The pixel values that mean black and white."""
    if image.format == "PPM" and image.mode == "I":
        return 0.0, 65535.0  # Pillow scales PGM files by the depth they state
    for white in _FLOAT_WHITES if image.mode == "F" else _INTEGER_WHITES:
        if low >= 0 and high <= white:
            return 0.0, white
    return low, high if high > low else low + 1.0  # a constant picture turns black


def _reason(error: Exception, data: bytes) -> str:
    """One line without addresses of objects, the same for the same file on every run."""
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        start = data[:64].lstrip().lower()
        for magic, meaning in _NOT_IMAGES:
            if start.startswith(magic):
                return meaning
        if data[4:8] == b"ftyp":
            return "a HEIF/HEIC or video file, which this Pillow cannot decode"
        return "not an image, or damaged in its first bytes, or in a format unknown to Pillow"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
