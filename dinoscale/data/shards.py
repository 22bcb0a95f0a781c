"""Tar shards in the WebDataset layout as a random-access source.

Opening reads the headers only and keeps (shard, offset, size) of every image in arrays; an image
is then one `pread`, so that any order is possible and tars are only storage. Files that share a
key (folder and name up to the first dot) make one sample: `0001.jpg`, `0001.cls`.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.decode import RGB, BadSampleError, Decoder, Picture
from dinoscale.data.names import PackedNames
from dinoscale.data.tar_headers import Member, read_members
from dinoscale.errors import DataError

log = logging.getLogger(__name__)

# Of several pictures of one sample the one named first here is taken: masks are never JPEGs, and
# an array beside a picture holds its features or labels.
_IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "jpe", "jfif", "webp", "avif", "jp2", "j2k", "mpo", "png", "bmp", "dib", "gif",
    "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "pfm", "qoi", "tga", "ico", "img", "npy",
)  # fmt: skip
# `0001.mask.png` describes the picture 0001; `0001.left.png` may be one.
_NOT_PICTURES = {"alpha", "anno", "annotation", "depth", "gt", "label", "mask", "seg", "target"}

_MAX_LABEL_BYTES = 64  # a class number needs fewer
_MAX_OPEN_SHARDS = 128  # a process may usually open 1024 files
_SCAN_THREADS = 8  # headers wait for the storage, not for the processor


_NO_MEMBER = Member("", -1, -1)


@dataclass(frozen=True)
class _ShardIndex:
    """Images of one shard, in the order of their samples."""

    names: PackedNames
    places: NDArray[np.int64]  # (N, 4): image offset and size, label offset and size, in bytes
    num_without_image: int


class TarSource:
    """Images in uncompressed tar shards, in the order of the shards and of the samples in them.

    Args:
        shards: paths of the tar files.
        decoder: what the pixels of a file become.

    Raises:
        DataError: a shard is missing, damaged or compressed, or no shard holds an image.
    """

    def __init__(self, shards: Sequence[str], decoder: Decoder = RGB):
        self._decoder = decoder
        self._shards = [os.path.abspath(path) for path in shards]
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            indexes = list(pool.map(_index_shard, self._shards))
        _report(self._shards, indexes)
        counts = [len(index.names) for index in indexes]
        self._names = PackedNames.joined([index.names for index in indexes])
        self._shard_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        places = np.concatenate([index.places for index in indexes])
        self._offset, self._size, self._label_offset, self._label_size = places.T
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, oldest use first

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict[str, object]:
        """Without descriptors: another process opens its own."""
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def path(self, index: int) -> str:
        """`shard.tar::member` of an image."""
        return f"{self._shards[self._shard_of[index]]}::{self._names[index]}"

    def picture(self, index: int) -> Picture:
        """Read an image.

        Raises:
            BadSampleError: it cannot be read or decoded.
        """
        try:
            data = self._read(
                int(self._shard_of[index]), int(self._offset[index]), int(self._size[index])
            )
        except OSError as error:
            raise BadSampleError(self.path(index), f"cannot be read: {error}") from None
        return self._decoder.open(data, self.path(index))

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        descriptor = self._files.pop(shard, None)
        if descriptor is None:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            descriptor = os.open(self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = descriptor  # last used
        data = os.pread(descriptor, size, offset)
        while len(data) < size:  # a signal or a network file system may cut a read short
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError("the shard has become shorter since it was opened")
            data += more
        return data

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers (N,) from the `.cls` members, -1 where unreadable; None without any."""
        if not (self._label_size >= 0).any():
            return None
        labels = [self._label(i) for i in range(len(self))]
        return np.array(labels, dtype=np.int64)

    def _label(self, index: int) -> int:
        size = int(self._label_size[index])
        if not 0 < size <= _MAX_LABEL_BYTES:
            return -1
        try:
            data = self._read(int(self._shard_of[index]), int(self._label_offset[index]), size)
        except OSError as error:
            raise DataError(f"cannot read the label of {self.path(index)}: {error}") from None
        text = data.strip()
        return int(text) if text.isdigit() and len(text) < 19 else -1  # 19 digits may overflow

    @property
    def class_names(self) -> list[str] | None:
        """None: shards carry class numbers only."""
        return None


def _report(shards: Sequence[str], indexes: Sequence[_ShardIndex]) -> None:
    """Say once what is left out; stop when nothing is left."""
    empty = [path for path, index in zip(shards, indexes, strict=True) if not len(index.names)]
    if len(empty) == len(shards):
        raise DataError(
            f"no images in {_some(shards)}. A sample needs a member with an image extension, e.g. "
            "0001.jpg or 0001.png."
        )
    if empty:
        log.warning("no images in %s", _some(empty))
    without = sum(index.num_without_image for index in indexes)
    if without:
        log.warning("skipped %d samples without an image in %s", without, _some(shards))
    log.info("%s: %d images", _some(shards), sum(len(index.names) for index in indexes))


def _some(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more shards"


def _index_shard(path: str) -> _ShardIndex:
    """Read the headers of one shard and group its members into samples."""
    samples: list[dict[str, Member]] = []  # extension -> member
    latest: dict[str, dict[str, Member]] = {}  # key -> the sample last begun with it
    for member in read_members(path):
        key, extension = _split_name(member.name)
        if not key:
            continue  # a hidden file or one without extension
        sample = latest.get(key)
        if sample is None or extension in sample:  # a repeated key is another sample
            sample = latest[key] = {}
            samples.append(sample)
        sample[extension] = member
    names = []
    places = []
    for sample in samples:
        extension = _picture(sample)
        if extension:
            image, label = sample[extension], _label_of(sample, extension)
            names.append(image.name)
            places.append((image.offset, image.size, label.offset, label.size))
    return _ShardIndex(
        PackedNames(names),
        np.array(places, dtype=np.int64).reshape(-1, 4),
        len(samples) - len(names),
    )


def _split_name(name: str) -> tuple[str, str]:
    """Key (folder and name up to the first dot) and lower-case extension (the rest)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return "", ""
    return folder + slash + stem, extension.lower()


def _picture(sample: dict[str, Member]) -> str:
    """Extension of the picture, not of its mask: the plainest one, JPEG before PNG; else empty."""
    ranks = []
    for extension in sample:
        *middle, last = extension.split(".")
        if last in _IMAGE_EXTENSIONS and not _NOT_PICTURES.intersection(middle):
            ranks.append((len(middle), _IMAGE_EXTENSIONS.index(last), extension))
    return min(ranks)[2] if ranks else ""


def _label_of(sample: dict[str, Member], picture: str) -> Member:
    """`KEY.cls`, or `KEY.left.cls` beside `KEY.left.jpg`."""
    middle, dot, _ = picture.rpartition(".")
    return sample.get("cls") or sample.get(f"{middle}{dot}cls") or _NO_MEMBER
