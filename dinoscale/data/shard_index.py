"""Where every image of a set of tar shards lies: scanned once, kept on disk, checked at each start.

Files that share a key (folder and name up to the first dot) make one sample: `0001.jpg`,
`0001.cls`. A row of the index is an image: its offset and size in bytes, its class number.
"""

import logging
import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

from tqdm import tqdm

from dinoscale.data.cache import cached_file, locked, remove_abandoned
from dinoscale.data.decode import begins_like_picture
from dinoscale.data.index import DamagedIndexError, Index, IndexWriter
from dinoscale.data.left_out import HIDDEN, NO_EXTENSION, NO_PICTURE, OTHER_FILES, LeftOut, is_junk
from dinoscale.data.listing import is_known_not_image
from dinoscale.data.sample_files import may_be_picture, other_pictures, picture_of, split_name
from dinoscale.data.tar_headers import Member, read_members
from dinoscale.errors import DataError

log = logging.getLogger(__name__)

NUMBERS = "QQq"  # of a row: offset, size, label
NO_LABEL = -1

_RULES = 2  # of what is an image; an index made by others is not used
_MAX_LABEL_BYTES = 64  # a class number needs fewer
_START_BYTES = 16  # of a file, tell its format
_SCAN_THREADS = 8  # headers wait for the storage, not for the processor
_SCANNED_AHEAD = 16  # shards whose rows may wait in memory until those before them are written
_QUIET_S = 2.0  # shorter scans show no progress


@dataclass(frozen=True)
class Shard:
    """A tar file as it was when its headers were read.

    Attributes:
        path: absolute.
        size: in bytes.
        mtime_ns: when it was last written.
        num_images: rows of it in the index.
        num_labelled: images with a `.cls` member, readable or not.
        left_out: what is none of them.
    """

    path: str
    size: int
    mtime_ns: int
    num_images: int = 0
    num_labelled: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)

    def is_as(self, other: "Shard") -> bool:
        """Whether the file is the same, as far as size and time tell."""
        return (self.path, self.size, self.mtime_ns) == (other.path, other.size, other.mtime_ns)


class _Row(NamedTuple):
    name: str
    offset: int
    size: int
    label: int


_Scanned = tuple[Shard, list[_Row]]


def open_shard_index(paths: Sequence[str]) -> tuple[Index, list[Shard]]:
    """Open the index of tar shards; make it where there is none or the shards have changed.

    It is kept in the cache folder, or, where that cannot be written, in a temporary one. Of the
    processes of a machine one makes it and the others wait. Memory is bounded by the largest
    shards that are read at the same time.

    Args:
        paths: absolute, in the order of the images.

    Raises:
        DataError: a shard cannot be read, is damaged or compressed, or no index can be written.
    """
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        shards = list(pool.map(_state, paths))
        try:
            return _cached_index(shards, pool)
        except OSError as error:
            log.warning(
                "cannot keep the index of %s (%s): it is made at every start, by every process. "
                "Set DINOSCALE_CACHE to a folder that can be written.",
                some(paths), str(error),
            )  # fmt: skip
        try:
            return _build(shards, pool)
        except OSError as error:
            raise DataError(
                f"cannot write the index of {some(paths)}: {error}. Set DINOSCALE_CACHE or TMPDIR "
                "to a folder with room."
            ) from error


def some(paths: Sequence[str]) -> str:
    """A short name for shards."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more shards"


def _state(path: str) -> Shard:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise DataError(f"cannot read the shard {path}: it is not a plain file.")
    return Shard(path, status.st_size, status.st_mtime_ns)


def _cached_index(shards: list[Shard], pool: ThreadPoolExecutor) -> tuple[Index, list[Shard]]:
    path = cached_file("shards", (shard.path for shard in shards)) + ".index"
    index, known = _load(path)
    if not _fits(known, shards):
        with locked(path):
            index, known = _load(path)  # another process may have made it by now
            if not _fits(known, shards):
                remove_abandoned(path)
                return _build(shards, pool, path=path, index=index, known=known)
    assert index is not None
    return index, known


def _load(path: str) -> tuple[Index | None, list[Shard]]:
    """The index of a path and its shards; none where it is not there or cannot be trusted."""
    try:
        index = Index(path, NUMBERS)
        if index.about.get("rules") != _RULES:
            log.info("the index %s is of another version: the shards are scanned again", path)
            return None, []
        shards = [_shard_of(entry) for entry in index.about["shards"]]
        if sum(shard.num_images for shard in shards) != len(index):
            raise DamagedIndexError(f"the index {path} does not agree with itself")
    except FileNotFoundError:
        return None, []
    except (DamagedIndexError, KeyError, TypeError) as error:
        log.warning("%s; the shards are scanned again", error)
        return None, []
    return index, shards


def _shard_of(entry: dict[str, Any]) -> Shard:
    return Shard(**{**entry, "left_out": LeftOut(**entry["left_out"])})


def _fits(known: list[Shard], shards: list[Shard]) -> bool:
    return len(known) == len(shards) and all(map(Shard.is_as, known, shards))


def _build(
    shards: list[Shard],
    pool: ThreadPoolExecutor,
    *,
    path: str = "",
    index: Index | None = None,
    known: Sequence[Shard] = (),
) -> tuple[Index, list[Shard]]:
    """Scan the shards; what an older index knows of unchanged ones is taken from there."""
    firsts = accumulate((shard.num_images for shard in known), initial=0)
    old = {shard.path: (shard, first) for shard, first in zip(known, firsts, strict=False)}

    def rows_of(shard: Shard) -> _Scanned:
        before, first = old.get(shard.path, (None, 0))
        if index is None or before is None or not before.is_as(shard):
            return _scan(shard)
        rows = index.rows(first, first + before.num_images)
        return before, [_Row(name, *numbers) for name, numbers in rows]

    num_changed = sum(s.path not in old or not old[s.path][0].is_as(s) for s in shards)
    log.info("reading the headers of %d of %d shards", num_changed, len(shards))
    done = []
    bar = tqdm(
        _in_order(rows_of, shards, pool), desc="indexing", total=len(shards), unit="shard",
        delay=_QUIET_S, disable=None, file=sys.stderr,
    )  # fmt: skip
    with IndexWriter(NUMBERS, path) as writer:
        for shard, rows in bar:
            done.append(shard)
            for row in rows:
                writer.add(*row)
        return writer.finish({"rules": _RULES, "shards": [asdict(shard) for shard in done]}), done


def _in_order(
    work: Callable[[Shard], _Scanned], shards: Iterable[Shard], pool: ThreadPoolExecutor
) -> Iterator[_Scanned]:
    """Results in the order of the shards, of which only a few wait in memory."""
    running: deque[Future[_Scanned]] = deque()
    try:
        for shard in shards:
            running.append(pool.submit(work, shard))
            if len(running) > _SCANNED_AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _scan(shard: Shard) -> _Scanned:
    """Read the headers and labels of one shard."""
    samples, without_key = group_samples(read_members(shard.path))
    rows = []
    num_labelled = 0
    left_out = LeftOut()
    try:
        with open(shard.path, "rb") as file:
            for sample in samples:
                extension = picture_of(sample)
                if not extension:
                    first = next(iter(sample.values())).name
                    left_out.add(NO_PICTURE if _lacks_picture(sample) else OTHER_FILES, first)
                    continue
                for other, why in other_pictures(sample):
                    left_out.add(why, sample[other].name)
                image, label = sample[extension], _label_of(sample, extension)
                num_labelled += label is not None
                number = NO_LABEL if label is None else _class_number(file.fileno(), label)
                rows.append(_Row(image.name, image.offset, image.size, number))
            for member in without_key:
                if why_not := _why_no_sample(file.fileno(), member):
                    left_out.add(why_not, member.name)
    except OSError as error:
        raise DataError(f"cannot read the shard {shard.path}: {error.strerror}.") from error
    return replace(shard, num_images=len(rows), num_labelled=num_labelled, left_out=left_out), rows


def _lacks_picture(sample: Mapping[str, Member]) -> bool:
    """Whether there should be one: it has a label, or a file of a kind that nobody knows."""
    return "cls" in sample or not all(is_known_not_image(member.name) for member in sample.values())


def _why_no_sample(descriptor: int, member: Member) -> str:
    """Why a picture makes no sample; empty for any other file."""
    name = member.name.rpartition("/")[2]
    if name.startswith("."):
        return HIDDEN if may_be_picture(name.rpartition(".")[2].lower()) else ""
    start = os.pread(descriptor, min(_START_BYTES, member.size), member.offset)
    return NO_EXTENSION if begins_like_picture(start) else ""


def group_samples(members: Iterable[Member]) -> tuple[list[dict[str, Member]], list[Member]]:
    """Extension -> member, for each sample in the order of their first members; and the rest.

    The rest are hidden files and those without extension, which have no key; but for junk.
    """
    samples: list[dict[str, Member]] = []
    rest: list[Member] = []
    latest: dict[str, dict[str, Member]] = {}  # key -> the sample last begun with it
    for member in members:
        key, extension = split_name(member.name)
        if not key:
            if not is_junk(member.name):
                rest.append(member)
            continue
        sample = latest.get(key)
        if sample is None or extension in sample:  # a repeated key is another sample
            sample = latest[key] = {}
            samples.append(sample)
        sample[extension] = member
    return samples, rest


def _label_of(sample: dict[str, Member], picture: str) -> Member | None:
    """`KEY.cls`, or `KEY.left.cls` beside `KEY.left.jpg`."""
    middle, dot, _ = picture.rpartition(".")
    return sample.get("cls") or sample.get(f"{middle}{dot}cls")


def _class_number(descriptor: int, label: Member) -> int:
    if label.size > _MAX_LABEL_BYTES:
        return NO_LABEL
    text = os.pread(descriptor, label.size, label.offset).strip()
    return int(text) if text.isdigit() and len(text) < 19 else NO_LABEL  # 19 digits may overflow
