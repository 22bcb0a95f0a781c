"""Bytes of an image file to upright 8-bit pixels, or a one-line reason why not.

Pillow decodes, and `arrays` what Pillow cannot. This module decides what the pixels of unusual
files mean (EXIF rotation, several frames, other channels than requested) and turns every failure of
a decoder into `BadSampleError`.
"""

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from dinoscale.data.decoding.arrays import (
    NPY_START,
    TIFF_STARTS,
    array_header,
    read_npy,
    read_tiff,
    to_8bit,
)
from dinoscale.errors import DataError, UnavailableError

_EXIF_ORIENTATION = 0x0112  # Exif 2.3, tag number; values 1 to 8

_FIRST_TRANSPOSED = 5  # from this orientation on, rows and columns are swapped

_MODES = {
    1: "L",
    3: "RGB",
}  # Pillow's mode by number of channels; pictures are converted to no other

# (wanted mode, mode of the file) -> simplejpeg's colour space, for JPEG files that libjpeg-turbo
# itself decodes to the same pixels in 2/3 of the time: Pillow keeps four bytes per pixel and copies
# them several times.
_TURBO_COLORSPACES = {("RGB", "RGB"): "RGB", ("RGB", "L"): "RGB", ("L", "L"): "GRAY"}

_MAX_PILLOW_CHANNELS = 4
_PGM_WHITE = 65535.0  # Pillow scales PGM files by the depth they state

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

# The usual files that Pillow cannot identify: (bytes at the start, what they are).
_NOT_PICTURES = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the picture, run `git lfs pull`"),
    (b"\x00\x05\x16\x07", "an AppleDouble file of macOS, not a picture"),
    (b"<!doctype html", "an HTML page, not a picture"),
    (b"<html", "an HTML page, not a picture"),
    (b"<?xml", "an XML document (an SVG drawing, or a message of a server), not a bitmap picture"),
    (b"<svg", "an SVG drawing, not a bitmap picture"),
    (b"%pdf-", "a PDF document, not a picture"),
)
# Formats that Pillow reads unless they are damaged: (bytes at the start, name).
_PICTURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89png", "PNG"),
    (b"gif8", "GIF"),
    (b"\x00\x00\x00\x0cjp  ", "JPEG 2000"),
)
# What decoders raise on damage that they do not expect.
_DECODER_BUGS = (ArithmeticError, AttributeError, LookupError, TypeError, struct.error)
# Brands of the ISO base media format (ISO/IEC 14496-12, `ftyp`).
_AVIF, _HEIF = (b"avif", b"avis"), (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


class BadSampleError(DataError):
    """One image cannot be read; the run may go on without it.

    Attributes:
        path: the file, or `shard.tar::member`.
        reason: one line.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # all arguments, to survive pickling
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"

    @property
    def unavailable(self) -> bool:
        """Whether it is an `UnavailableSampleError`."""
        return isinstance(self, UnavailableError)


class UnavailableSampleError(BadSampleError, UnavailableError):
    """The file of an image cannot be read now, which says nothing about its content.

    What is measured without it is measured on another set.
    """

    def __str__(self) -> str:
        return f"{super().__str__()}. The image may be intact: make it readable first."


class Picture:
    """An image of known size; the pixels of a JPEG file are decoded on demand.

    Attributes:
        path: its location, for messages.
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
    """Decodes files to pixels of a given number of channels; picklable.

    3 channels are RGB: alpha is dropped, as in the reference. 1 channel is gray, as Pillow converts
    to it. Any other number must be that of the file: two to four with Pillow (in RGBA, alpha is the
    fourth), any in TIFF and NPY arrays, which are not converted to 1 or 3 either. Integer and float
    pixels beyond 8 bits are scaled (`arrays.to_8bit`); of 16-bit colour files Pillow keeps the
    upper 8. Differs: the EXIF orientation is applied; the reference loads rotated photographs lying
    on their side.

    Attributes:
        channels: C.
        white: the value of 1.0 in files of more than 8 bits; None guesses it for each file.
    """

    channels: int = 3
    max_pixel_value: float | None = None

    def open(self, data: bytes, path: str) -> Picture:
        """Read the header of a JPEG file, or decode any other.

        Args:
            data: the whole file.
            path: its name, for messages.

        Raises:
            BadSampleError: truncated, damaged, too large (more than twice Pillow's
                `MAX_IMAGE_PIXELS`), a PostScript program, no image, or has other channels.
        """
        if data.startswith(NPY_START):
            with _reasons(data, path):
                array = read_npy(data, channels=self.channels)
                return Picture.of(to_8bit(array, white=self.max_pixel_value), path)
        if self.channels not in _MODES:
            with _reasons(data, path):
                return Picture.of(self._channels_as_stored(data), path)
        with _reasons(data, path), _opened(data) as opened:  # the header only
            if opened.format != "JPEG":
                return Picture.of(self.upright_pixels(opened), path)
            width, height = opened.size
            orientation = _orientation(opened)
            colors = _TURBO_COLORSPACES.get((_MODES[self.channels], opened.mode))
            if orientation >= _FIRST_TRANSPOSED:
                width, height = height, width

        def decode(shrink: int) -> NDArray[np.uint8]:
            if orientation == 1 and colors:
                size = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
                try:  # strict: a warning of libjpeg, such as for a stream that ends early, raises
                    return np.asarray(simplejpeg.decode_jpeg(data, colors, **size, strict=True))
                except ValueError:  # anything unusual: Pillow decides whether it is readable
                    pass
            with _reasons(data, path), Image.open(io.BytesIO(data)) as opened:
                opened.draft(
                    None, (max(1, opened.width // shrink), max(1, opened.height // shrink))
                )
                return self.upright_pixels(opened)

        return Picture(path, width=width, height=height, decode=decode)

    def _channels_as_stored(self, data: bytes) -> NDArray[np.uint8]:
        """Pixels of a file that has exactly the requested channels."""
        if data[:4] in TIFF_STARTS and not self._is_for_pillow(data):
            array = np.ascontiguousarray(read_tiff(data, channels=self.channels))
            return to_8bit(array, white=self.max_pixel_value)
        with _opened(data) as opened:
            return self.upright_pixels(opened)

    def _is_for_pillow(self, tiff: bytes) -> bool:
        """Whether Pillow, which knows more compressions, reads a TIFF file without loss."""
        if self.channels > _MAX_PILLOW_CHANNELS:
            return False
        try:
            with _opened(tiff) as opened:
                return len(opened.getbands()) == self.channels and not _cut_to_8bit(opened)
        except UnidentifiedImageError:  # what it raises for many channels
            return False

    def upright_pixels(self, opened: Image.Image) -> NDArray[np.uint8]:
        """Load, convert and rotate Pillow's picture: uint8 (H, W, C); raises whatever it raises."""
        if self.max_pixel_value is not None and _cut_to_8bit(opened):
            raise ValueError(
                "Pillow keeps 8 of the 16 bit of colour pictures, which data.max_pixel_value "
                "cannot scale; store it as NPY, or set data.max_pixel_value=null"
            )
        opened.load()
        if min(opened.size) < 1:
            raise ValueError(f"the picture is {opened.width} x {opened.height} pixels")
        turn = _UPRIGHT.get(_orientation(opened))
        image = self._converted(opened)
        pixels = np.asarray(image if turn is None else image.transpose(turn))
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def _converted(self, image: Image.Image) -> Image.Image:
        """Convert to the requested channels."""
        mode = _MODES.get(self.channels)
        if mode is None:
            found = len(image.getbands())
            if found != self.channels:
                raise ValueError(
                    f"it has {found} channels (Pillow's mode {image.mode}), need {self.channels}; "
                    "set data.channels, or remove it"
                )
            return image
        if image.mode == mode:
            return image
        if image.mode == "F" or image.mode.startswith("I"):
            white = (
                _PGM_WHITE if (image.format, image.mode) == ("PPM", "I") else self.max_pixel_value
            )
            image = Image.fromarray(to_8bit(np.asarray(image), white=white))
        elif image.mode in ("La", "RGBa"):
            image = image.convert(image.mode.upper())
        return image.convert(mode)


RGB = Decoder()


class Animation:
    """A GIF, APNG or WebP file of several frames, or any picture as one frame.

    Frames are decoded one by one, in any order; in their own order that takes no detours.

    Attributes:
        path: its name, for messages.
        fps: frames per second, by the median of the times that frames are shown, as often one at
            an end stands longer; None if none is stated.
    """

    def __init__(self, data: bytes, path: str, decoder: Decoder) -> None:
        """Decode all frames once: some formats state their times only then.

        Raises:
            BadSampleError: damaged at its start, or nothing that Pillow opens.
        """
        self.path, self._data, self._decoder = path, data, decoder
        with _reasons(data, path):
            self._opened = _opened(data)
            self._number = int(getattr(self._opened, "n_frames", 1))
            self._opened.seek(0)
            self._opened.load()
            times_ms = self._times_ms()
        self._at = self._number  # behind all frames
        self.fps = 1000 / float(np.median(times_ms)) if times_ms else None

    def _times_ms(self) -> list[float]:
        """How long frames are shown, where it is stated, up to the first damaged one."""
        found = []
        for index in range(self._number):
            try:
                self._opened.seek(index)
                self._opened.load()
            except Exception:  # decoders raise anything; `pixels` names the frame
                break
            found.append(float(self._opened.info.get("duration") or 0))
        return [time for time in found if time > 0]

    def __len__(self) -> int:
        """Number of frames."""
        return self._number

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """A frame as it is shown, uint8 (H, W, C).

        Raises:
            BadSampleError: it, or one that it builds on, cannot be decoded.
        """
        with _reasons(self._data, f"{self.path}, frame {index}"):
            if index < self._at:  # Pillow's way back leaves the later frame in an APNG
                self._opened = _opened(self._data)
            self._at = self._number  # if this fails, the next one begins anew
            self._opened.seek(index)
            pixels = self._decoder.upright_pixels(self._opened)
            self._at = index
            return pixels


def read_as_stored(data: bytes, path: str) -> Image.Image:
    """Read a mask or label picture without conversion (palette numbers stay) or rotation.

    Raises:
        BadSampleError: truncated, damaged, too large or not an image.
    """
    with _reasons(data, path), _opened(data) as opened:
        opened.load()
        return opened.copy()


def begins_like_picture(start: bytes) -> bool:
    """Whether the first bytes of a file, 12 at least, are those of a usual picture format."""
    known = (*(magic for magic, _ in _PICTURES), *(magic.lower() for magic in TIFF_STARTS))
    return start.lower().startswith(known) or (start[:4], start[8:12]) == (b"RIFF", b"WEBP")


def _opened(data: bytes) -> Image.Image:
    """Pillow's picture, of which only the header is read; raises whatever Pillow raises."""
    opened = Image.open(io.BytesIO(data))
    if opened.format == "EPS":
        raise ValueError("EPS is a program that Ghostscript would have to run, not a picture")
    return opened


def _cut_to_8bit(opened: Image.Image) -> bool:
    """Whether loading will keep only the upper 8 of the 16 bits of each channel."""
    tiles = getattr(opened, "tile", [])
    return opened.mode[0] not in "IF" and any(";16" in str(tile[-1]) for tile in tiles)


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
    """EXIF orientation, 1 if there is none; damaged metadata leaves the picture readable."""
    try:
        # Pillow has already turned TIFF files upright and then lists no orientation.
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # any byte of the metadata may be wrong
        return 1


def _reason(error: Exception, data: bytes) -> str:
    """One line, the same on every run for the same file: without addresses of objects."""
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(data)
    if isinstance(error, MemoryError):
        return "decoding it needs more memory than there is"
    lines = str(error).splitlines()
    text = f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
    if isinstance(error, _DECODER_BUGS):
        return f"damaged in a way that its decoder does not expect ({text})"
    return text


def _unidentified(data: bytes) -> str:
    """What a file is that Pillow cannot identify."""
    if not any(data):
        return "all its bytes are zero, as a failed disk or copy leaves them"
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()  # UTF-8 byte order mark
    for magic, meaning in _NOT_PICTURES:
        if start.startswith(magic):
            return meaning
    if data[4:8] == b"ftyp":
        return _iso_media(brands=data[8:64])
    if data[:4] in TIFF_STARTS:
        return _tiff_unknown_to_pillow(data)
    for magic, name in _PICTURES:
        if data[: len(magic)].lower() == magic:
            return f"a {name} file that is damaged near its start, or of a kind unknown to Pillow"
    if begins_like_picture(data[:12]):
        return "a WebP file that is damaged near its start"
    return "not an image, or damaged in its first bytes, or in a format unknown to Pillow"


def _iso_media(*, brands: bytes) -> str:
    """What a file of the ISO base media format is, by its first and its compatible brands."""
    if any(brand in brands for brand in _AVIF) and features.check("avif"):
        return "an AVIF file that is damaged or cut off"
    if any(brand in brands for brand in _AVIF):
        return "an AVIF file, which this Pillow cannot decode"
    if brands[:4] in _HEIF:
        return "a HEIF/HEIC file, which this Pillow cannot decode"
    return "a video, or another file of the MP4 family, not a picture"


def _tiff_unknown_to_pillow(data: bytes) -> str:
    """What a TIFF file is that Pillow cannot identify: damaged, or an array it does not read."""
    try:
        shape, dtype = array_header(data)
    except Exception:  # damaged files fail in any way
        return "a TIFF file that is damaged or cut off"
    return (
        f"a TIFF file with an array {shape} of {dtype}, which Pillow does not read as a picture;"
        " store it as NPY, or set data.channels to its number of channels"
    )
