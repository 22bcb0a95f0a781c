"""Tar shards in the WebDataset layout as a random-access source.

An index on disk (`shard_index.py`) holds the location of each image. Reading an image is then one
`pread`, so any order is possible, and a process needs no memory per image.
"""

import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.decoding.decode import RGB, Decoder, Picture
from dinoscale.data.shards.samples import group_samples, picture_of
from dinoscale.data.shards.shard_index import Shard, open_shard_index, shards_named
from dinoscale.data.shards.tar_headers import Member, read_members
from dinoscale.data.sources.image_files import MAX_IMAGE_BYTES, unavailable
from dinoscale.data.sources.left_out import LeftOut
from dinoscale.data.sources.reopening_file import ReopeningFile
from dinoscale.errors import DataError
from dinoscale.runtime.retry import RetryBudget

log = logging.getLogger(__name__)

_MAX_OPEN_SHARDS = 128  # a process may usually open 1024 files


class TarSource:
    """Images in uncompressed tar shards, in the order of the shards and of the samples in them.

    Attributes:
        left_out: files that may have been meant as images but are left out.

    Args:
        shards: paths of the tar files.
        decoder: decodes the files.
        heartbeat: called repeatedly while shards are indexed.
        num_processes: processes that index many shards; None: one per core.

    Raises:
        DataError: a shard is missing, damaged or compressed, or no shard holds an image.
    """

    def __init__(
        self,
        shards: Sequence[str],
        decoder: Decoder = RGB,
        heartbeat: Callable[[], None] = lambda: None,
        *,
        num_processes: int | None = None,
    ):
        self._decoder = decoder
        paths = [os.path.abspath(path) for path in shards]
        self._index, self._shards = open_shard_index(paths, heartbeat, num_processes=num_processes)
        self.left_out = _report(self._shards)
        self._ends = list(accumulate(shard.num_images for shard in self._shards))
        self._retries = RetryBudget()
        self._files: OrderedDict[int, ReopeningFile] = OrderedDict()  # by shard, oldest use first

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, object]:
        """Without open files: another process opens its own."""
        return {**self.__dict__, "_files": OrderedDict()}

    def path(self, index: int) -> str:
        """`shard.tar::member` of an image."""
        return f"{self._shards[self._shard_of(index)].path}::{self._index.name(index)}"

    @property
    def index_path(self) -> str:
        """Path of the index; a temporary one is removed together with this object."""
        return self._index.path

    def files(self) -> Iterator[str]:
        """Absolute paths of the shards, in their order."""
        return (shard.path for shard in self._shards)

    def size(self, index: int) -> int:
        """Bytes of an image's file."""
        return self._index.numbers(index)[1]

    def sizes(self) -> Iterator[int]:
        """Bytes of the files of all images."""
        return (size for _, (_, size, _) in self._index.rows(0, len(self)))

    def identity(self, heartbeat: Callable[[], None] = lambda: None, /) -> str:
        """Digest of names and sizes within the shards, wherever the shards lie."""
        return self._index.digest(number=1, heartbeat=heartbeat)

    def data(self, index: int) -> bytes:
        """The file of an image as it is.

        Raises:
            BadSampleError: it cannot be read, or its shard is no longer as indexed.
        """
        offset, size, _ = self._index.numbers(index)
        try:
            return self._read(self._shard_of(index), offset=offset, size=size)
        except OSError as error:
            raise unavailable(self.path(index), error) from None

    def picture(self, index: int) -> Picture:
        """Read an image.

        Raises:
            BadSampleError: it cannot be read or decoded, or its shard is no longer as indexed.
        """
        return self._decoder.open(self.data(index), self.path(index))

    def sample_file(self, index: int, extension: str) -> bytes | None:
        """Another file of an image's sample, such as `mask.png`; None if there is none.

        The first call reads the headers of all shards again: the index lists only images.

        Raises:
            BadSampleError: it cannot be read.
        """
        member = self._samples[index].get(extension)
        if member is None:
            return None
        try:
            return self._read(self._shard_of(index), offset=member.offset, size=member.size)
        except OSError as error:
            path = f"{self._shards[self._shard_of(index)].path}::{member.name}"
            raise unavailable(path, error) from None

    @cached_property
    def _samples(self) -> list[dict[str, Member]]:
        """Extension -> member, in the order of the images."""
        samples = (group_samples(read_members(shard.path))[0] for shard in self._shards)
        return [sample for of_shard in samples for sample in of_shard if picture_of(sample)]

    def _shard_of(self, index: int) -> int:
        return bisect_right(self._ends, index)

    def _read(self, shard: int, *, offset: int, size: int) -> bytes:
        if size > MAX_IMAGE_BYTES:
            raise OSError(f"{size} bytes are too many for one image")
        file = self._files.pop(shard, None)
        if file is None:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            file = ReopeningFile(self._shards[shard].path, self._retries)
        self._files[shard] = file  # last used
        data = file.read_at(size, offset)
        _check_unchanged(file.status(), self._shards[shard])  # after reading what it covers
        return data

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers (N,) from the `.cls` members, -1 where unreadable; None without any."""
        if not any(shard.num_labelled for shard in self._shards):
            return None
        numbers = (label for _, (_, _, label) in self._index.rows(0, len(self)))
        return np.fromiter(numbers, dtype=np.int64, count=len(self))

    @property
    def class_names(self) -> list[str] | None:
        """None: shards carry class numbers only."""
        return None


def _check_unchanged(status: os.stat_result, shard: Shard) -> None:
    """Refuse a changed shard, which may hold another picture here; costs a microsecond."""
    if status.st_size < shard.size:
        raise OSError("the shard has become shorter since it was indexed")
    if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
        raise OSError("the shard has changed since it was indexed")


def _report(shards: Sequence[Shard]) -> LeftOut:
    """Log once what is left out; refuse shards without any image."""
    paths = [shard.path for shard in shards]
    left_out = LeftOut()
    for shard in shards:
        left_out.merge(shard.left_out)
    left_out.warn(shards_named(paths))
    empty = [shard.path for shard in shards if not shard.num_images]
    if len(empty) == len(shards):
        raise DataError(
            f"no images in {shards_named(paths)}. A sample needs a member with an image extension, "
            "e.g. 0001.jpg or 0001.png."
        )
    if empty:
        log.warning("no images in %s", shards_named(empty))
    log.info("%s: %d images", shards_named(paths), sum(shard.num_images for shard in shards))
    return left_out
