"""Videos, with object masks or without: numbered frames in tar shards or folders, in time order.

`SEQUENCE/00000.jpg`, if it has a mask with `SEQUENCE/00000.mask.png` beside it, in tars or in a
folder; or the layout of DAVIS, `JPEGImages/480p/SEQUENCE/00000.jpg` and
`Annotations/480p/SEQUENCE/00000.png`.
"""

from __future__ import annotations

import io
import logging
import os
import posixpath
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.shards.samples import picture_of, split_name
from dinoscale.data.shards.tar_headers import Member, read_members
from dinoscale.data.sources.image_files import read_image_file, unavailable
from dinoscale.data.sources.reopening_file import ReopeningFile
from dinoscale.data.sources.source import expand_pattern
from dinoscale.errors import DataError
from dinoscale.runtime.retry import path_exists, with_retries

log = logging.getLogger(__name__)

VOID = 255  # in an indexed mask: pixels that are not evaluated (DAVIS, PASCAL VOC)
MAX_OBJECTS = 64  # a mask with more numbers is a photograph, or was smoothed
_MASK = "mask.png"
_DAVIS_LIST = os.path.join("ImageSets", "2017", "val.txt")  # the sequences of published results
_DAVIS_SIZE = "480p"


@dataclass(frozen=True)
class File:
    """A file of its own, or a member of a tar."""

    path: str
    member: Member | None = None

    def __str__(self) -> str:
        return self.path if self.member is None else f"{self.path}::{self.member.name}"

    def read(self) -> bytes:
        """All its bytes.

        Raises:
            BadSampleError: it cannot be read.
        """
        if self.member is None:
            return read_image_file(self.path)
        try:
            with ReopeningFile(self.path) as tar:
                return tar.read_at(self.member.size, self.member.offset)
        except OSError as error:
            raise unavailable(str(self), error) from None


@dataclass(frozen=True)
class Frame:
    """One picture, and its mask if it has one."""

    number: int
    image: File
    mask: File | None


@dataclass(frozen=True)
class Video:
    """Frames in time order; of `open_videos`, the first has a mask."""

    name: str
    frames: tuple[Frame, ...]

    def pixels(self, index: int, decoder: Decoder) -> NDArray[np.uint8]:
        """The picture of a frame, (H, W, C).

        Raises:
            BadSampleError: it cannot be decoded.
        """
        image = self.frames[index].image
        return decoder.open(image.read(), str(image)).pixels()

    def mask(self, index: int, *, size: tuple[int, int]) -> NDArray[np.uint8] | None:
        """Object numbers of a frame, (H, W): 0 background, VOID not evaluated; None without mask.

        Args:
            index: index of the frame.
            size: (H, W) of its picture.

        Raises:
            DataError: it cannot be decoded, is not a mask, or has another size than the picture.
        """
        file = self.frames[index].mask
        if file is None:
            return None
        values, _ = _read_mask(file, size=size)
        return (values > 127).astype(np.uint8) if self._one_object else values

    @cached_property
    def _one_object(self) -> bool:
        """Whether the masks are grey with 255 for the object (DAVIS 2016), by that of frame 0."""
        first = self.frames[0].mask
        assert first is not None
        values, mode = _read_mask(first, size=None)
        return mode != "P" and set(np.unique(values).tolist()) <= {0, 255}


def object_numbers(mask: NDArray[np.uint8], *, name: str) -> list[int]:
    """Numbers of the objects in a mask, ascending.

    Raises:
        DataError: there are no objects, or too many for a mask.
    """
    numbers = [int(value) for value in np.unique(mask) if value not in (0, VOID)]
    if not 0 < len(numbers) <= MAX_OBJECTS:
        found = f"{len(numbers)} objects" if numbers else "no object"
        raise DataError(
            f"{name}: the mask of the first frame shows {found}; need 1 to {MAX_OBJECTS}. A mask "
            "is an indexed PNG of object numbers, or a grey one of 0 and 255."
        )
    return numbers


def _read_mask(file: File, *, size: tuple[int, int] | None) -> tuple[NDArray[np.uint8], str]:
    """Values of a PNG as they are stored, (H, W), and Pillow's mode of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(file.read()), formats=["PNG"]) as image:
                _check_mask(file, image, size=size)
                values = np.asarray(image.convert("L") if image.mode == "1" else image)
                return values, image.mode
    except DataError:
        raise
    except Exception as error:  # decoders raise anything
        raise DataError(f"{file}: not a readable PNG mask ({type(error).__name__}).") from None


def _check_mask(file: File, image: Image.Image, *, size: tuple[int, int] | None) -> None:
    if image.mode not in ("1", "L", "P"):
        raise DataError(
            f"{file}: a mask needs one number per pixel (indexed or grey PNG), not {image.mode}."
        )
    if size is not None and (image.height, image.width) != size:
        raise DataError(
            f"{file}: the mask has {image.width} x {image.height} pixels, its frame "
            f"{size[1]} x {size[0]}. Scale masks to the size of the frames with nearest-neighbour "
            "interpolation."
        )


def open_videos(spec: str, *, names: Sequence[str] | None = None) -> list[Video]:
    """List the videos whose first frames have masks; arguments as of `list_videos`.

    Raises:
        DataError: as of `list_videos`, a frame is missing in the middle, or a first frame has no
            mask.
        UnavailableError: the file system failed for about a minute.
    """
    videos = list_videos(spec, names=names)
    for video in videos:
        _require_no_gap(video)
        if video.frames[0].mask is None:
            raise DataError(
                f"{video.name}: the first frame, {video.frames[0].image}, has no mask, which "
                "defines the objects."
            )
    return videos


def list_videos(spec: str, *, names: Sequence[str] | None = None) -> list[Video]:
    """List the videos of a folder or of tar shards; pictures are read later.

    Args:
        spec: a tar, a brace pattern or glob of tars, a folder of tars, a folder of frames or of
            sequences, or the folder of DAVIS, where by default only `ImageSets/2017/val.txt` is
            taken.
        names: names of the sequences to take; None takes all.

    Returns:
        In the order of their names, or of `names`.

    Raises:
        DataError: nothing is there or cannot be listed, a sequence that was named is not there, or
            a frame has no number, that of another one, or lies in two tars.
        UnavailableError: the file system failed for about a minute.
    """
    path = os.path.expanduser(spec)
    with_retries(lambda: path_exists(path), path)  # or the file system fails
    if os.path.isdir(os.path.join(path, "JPEGImages")):
        files = list(_davis_files(path))
        names = _davis_names(path) if names is None else names
    else:
        files = list(_plain_files(spec, path))
    frames: dict[str, dict[str, dict[str, File]]] = {}  # sequence -> frame -> extension -> file
    for name, file in files:
        key, extension = split_name(name)
        sequence, _, frame = key.rpartition("/")
        if frame:
            of_frame = frames.setdefault(sequence, {}).setdefault(frame, {})
            before = of_frame.setdefault(extension, file)
            if before.path != file.path:
                raise DataError(f"{before} and {file} are the same frame. Keep one of them.")
            of_frame[extension] = file  # of a tar that was appended to, the last one counts
    found = {
        name: members for name, members in frames.items() if any(map(picture_of, members.values()))
    }
    if not found:
        raise DataError(
            f"{spec}: no videos. Need SEQUENCE/00000.jpg (its mask is SEQUENCE/00000.mask.png) in "
            "tars or a folder, or the folders JPEGImages and Annotations of DAVIS."
        )
    missing = [name for name in names or () if name not in found]
    if missing:
        raise DataError(
            f"{spec}: has no sequence {missing[0]!r} ({len(missing)} of those named are "
            f"missing); it has {', '.join(sorted(found)[:5])}, ..."
        )
    return [_video(name, found[name]) for name in (sorted(found) if names is None else names)]


def _plain_files(spec: str, path: str) -> Iterator[tuple[str, File]]:
    """Names that begin with the sequence, from tars or a folder of sequences."""
    tars = [path] if os.path.isfile(path) else []
    if os.path.isdir(path):
        listed = with_retries(lambda: os.listdir(path), f"the folder {path}")
        tars = sorted(os.path.join(path, name) for name in listed if name.endswith(".tar"))
        if not tars:
            yield from _folder_files(path)
    elif not tars:
        tars = expand_pattern(path)
    for tar in tars:
        if not tar.endswith(".tar"):
            raise DataError(f"{tar} is not a .tar (named by {spec}). Name tars or a folder.")
        stem = os.path.splitext(os.path.basename(tar))[0]
        for member in read_members(tar):
            name = posixpath.normpath(member.name)  # `tar -C dir .` puts `./` before all
            yield name if "/" in name else f"{stem}/{name}", File(tar, member)


def _folder_files(root: str) -> Iterator[tuple[str, File]]:
    walk = with_retries(lambda: list(os.walk(root, onerror=_raised)), f"the folder {root}")
    for folder, _, files in walk:
        relative = os.path.relpath(folder, root)
        inside = os.path.basename(os.path.abspath(root)) if relative == "." else relative
        for name in sorted(files):
            yield f"{inside}/{name}", File(os.path.join(folder, name))


def _raised(error: OSError) -> None:
    raise error


def _davis_files(root: str) -> Iterator[tuple[str, File]]:
    """DAVIS keeps masks apart, under the names of the frames."""
    for kind in ("JPEGImages", "Annotations"):
        folder = os.path.join(root, kind)
        if os.path.isdir(os.path.join(folder, _DAVIS_SIZE)):
            folder = os.path.join(folder, _DAVIS_SIZE)
        if not os.path.isdir(folder):
            raise DataError(f"{root}: has JPEGImages, but {folder} is missing, the masks.")
        for name, file in _folder_files(folder):
            stem, _ = os.path.splitext(name)
            yield (f"{stem}.{_MASK}" if kind == "Annotations" else name), file


def _davis_names(root: str) -> list[str] | None:
    path = os.path.join(root, _DAVIS_LIST)
    if not os.path.isfile(path):
        return None
    log.info("%s: the sequences of %s", root, _DAVIS_LIST)
    return read_names(path)


def read_names(path: str) -> list[str]:
    """Sequences that a text file names, one per line.

    Raises:
        DataError: it cannot be read, or is empty.
    """

    def read() -> list[str]:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]

    try:
        names = with_retries(read, f"the list of sequences {path}")
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read the list of sequences {path}: {error}.") from None
    if not names:
        raise DataError(f"the list of sequences {path} is empty. Write one name per line.")
    return names


def _video(name: str, members: dict[str, dict[str, File]]) -> Video:
    frames = []
    for stem, files in members.items():
        extension = picture_of(files)
        number = re.search(r"\d{1,9}$", stem)
        if extension and number is None:
            raise DataError(f"{files[extension]}: a frame is named by its number, as 00000.jpg.")
        if extension and number:
            frames.append(Frame(int(number[0]), files[extension], files.get(_MASK)))
    frames.sort(key=lambda frame: frame.number)
    for before, after in pairwise(frames):
        if before.number == after.number:
            twice = before.number
            raise DataError(f"{name}: two frames have the number {twice}. Keep one of them.")
    return Video(name, tuple(frames))


def _require_no_gap(video: Video) -> None:
    """Refuse a gap: propagation would jump, and results would not be comparable."""
    numbers = [frame.number for frame in video.frames]
    gaps = [after - before for before, after in pairwise(numbers)]
    wrong = [i for i, gap in enumerate(gaps) if gap != min(gaps)]
    if wrong:
        before, after = numbers[wrong[0]], numbers[wrong[0] + 1]
        raise DataError(
            f"{video.name}: frames are missing between {before:05d} and {after:05d}. Bring them, "
            "or make two sequences of it."
        )
