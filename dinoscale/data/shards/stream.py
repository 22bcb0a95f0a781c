"""Tar shards that can only be read from front to back: remote ones and outputs of commands.

What is exact: an epoch draws every image once (or its quota), and none on two ranks or workers. The
sequence is a function of (seed, step), whatever the number of ranks and workers. So a resumed run
continues with the next image, skipping whole shards by their counts. What is not: the shuffle is
local. Shards come in random order, but the images of a micro-batch come from one block of
neighbours, so the shards themselves should be filled in random order. The order also depends on
micro_batch_size, `data.stream_readers` and `data.shuffle_buffer`.
"""

import copy
import hashlib
import io
import json
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoscale.data.decoding.decode import RGB, BadSampleError, Decoder, Picture
from dinoscale.data.shards.remote import (
    PAUSES_S,
    DamagedError,
    RemoteFile,
    TransferError,
    open_remote,
    retried,
    shown,
)
from dinoscale.data.shards.samples import (
    START_BYTES,
    group_samples,
    left_out_of_samples,
    may_be_picture,
    picture_of,
    split_name,
    why_no_sample,
)
from dinoscale.data.shards.tar_headers import Member
from dinoscale.data.sources.left_out import LeftOut, is_junk
from dinoscale.errors import DataError

_MAX_FILE_BYTES = 256 * 2**20  # of a picture


class Blocks:
    """How the images of all shards are numbered, and cut into blocks of neighbours.

    A block lies in one shard; the lengths of the blocks of a shard differ by at most one.

    Args:
        counts: images of each shard, >= 1.
        block_size: most images of a block, >= 1.
    """

    def __init__(self, counts: Sequence[int], *, block_size: int):
        self.counts = np.array(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])  # numbers of the first images
        self._block_size = block_size

    def shard_of(self, index: int) -> int:
        """The shard that an image is in."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def block_of(self, index: int) -> range:
        """The numbers of the images in the block of an image."""
        shard = self.shard_of(index)
        start, count = int(self.starts[shard]), int(self.counts[shard])
        blocks = -(-count // self._block_size)
        block = ((index - start + 1) * blocks - 1) // count
        return range(start + block * count // blocks, start + (block + 1) * count // blocks)


class StreamSource:
    """Images of shards read from front to back, one block at a time.

    Any image can be read, but only the order of a `StreamSampler` is cheap: it takes all images of
    a block before the next block of the shard. Any other order opens the shard again.

    Args:
        urls: URLs of the shards.
        counts: images in each, >= 1.
        block_size: most images of a shard held in memory.
        decoder: decodes the files.
        pauses_s: seconds before each retry of a shard.
        max_lost: fraction of the pictures of a shard that may be left out, as `LeftOut` counts
            them. It is known only at the end of a shard.
    """

    labels = None
    class_names = None

    def __init__(
        self,
        urls: Sequence[str],
        counts: Sequence[int],
        *,
        block_size: int,
        decoder: Decoder = RGB,
        pauses_s: Sequence[float] = PAUSES_S,
        max_lost: float = 1.0,
    ):
        self.blocks = Blocks(counts, block_size=block_size)
        self._urls = tuple(urls)
        self._decoder = decoder
        self._pauses_s = tuple(pauses_s)
        self._max_lost = max_lost
        self._reported: set[int] = set()  # shards whose omissions were logged
        self._finished: dict[int, LeftOut] = {}
        self._lanes = 1
        self._readers: OrderedDict[range, _ShardReader] = OrderedDict()  # by block, oldest first

    def __len__(self) -> int:
        return int(self.blocks.starts[-1])

    def __getstate__(self) -> dict[str, object]:
        """Without open shards: another process opens its own."""
        return {**self.__dict__, "_readers": OrderedDict(), "_finished": {}}

    def serving(self, *, lanes: int) -> "StreamSource":
        """The same images for a process that alternates between so many lanes."""
        copied = copy.copy(self)  # without open shards
        copied._lanes = lanes
        return copied

    def path(self, index: int) -> str:
        """The shard and the place in it, from 0: names are known only when read."""
        shard = self.blocks.shard_of(index)
        return f"{shown(self._urls[shard])}::{index - int(self.blocks.starts[shard])}"

    def identity(self, _alive: Callable[[], None] = lambda: None, /) -> str:
        """Digest of the file names of the shards and of the number of images in each."""
        names = [url.partition("?")[0].rpartition("/")[2] for url in self._urls]
        text = json.dumps([names, self.blocks.counts.tolist()])
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    def picture(self, index: int) -> Picture:
        """Read an image; reads on to its block if that is not in memory.

        Raises:
            BadSampleError: the picture cannot be decoded.
            DataError: the shard is damaged up to there, or holds another number of pictures.
            UnavailableError: it cannot be read after minutes of retries.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        name, data = self._reader(index).take(index)
        path = f"{self.path(index)} ({name})"
        if data is None:
            raise BadSampleError(path, f"is larger than {_MAX_FILE_BYTES // 2**20} MiB")
        return self._decoder.open(data, path)

    def take_left_out(self) -> dict[int, LeftOut]:
        """Shard -> what was left out, for the shards read to their end since the last call."""
        finished, self._finished = self._finished, {}
        return finished

    def _reader(self, index: int) -> "_ShardReader":
        """The reader that holds the block of an image."""
        block = self.blocks.block_of(index)
        if block in self._readers:
            self._readers.move_to_end(block)
            return self._readers[block]
        before = self.blocks.block_of(block.start - 1) if block.start else None
        shard = self.blocks.shard_of(index)
        in_shard = range(int(self.blocks.starts[shard]), int(self.blocks.starts[shard + 1]))
        if before is not None and before in self._readers and before.start >= in_shard.start:
            reader = self._readers.pop(before)
        else:
            self._make_room()
            reader = _ShardReader(self._urls[shard], in_shard, pauses_s=self._pauses_s)
        reader.read(block)
        self._readers[block] = reader
        if block.stop == in_shard.stop:
            self._finish_shard(shard, reader.left_out, used=len(in_shard))
        return reader

    def _finish_shard(self, shard: int, left_out: LeftOut, *, used: int) -> None:
        """Log what was left out of a shard that was read to its end, or refuse it."""
        where = shown(self._urls[shard])
        if shard not in self._reported:
            self._reported.add(shard)
            left_out.warn(where)
        if left_out.counts:
            self._finished[shard] = left_out
        left_out.require_few(where, used=used, max_fraction=self._max_lost)

    def _make_room(self) -> None:
        """Close readers that are used up, and those used least recently beyond two per lane.

        One micro-batch may take the last images of a shard and the first ones of the next.
        """
        for block, reader in list(self._readers.items()):
            if reader.is_used_up():
                self._readers.pop(block).close()
        while len(self._readers) >= 2 * self._lanes:
            self._readers.popitem(last=False)[1].close()


class _ShardReader:
    """One pass over a shard, and the block read last.

    Attributes:
        left_out: what was left out since the shard was opened.

    Args:
        url: URL of the shard.
        images: numbers of its images.
        pauses_s: seconds before each retry.
    """

    def __init__(self, url: str, images: range, *, pauses_s: Sequence[float]):
        self._url, self._images, self._pauses_s = url, images, pauses_s
        self.left_out = LeftOut()
        self._end = _EndMark()
        self._file: RemoteFile | None = None
        self._pictures: Iterator[tuple[str, bytes | None]] = iter(())
        self._next = images.start  # number of the picture that comes next
        self._held: dict[int, tuple[str, bytes | None]] = {}
        self._taken: set[int] = set()

    def take(self, index: int) -> tuple[str, bytes | None]:
        """Name and bytes of a picture of the block; None instead of the bytes of a huge file."""
        self._taken.add(index)
        return self._held[index]

    def is_used_up(self) -> bool:
        """Whether it holds the last block and all images of it were taken."""
        return self._next == self._images.stop and len(self._taken) == len(self._held)

    def read(self, block: range) -> None:
        """Skip to a block and hold it instead of the last one.

        Raises:
            DataError: it is damaged at every try, or the shard has another length.
            UnavailableError: it cannot be read after minutes of retries.
        """
        self._held, self._taken = {}, set()
        name = f"the shard {shown(self._url)}"
        retried(lambda: self._try(block), name=name, pauses_s=self._pauses_s)

    def _try(self, block: range) -> None:
        try:
            self._read_on(block)
        except (TransferError, tarfile.TarError, ValueError, OverflowError) as error:
            self.close()  # the retry starts from the front and skips what was read
            what = error.args[0] if error.args else type(error).__name__
            unavailable = isinstance(error, TransferError) and not isinstance(error, DamagedError)
            kind = TransferError if unavailable else DamagedError
            raise kind(f"picture {self._next - self._images.start}: {what}") from None
        except BaseException:
            self.close()
            raise

    def _read_on(self, block: range) -> None:
        if self._file is None:
            self._file = open_remote(self._url)
            self.left_out, self._end = LeftOut(), _EndMark()
            self._pictures = _pictures(self._file, shown(self._url), self.left_out, self._end)
            self._next = self._images.start
        while self._next < block.stop:
            picture = next(self._pictures, None)
            if picture is None and not self._end.is_marked:
                raise DamagedError("it ends between two files, without the end mark of a tar")
            if picture is None:
                raise self._other_count(f"only {self._next - self._images.start}")
            if self._next in block:
                self._held[self._next] = picture
            self._next += 1
        if block.stop == self._images.stop:
            if next(self._pictures, None) is not None:
                raise self._other_count("more")
            self.close()

    def _other_count(self, found: str) -> DataError:
        return DataError(
            f"the shard {shown(self._url)} holds {found} pictures, but its manifest says "
            f"{len(self._images)}. Make the manifest of these shards again; nothing is left out "
            "silently."
        )

    def close(self) -> None:
        """Close the transfer; the block in memory stays."""
        if self._file is not None:
            self._file.close()
        self._file, self._pictures = None, iter(())


@dataclass
class _EndMark:
    """Whether a tar was read up to its end mark, which a truncated one lacks."""

    is_marked: bool = False


def _pictures(
    file: RemoteFile, name: str, left_out: LeftOut, end: _EndMark
) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of the picture of every sample that has one; counts the others at the end."""
    from webdataset.tariterators import group_by_keys  # loads many libraries

    members: list[Member] = []  # of samples, whose files need not be neighbours
    files = _files(file, name, members, left_out, end)
    for sample in group_by_keys(files, keys=split_name):  # ValueError: a file twice
        if extension := picture_of(key for key in sample if not key.startswith("__")):
            yield sample[extension]
    left_out.merge(left_out_of_samples(group_samples(members)[0]))


def _files(
    file: RemoteFile, name: str, members: list[Member], left_out: LeftOut, end: _EndMark
) -> Iterator[dict[str, Any]]:
    """The files of a tar that may be pictures, as webdataset groups them.

    Adds all files with a key to `members` and pictures without one to `left_out`; sets `end` at the
    end mark. It does not use webdataset's own iterator, which unpacks compressed shards of any
    expansion and reads every file into memory.
    """

    class Header(tarfile.TarInfo):
        @classmethod
        def fromtarfile(cls, tar: tarfile.TarFile) -> "Header":
            try:
                return super().fromtarfile(tar)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # not in typeshed
                end.is_marked = True
                raise

    whole = io.BufferedReader(file, 2**20)
    with tarfile.open(fileobj=whole, mode="r|", tarinfo=Header) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined] # else it keeps all; not in typeshed
            key, extension = split_name(member.name)
            opened = tar.extractfile(member) if member.isreg() else None
            if opened is None or is_junk(member.name):
                continue
            if not key:
                if why := why_no_sample(member.name, opened.read(START_BYTES)):
                    left_out.add(why, member.name)
                continue
            members.append(Member(member.name, member.offset_data, member.size))
            if may_be_picture(extension):
                data = opened.read() if member.size <= _MAX_FILE_BYTES else None
                yield {"fname": member.name, "data": (member.name, data), "__url__": name}
