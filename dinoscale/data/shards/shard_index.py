"""The place of every image in a set of tar shards: scanned once, kept on disk, checked at starts.

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
from dinoscale.data.shards.row_table import DamagedTableError, RowTable, RowTableWriter
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

_RULES = 3  # version of what counts as an image; an index of another version is not used
_MAX_LABEL_BYTES = 64  # a class number needs fewer
_SCAN_THREADS = 8  # headers wait for the storage, not for the processor
_SHARDS_PER_PART = 16  # lost at most per process in an interruption; fewer than 256
_POLL_S = 0.5  # between two looks at the progress of other processes
_SCANNED_AHEAD = 16  # shards whose rows may wait in memory until those before them are written
_PROGRESS_DELAY_S = 2.0  # shorter scans show no progress

_num_read: mmap.mmap | None = None  # shards read of each part; set in processes that scan


@dataclass(frozen=True)
class Shard:
    """A tar file at the time its headers were read.

    Attributes:
        path: absolute.
        size: in bytes.
        mtime_ns: when it was last written.
        num_images: its rows in the index.
        num_labelled: images with a `.cls` member, readable or not.
        left_out: what does not become an image.
    """

    path: str
    size: int
    mtime_ns: int
    num_images: int = 0
    num_labelled: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)

    def is_unchanged_from(self, other: "Shard") -> bool:
        """Whether the file is the same, by size and time of change."""
        return (self.path, self.size, self.mtime_ns) == (other.path, other.size, other.mtime_ns)


class _Row(NamedTuple):
    name: str
    offset: int
    size: int
    label: int


_Scanned = tuple[Shard, list[_Row]]


def open_shard_index(
    paths: Sequence[str],
    heartbeat: Callable[[], None] = lambda: None,
    *,
    num_processes: int | None = None,
) -> tuple[RowTable, list[Shard]]:
    """Open the index of tar shards; make it if there is none or the shards have changed.

    The index is kept in the cache folder or, if that cannot be written, in a temporary one. Of the
    processes that share the folder, one makes the index and the others wait. For many shards all
    of them first make parts of it together; an interruption leaves the finished parts for the next
    start. Memory is bounded by the largest shards that are read at the same time.

    Args:
        paths: absolute paths, in the order of the images.
        heartbeat: called when a shard is finished, and while another process makes the index.
        num_processes: processes that read many shards; None: one per core.

    Raises:
        DataError: a shard cannot be read, is damaged or compressed, or no index can be written.
        UnavailableError: the file system of a shard failed for about a minute.
    """
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        shards = []
        for shard in pool.map(_shard_state, paths):
            shards.append(shard)
            heartbeat()
        try:
            return _cached_index(shards, pool, heartbeat, num_processes or available_cores())
        except OSError as error:
            log.warning(
                "cannot keep the index of %s (%s): it is made at every start, by every process. "
                "Set DINOSCALE_CACHE to a folder that can be written.",
                shards_named(paths), str(error),
            )  # fmt: skip
        try:
            return _build(shards, pool, heartbeat)
        except OSError as error:
            raise DataError(
                f"cannot write the index of {shards_named(paths)}: {error}. Set DINOSCALE_CACHE or "
                "TMPDIR to a folder with room."
            ) from error


def shards_named(paths: Sequence[str]) -> str:
    """A short name for shards."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more shards"


def _shard_state(path: str) -> Shard:
    status = with_retries(lambda: os.stat(path), f"the shard {path}")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise DataError(f"cannot read the shard {path}: it is not a plain file.")
    return Shard(path, status.st_size, status.st_mtime_ns)


def _cached_index(
    shards: list[Shard], pool: ThreadPoolExecutor, heartbeat: Callable[[], None], num_processes: int
) -> tuple[RowTable, list[Shard]]:
    path = cached_file("shards", (shard.path for shard in shards)) + ".index"
    before = _identity(path)
    index, known = _load(path)
    if not _is_current(known, shards):
        remove_abandoned(path)
        parts = parts_of(path, shards, known)
        make_parts(parts, path, heartbeat, num_processes=num_processes, before=before)
        with locked(path, heartbeat):
            index, known = _load(path)  # another process may have made it by now
            if not _is_current(known, shards):
                previous = [(index, known), *(_load(part.path) for part in parts)]
                index, known = _build(shards, pool, heartbeat, path=path, previous=previous)
            remove_parts(path)  # also those that this process made too late
    assert index is not None
    return index, known


def _load(path: str) -> tuple[RowTable | None, list[Shard]]:
    """The index at a path and its shards; None if it is missing or cannot be trusted."""
    try:
        index = RowTable(path, NUMBERS)
        if index.metadata.get("rules") != _RULES:
            log.info("the index %s is of another version: the shards are scanned again", path)
            return None, []
        shards = [_shard_of(entry) for entry in index.metadata["shards"]]
        if sum(shard.num_images for shard in shards) != len(index):
            raise DamagedTableError(f"the index {path} contradicts itself")
    except FileNotFoundError:
        return None, []
    except (DamagedTableError, KeyError, TypeError) as error:
        log.warning("%s; the shards are scanned again", error)
        return None, []
    return index, shards


def _shard_of(entry: dict[str, Any]) -> Shard:
    return Shard(**{**entry, "left_out": LeftOut(**entry["left_out"])})


def _is_current(known: list[Shard], shards: list[Shard]) -> bool:
    return len(known) == len(shards) and all(map(Shard.is_unchanged_from, known, shards))


def _build(
    shards: list[Shard],
    pool: ThreadPoolExecutor,
    heartbeat: Callable[[], None],
    *,
    path: str = "",
    previous: Sequence[tuple[RowTable | None, list[Shard]]] = (),
) -> tuple[RowTable, list[Shard]]:
    """Scan the shards, but take the rows of unchanged ones from previous indexes and parts."""
    old: dict[
        str, tuple[RowTable, Shard, int]
    ] = {}  # path -> index, shard and number of its first row
    for index, known in previous:
        firsts = accumulate((shard.num_images for shard in known), initial=0)
        if index is not None:
            old |= {s.path: (index, s, first) for s, first in zip(known, firsts, strict=False)}

    def rows_of(shard: Shard) -> _Scanned:
        if shard.path not in old or not old[shard.path][1].is_unchanged_from(shard):
            return _scan(shard)
        index, before, first = old[shard.path]
        rows = index.rows(first, first + before.num_images)
        return before, [_Row(name, *numbers) for name, numbers in rows]

    num_changed = sum(s.path not in old or not old[s.path][1].is_unchanged_from(s) for s in shards)
    log.info("reading the headers of %d of %d shards", num_changed, len(shards))
    done = []
    bar = tqdm(
        _in_shard_order(rows_of, shards, pool), desc="indexing", total=len(shards), unit="shard",
        delay=_PROGRESS_DELAY_S, disable=None, file=sys.stderr,
    )  # fmt: skip
    with RowTableWriter(NUMBERS, path) as writer:
        for shard, rows in bar:
            done.append(shard)
            heartbeat()
            for row in rows:
                writer.add(*row)
        return writer.finish({"rules": _RULES, "shards": [asdict(shard) for shard in done]}), done


@dataclass(frozen=True)
class Part:
    """A part of an index: some of its shards, and the file that holds their rows."""

    path: str
    shards: tuple[Shard, ...]


def parts_of(path: str, shards: Sequence[Shard], known: Sequence[Shard]) -> list[Part]:
    """The parts of an index that must be made; none if there are few shards to scan.

    The name of a part is a digest of its shards, so that another start finds it again.
    """
    old = {shard.path: shard for shard in known}
    parts = []
    for first in range(0, len(shards), _SHARDS_PER_PART):
        of_part = shards[first : first + _SHARDS_PER_PART]
        changed = tuple(
            s for s in of_part if s.path not in old or not old[s.path].is_unchanged_from(s)
        )
        digest = hashlib.blake2b(repr((_RULES, changed)).encode(), digest_size=16)
        if changed:
            parts.append(Part(f"{path}.{digest.hexdigest()}.part", changed))
    return parts if len(parts) > 1 else []


def make_parts(
    parts: Sequence[Part],
    path: str,
    heartbeat: Callable[[], None],
    *,
    num_processes: int,
    before: tuple[int, int] | None,
) -> None:
    """Make the parts of an index that no other process makes, and wait for the others.

    Args:
        parts: parts of the index.
        path: path of the index.
        heartbeat: called repeatedly while shards are read, also by another process.
        num_processes: processes that read shards.
        before: `_identity` of the index that lacks these parts; a newer index has them.

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
    num_reported = 0  # the bar cannot tell: a hidden one does not count
    bar = tqdm(
        desc="indexing", total=sum(len(part.shards) for part in missing), unit="shard",
        delay=_PROGRESS_DELAY_S, disable=None, file=sys.stderr,
    )  # fmt: skip
    pool = ProcessPoolExecutor(
        min(num_processes, len(missing)),
        mp_context=multiprocessing.get_context("fork"),  # does not run the main module again
        initializer=_start_scanner,
        initargs=(num_read,),
    )
    try:
        with bar:
            while missing and _identity(path) == before:  # or the whole index is made
                running = {
                    pool.submit(_make_part, part, place[part.path]): part for part in missing
                }
                pending = set(running)
                while pending:
                    done, pending = wait(pending, _POLL_S, FIRST_COMPLETED)
                    more = sum(num_read[:]) - num_reported
                    if done or more:  # not while the storage hangs
                        heartbeat()
                    bar.update(more)
                    num_reported += more
                missing = [part for future, part in running.items() if not future.result()]
                if missing:
                    time.sleep(_POLL_S)
    except BrokenProcessPool:
        raise DataError(
            f"a process that reads the headers of {parts[0].shards[0].path} was killed, usually "
            "because memory ran out. Start again: finished parts are kept."
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
    """Leave signals to the parent process, and exit with it.

    The parent reads `num_read`, the number of shards read of each part.
    """
    global _num_read
    _num_read = num_read
    leave_signals_to_parent()
    end_with_parent()


def _make_part(part: Part, place: int = 0) -> bool:
    """Make a part unless it exists; False while another process makes it.

    `place` is the place of the part in `_num_read`.
    """
    lock = f"{part.path}.lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.path.exists(part.path)
        except OSError as error:  # no locks here: the part may be made twice
            log.debug("no lock on %s: %s", lock, error)
        if not os.path.exists(part.path):
            with RowTableWriter(NUMBERS, part.path) as writer:
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
    """Remove the parts of a finished index."""
    for found in glob.glob(f"{glob.escape(path)}.*.part*"):
        if not found.endswith(".partial"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                os.unlink(found)


def _in_shard_order(
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
