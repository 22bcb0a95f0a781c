"""What a recipe depends on: how many images a set has, their sizes and channels, and their copies.

Shape letters: n images of the sample, C channels.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.files import Files, open_pictures
from data_tools.headers import Header, read_header
from data_tools.journal import Json
from data_tools.near_duplicates import (
    THUMBNAIL,
    Groups,
    close_pairs,
    look_alike,
    perceptual_hash,
    thumbnail,
)
from data_tools.parallel import ordered_map
from data_tools.survey import sample_ids
from dinoscale.data.decoding.arrays import (
    INTEGER_WHITES,
    NPY_START,
    TIFF_STARTS,
    array_header,
    read_npy,
    read_tiff,
)
from dinoscale.data.decoding.decode import BadSampleError, Decoder
from dinoscale.data.sources.source import Source
from dinoscale.data.sources.synthetic import PREFIX
from dinoscale.errors import DataError, UnavailableError

SAMPLE = 1000  # images, read and decoded
_RADIUS = 6  # bits in which the hashes of copies differ at most; the default of `deduplicate`
_BLOCK = 32  # images that a process decodes at once
_COLORLESS = 2  # levels of 255 by which the channels of a gray picture differ, after JPEG
_OVERSHOOT = 1.1  # highest float of pictures from 0 to 1, whose resampling goes a little beyond
_GRAY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_ROW = np.dtype([("hash", "<u8"), ("hashed", "?"), ("thumbnail", "u1", (THUMBNAIL, THUMBNAIL, 3))])


@dataclass(frozen=True)
class SetFacts:
    """An image set, as a sample of it looks.

    Attributes:
        spec: as given.
        images: in the whole set.
        sample: images that were read.
        unreadable: of them.
        short_side: 5th percentile and median, in pixels.
        channels: of most files.
        other_channels: files of the sample that have another number.
        arrays: files of the sample that are arrays, which are not converted to gray or RGB.
        colorless: share of the readable ones that hold three equal channels, or one. Pictures are
            read as RGB for it, so that a colored one among gray ones is seen.
        max_pixel_value: white of files of more than 8 bits, a guess; None where all have 8, or no
            one number is white.
        mixed_scales: why none is, in words; empty otherwise.
        copies: images of the sample that look like an earlier one of it.
        mean: of each channel in 0..1, each picture counting the same; gray pictures have three.
        std: likewise.
        classes: number of class folders or labels; 0 for none.
        alike: paths of two images of the sample that look alike, of most copies; empty for none.
    """

    spec: str
    images: int
    sample: int
    unreadable: int
    short_side: tuple[int, int]
    channels: int
    other_channels: int
    arrays: int
    colorless: float
    max_pixel_value: float | None
    mixed_scales: str
    copies: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    alike: tuple[str, ...] = ()


def look_at(spec: str, *, images: int = SAMPLE, workers: int) -> SetFacts:
    """Read and decode a sample of a set, the same every time.

    Args:
        spec: one source of data.train, on a disk.
        images: how many to read.
        workers: number of processes; does not change the result.

    Raises:
        DataError: nothing is there, or none of the sample can be read.
        RunFailedError: a worker was killed.
        UnavailableError: an image cannot be read now: without it, these were facts of another set.
    """
    source = open_pictures(spec, Decoder())
    ids = sample_ids(len(source), wanted=images)
    stored = [_stored(source, int(index)) for index in ids[:: max(1, len(ids) // 200)]]
    kinds = Counter(kind.channels for kind in stored if kind is not None)
    if not kinds:
        raise DataError(f"{spec}: none of the {len(ids)} images looked at can be read")
    channels = kinds.most_common(1)[0][0]
    arrays = sum(kind is not None and kind.is_array for kind in stored)
    read_as = 3 if channels == 1 and not arrays else channels
    white, mixed = _white([kind.numbers for kind in stored if kind and kind.numbers])
    if (read_as, white) != (3, None):
        source = open_pictures(spec, Decoder(read_as, white))
    blocks = [ids[first : first + _BLOCK] for first in range(0, len(ids), _BLOCK)]
    found = list(ordered_map(_examine, source, blocks, workers=workers))
    sides = [side for block in found for side in block["sides"]]
    if not sides:
        raise DataError(f"{spec}: none of the {len(ids)} images looked at can be read")
    moments = np.array([moment for block in found for moment in block["moments"]])  # (n, 2, C)
    mean, square = moments.mean(axis=0)
    labels = source.labels
    rows = [row for block in found for row in block["rows"]]
    places = [place for block in found for place in block["places"]]  # of the rows
    groups = _alike(rows)
    largest = max(groups, key=len, default=[])
    return SetFacts(
        spec=spec,
        images=len(source),
        sample=len(ids),
        unreadable=sum(block["bad"] for block in found),
        short_side=(int(np.percentile(sides, 5)), int(np.median(sides))),
        channels=channels,
        other_channels=kinds.total() - kinds[channels],
        arrays=arrays,
        colorless=sum(block["colorless"] for block in found) / len(sides),
        max_pixel_value=white,
        mixed_scales=mixed,
        copies=sum(len(group) - 1 for group in groups),
        mean=tuple(round(float(value), 4) for value in mean),
        std=tuple(round(float(value), 4) for value in np.sqrt(np.maximum(square - mean**2, 0))),
        classes=0 if labels is None else len(np.unique(labels[labels >= 0])),
        alike=tuple(source.path(places[row]) for row in largest[:2]),
    )


@dataclass(frozen=True)
class _Numbers:
    """The range of a file of more than 8 bits, and whether it holds whole numbers."""

    low: float
    high: float
    whole: bool


@dataclass(frozen=True)
class _Stored:
    """How a file holds its picture: channels, and its numbers if it has more than 8 bits."""

    channels: int
    numbers: _Numbers | None = None
    is_array: bool = False


def _white(files: list[_Numbers]) -> tuple[float | None, str]:
    """The number that is white in all files of more than 8 bits, or None and why there is none.

    It is the smallest usual one that holds all numbers of the sample, or the highest of those; of
    floats, which have no depth, a usual one if that is near.
    """
    if not files:
        return None, ""
    count, low = len(files), min(numbers.low for numbers in files)
    high, whole = max(numbers.high for numbers in files), sum(numbers.whole for numbers in files)
    if below := sum(numbers.low < 0 for numbers in files):
        return None, f"{below} of {count} files hold numbers below 0, down to {low:g}"
    if whole not in (0, count):
        return None, f"{whole} of {count} files hold whole numbers, the others floats"
    if whole:
        return min((white for white in INTEGER_WHITES if white >= high), default=high), ""
    if high <= _OVERSHOOT:
        return 1.0, ""
    if small := sum(0 < numbers.high <= _OVERSHOOT for numbers in files):
        return None, f"{small} of {count} files hold numbers up to 1, others up to {high:g}"
    near = [white for white in INTEGER_WHITES if high <= white <= 2 * high]
    return min(near, default=high), ""


def _stored(source: Source | Files, index: int) -> _Stored | None:
    """None for a file that holds no image."""
    if source.path(index).startswith(PREFIX):
        return _Stored(3)
    try:
        data = source.data(index)  # type: ignore[union-attr]  # all but drawn sets have files
        header = read_header(data, source.path(index))
        return _array(data) if _is_array(header, data) else _picture(header, data)
    except UnavailableError:
        raise
    except Exception:  # decoders raise anything; the image counts as unreadable below
        return None


def _is_array(header: Header, data: bytes) -> bool:
    """Whether Pillow did not open it."""
    return data.startswith((NPY_START, *TIFF_STARTS)) and header.mode.islower()


def _array(data: bytes) -> _Stored:
    shape, dtype = array_header(data)
    channels = min(shape[0], shape[-1]) if len(shape) == 3 else 1
    if dtype == "uint8":
        return _Stored(channels, is_array=True)
    read = read_npy if data.startswith(NPY_START) else read_tiff
    return _Stored(channels, _numbers(read(data, channels=channels)), is_array=True)


def _picture(header: Header, data: bytes) -> _Stored:
    channels = 1 if header.mode in _GRAY_MODES else 3
    if not header.mode.startswith(("I", "F")) or header.format == "PPM":  # PGM says what is white
        return _Stored(channels)
    with Image.open(io.BytesIO(data)) as opened:
        return _Stored(channels, _numbers(np.asarray(opened)))


def _numbers(pixels: NDArray[Any]) -> _Numbers | None:
    """None without a finite number."""
    finite = pixels[np.isfinite(pixels)]
    if not finite.size:
        return None
    return _Numbers(float(finite.min()), float(finite.max()), pixels.dtype.kind != "f")


def _examine(source: Source, ids: NDArray[np.int64]) -> Json:
    """Short sides, moments and looks of a block of images."""
    found: dict[str, Any] = {"bad": 0, "colorless": 0, "sides": [], "moments": []}
    found |= {"rows": [], "places": []}
    for index in ids.tolist():
        try:
            pixels = source.picture(index).pixels()  # (H, W, C)
        except UnavailableError:
            raise
        except BadSampleError:
            found["bad"] += 1
            continue
        found["sides"].append(min(pixels.shape[:2]))
        scaled = pixels.reshape(-1, pixels.shape[-1]) / 255.0
        found["moments"].append([scaled.mean(axis=0), (scaled**2).mean(axis=0)])
        if pixels.shape[-1] in (1, 3):
            spread = pixels.max(axis=-1).astype(int) - pixels.min(axis=-1)
            found["colorless"] += bool(np.percentile(spread, 99) <= _COLORLESS)
            found["places"].append(index)
            found["rows"].append(_row(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))
    return found


def _row(pixels: NDArray[np.uint8]) -> NDArray[np.void]:
    row, pixels = np.zeros((), dtype=_ROW), np.ascontiguousarray(pixels)
    signature = perceptual_hash(pixels)
    row["hash"], row["hashed"] = signature or 0, signature is not None
    row["thumbnail"] = thumbnail(pixels)
    return row


def _alike(listed: list[NDArray[np.void]]) -> list[list[int]]:
    """Groups of two or more that look alike, by their places in the list."""
    if not listed:
        return []
    rows = np.array(listed, dtype=_ROW)
    ids, groups = np.flatnonzero(rows["hashed"]), Groups(len(rows))
    for places in close_pairs(rows["hash"][ids], radius=_RADIUS):
        for one, other in ids[places].tolist():
            if look_alike(rows, one, np.array([other]), radius=_RADIUS).all():
                groups.join(one, other)
    return groups.of_several()
