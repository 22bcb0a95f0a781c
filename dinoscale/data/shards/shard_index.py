"""Where every image of a set of tar shards lies: scanned once, kept on disk, checked at each start.

Files that share a key (folder and name up to the first dot) make one sample: `0001.jpg`,
`0001.cls`. A row of the index is an image: its offset and size in bytes, its class number.
"""

import contextlib
import fcntl
import glob
import hashlib
import logging
import mmap
import multiprocessing
import os
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

from tqdm import tqdm

from dinoscale.data.cache_folder import cached_file, locked, remove_abandoned
from dinoscale.data.shards.row_table import DamagedIndexError, Index, IndexWriter
from dinoscale.data.shards.samples import (
    START_BYTES,
    group_samples,
    left_out_of_samples,
    picture_of,
    why_no_sample,
)
from dinoscale.data.shards.tar_headers import Member, read_members
from dinoscale.data.sources.left_out import LeftOut
from dinoscale.data.sources.reopening_file import ReopeningFile
from dinoscale.data.worker_process import end_with_parent, leave_signals_to_parent
from dinoscale.errors import DataError
from dinoscale.runtime.cores import available_cores
from dinoscale.runtime.retry import read_error, with_retries

log = logging.getLogger(__name__)

NUMBERS = "QQq"  # of a row: offset, size, label
NO_LABEL = -1

_RULES = 3  # of what is an image; an index made by others is not used
_MAX_LABEL_BYTES = 64  # a class number needs fewer
_SCAN_THREADS = 8  # headers wait for the storage, not for the processor
_SHARDS_OF_PART = 16  # that an interruption costs at most, in each process; fewer than 256
_LOOK_S = 0.5  # between two looks at what other processes have made
_SCANNED_AHEAD = 16  # shards whose rows may wait in memory until those before them are written
_QUIET_S = 2.0  # shorter scans show no progress

_num_read: mmap.mmap | None = None  # of a process that makes parts


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


def open_shard_index(
    paths: Sequence[str],
    alive: Callable[[], None] = lambda: None,
    *,
    num_processes: int | None = None,
) -> tuple[Index, list[Shard]]:
    """Open the index of tar shards; make it where there is none or the shards have changed.

    It is kept in the cache folder, or, where that cannot be written, in a temporary one. Of the
    processes that share the folder one makes it and the others wait. Where there are many shards,
    parts of it are made first, by all of them together, which an interruption leaves for the next
    start. Memory is bounded by the largest shards that are read at the same time.

    Args:
        paths: absolute, in the order of the images.
        alive: called whenever a shard is finished, and while another process makes it.
        num_processes: that read many shards; None: one a core.

    Raises:
        DataError: a shard cannot be read, is damaged or compressed, or no index can be written.
        UnavailableError: the file system of a shard failed for about a minute.
    """
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        shards = []
        for shard in pool.map(_state, paths):
            shards.append(shard)
            alive()
        try:
            return _cached_index(shards, pool, alive, num_processes or available_cores())
        except OSError as error:
            log.warning(
                "cannot keep the index of %s (%s): it is made at every start, by every process. "
                "Set DINOSCALE_CACHE to a folder that can be written.",
                some(paths), str(error),
            )  # fmt: skip
        try:
            return _build(shards, pool, alive)
        except OSError as error:
            raise DataError(
                f"cannot write the index of {some(paths)}: {error}. Set DINOSCALE_CACHE or TMPDIR "
                "to a folder with room."
            ) from error


def some(paths: Sequence[str]) -> str:
    """A short name for shards."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more shards"


def _state(path: str) -> Shard:
    status = with_retries(lambda: os.stat(path), f"the shard {path}")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise DataError(f"cannot read the shard {path}: it is not a plain file.")
    return Shard(path, status.st_size, status.st_mtime_ns)


def _cached_index(
    shards: list[Shard], pool: ThreadPoolExecutor, alive: Callable[[], None], num_processes: int
) -> tuple[Index, list[Shard]]:
    path = cached_file("shards", (shard.path for shard in shards)) + ".index"
    before = _identity(path)
    index, known = _load(path)
    if not _fits(known, shards):
        remove_abandoned(path)
        parts = parts_of(path, shards, known)
        make_parts(parts, path, alive, num_processes=num_processes, before=before)
        with locked(path, alive):
            index, known = _load(path)  # another process may have made it by now
            if not _fits(known, shards):
                olds = [(index, known), *(_load(part.path) for part in parts)]
                index, known = _build(shards, pool, alive, path=path, olds=olds)
            remove_parts(path)  # also those that this process made too late
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
    alive: Callable[[], None],
    *,
    path: str = "",
    olds: Sequence[tuple[Index | None, list[Shard]]] = (),
) -> tuple[Index, list[Shard]]:
    """Scan the shards; what older indexes or parts know of unchanged ones is taken from there."""
    old: dict[str, tuple[Index, Shard, int]] = {}  # with the number of its first row
    for index, known in olds:
        firsts = accumulate((shard.num_images for shard in known), initial=0)
        if index is not None:
            old |= {s.path: (index, s, first) for s, first in zip(known, firsts, strict=False)}

    def rows_of(shard: Shard) -> _Scanned:
        if shard.path not in old or not old[shard.path][1].is_as(shard):
            return _scan(shard)
        index, before, first = old[shard.path]
        rows = index.rows(first, first + before.num_images)
        return before, [_Row(name, *numbers) for name, numbers in rows]

    num_changed = sum(s.path not in old or not old[s.path][1].is_as(s) for s in shards)
    log.info("reading the headers of %d of %d shards", num_changed, len(shards))
    done = []
    bar = tqdm(
        _in_order(rows_of, shards, pool), desc="indexing", total=len(shards), unit="shard",
        delay=_QUIET_S, disable=None, file=sys.stderr,
    )  # fmt: skip
    with IndexWriter(NUMBERS, path) as writer:
        for shard, rows in bar:
            done.append(shard)
            alive()
            for row in rows:
                writer.add(*row)
        return writer.finish({"rules": _RULES, "shards": [asdict(shard) for shard in done]}), done


@dataclass(frozen=True)
class Part:
    """Some shards of an index, and the file that holds what it will say of them."""

    path: str
    shards: tuple[Shard, ...]


def parts_of(path: str, shards: Sequence[Shard], known: Sequence[Shard]) -> list[Part]:
    """The parts of an index that have to be made; none where there are few shards to scan.

    A part is known by its shards as they are, so that another start finds it again.
    """
    old = {shard.path: shard for shard in known}
    parts = []
    for first in range(0, len(shards), _SHARDS_OF_PART):
        of_part = shards[first : first + _SHARDS_OF_PART]
        changed = tuple(s for s in of_part if s.path not in old or not old[s.path].is_as(s))
        digest = hashlib.blake2b(repr((_RULES, changed)).encode(), digest_size=16)
        if changed:
            parts.append(Part(f"{path}.{digest.hexdigest()}.part", changed))
    return parts if len(parts) > 1 else []


def make_parts(
    parts: Sequence[Part],
    path: str,
    alive: Callable[[], None],
    *,
    num_processes: int,
    before: tuple[int, int] | None,
) -> None:
    """Make the parts of an index that nobody else makes, and wait for the others.

    Args:
        parts: of the index.
        path: of the index.
        alive: called again and again while shards are read, and while another process reads them.
        num_processes: that read shards.
        before: `_identity` of the index that lacks these parts; another one has them.

    Raises:
        DataError: a shard cannot be read, or a process was killed.
        OSError: a part cannot be written.
    """
    missing = [part for part in parts if not os.path.exists(part.path)]
    if parts:
        log.info(
            "%d of %d parts of the index are there already", len(parts) - len(missing), len(parts)
        )
    if not missing:
        return
    num_read = mmap.mmap(-1, len(parts))  # shards of each part; shared, without a descriptor
    place = {part.path: number for number, part in enumerate(parts)}
    told = 0  # a bar that is not shown does not count
    bar = tqdm(
        desc="indexing", total=sum(len(part.shards) for part in missing), unit="shard",
        delay=_QUIET_S, disable=None, file=sys.stderr,
    )  # fmt: skip
    pool = ProcessPoolExecutor(
        min(num_processes, len(missing)),
        mp_context=multiprocessing.get_context("fork"),  # whatever the main module does
        initializer=_start_scanner,
        initargs=(num_read,),
    )
    try:
        with bar:
            while missing and _identity(path) == before:  # else all of it is made
                running = {
                    pool.submit(_make_part, part, place[part.path]): part for part in missing
                }
                pending = set(running)
                while pending:
                    done, pending = wait(pending, _LOOK_S, FIRST_COMPLETED)
                    more = sum(num_read[:]) - told
                    if done or more:  # no sign while a storage hangs
                        alive()
                    bar.update(more)
                    told += more
                missing = [part for future, part in running.items() if not future.result()]
                if missing:
                    time.sleep(_LOOK_S)
    except BrokenProcessPool:
        raise DataError(
            f"a process that reads the headers of {some([parts[0].shards[0].path])} was killed,"
            " usually because memory ran out. Start again: what is done is kept."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _start_scanner(num_read: mmap.mmap) -> None:
    """Signals are for the process that started this one, whose end is also its own.

    It looks at `num_read`, which says how many shards of each part were read.
    """
    global _num_read
    _num_read = num_read
    leave_signals_to_parent()
    end_with_parent()


def _make_part(part: Part, place: int = 0) -> bool:
    """Make a part, unless it is there; False where another process is making it.

    `place` is that of its number of shards read, in a process that was started for it.
    """
    lock = f"{part.path}.lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.path.exists(part.path)
        except OSError as error:  # no locks here: it may be made twice
            log.debug("no lock on %s: %s", lock, error)
        if not os.path.exists(part.path):
            with IndexWriter(NUMBERS, part.path) as writer:
                done = []
                for shard, rows in map(_scan, part.shards):
                    done.append(asdict(shard))
                    if _num_read is not None:
                        _num_read[place] = len(done)
                    for row in rows:
                        writer.add(*row)
                writer.finish({"rules": _RULES, "shards": done})
        return True
    finally:
        os.close(descriptor)


def remove_parts(path: str) -> None:
    """Remove the parts of an index that is made."""
    for found in glob.glob(f"{glob.escape(path)}.*.part*"):
        if not found.endswith(".partial"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                os.unlink(found)


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
    left_out = left_out_of_samples(samples)
    try:
        with ReopeningFile(shard.path) as file:
            for sample in samples:
                extension = picture_of(sample)
                if not extension:
                    continue
                image, label = sample[extension], _label_of(sample, extension)
                num_labelled += label is not None
                number = NO_LABEL if label is None else _class_number(file, label)
                rows.append(_Row(image.name, image.offset, image.size, number))
            for member in without_key:
                start = file.read_at(min(START_BYTES, member.size), member.offset)
                if why_not := why_no_sample(member.name, start):
                    left_out.add(why_not, member.name)
    except OSError as error:
        raise read_error(f"the shard {shard.path}", error) from error
    return replace(shard, num_images=len(rows), num_labelled=num_labelled, left_out=left_out), rows


def _label_of(sample: dict[str, Member], picture: str) -> Member | None:
    """`KEY.cls`, or `KEY.left.cls` beside `KEY.left.jpg`."""
    middle, dot, _ = picture.rpartition(".")
    return sample.get("cls") or sample.get(f"{middle}{dot}cls")


def _class_number(file: ReopeningFile, label: Member) -> int:
    if label.size > _MAX_LABEL_BYTES:
        return NO_LABEL
    text = file.read_at(label.size, label.offset).strip()
    return int(text) if text.isdigit() and len(text) < 19 else NO_LABEL  # 19 digits may overflow
