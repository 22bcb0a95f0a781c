"""What is done already, so that the same command goes on where an interrupted one stopped."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dinoscale.errors import DataError, OutputError
from dinoscale.runtime.fingerprint import differences
from dinoscale.runtime.outputs import atomic_write, require_ours, staging_folder
from dinoscale.runtime.retry import with_retries

log = logging.getLogger(__name__)

Json = dict[str, Any]
T = TypeVar("T")
_HEAD = b'{"fingerprint"'  # begins a journal; after a kill there may be less of it


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        DataError: it cannot be written.
        OutputError: something lies there that is not ours.
    """
    with _telling(path), atomic_write(path) as beside:
        beside.write_bytes(data)


def check_place(path: Path, source: object = None) -> None:
    """Find out now, not after hours of work, whether a file can be written.

    Args:
        path: of the file.
        source: what the work reads.

    Raises:
        DataError: it cannot.
        OutputError: something lies there that is not ours, or the source itself.
    """
    with _telling(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        require_ours(path, source=source)
        with staging_folder(path):
            pass


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


class Journal:
    """A file with one JSON line for each finished piece of work; locked within its `with` block.

    Its first line is the fingerprint of the work. A journal of other work is started anew, which is
    said, and a line that was cut off counts for nothing.

    Args:
        path: of the file, or None to keep nothing.
        work: its fingerprint.

    Raises:
        DataError: it cannot be written, or another process is at the same work.
        OutputError: something else has its name.
    """

    def __init__(self, path: Path | None, work: object):
        self.done: dict[int, Json] = {}  # piece -> its result
        self._path = path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing {path}; wait for its end") from None
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from error
        self._file.seek(0)
        if not _HEAD.startswith(self._file.read(len(_HEAD))):
            raise OutputError(f"{path} exists, and is no list of finished work: remove it")
        self._file.seek(0)
        end, head = 0, None
        for line in self._file:
            entry = _parsed(line)
            if entry is None or (head is None and not _is_of(entry, work, path)):
                break
            if head is None:
                head = entry
            else:
                self.done[entry["piece"]] = entry["result"]
            end += len(line)
        self._file.truncate(end)
        if head is None:
            self._append({"fingerprint": work})

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._file.close()

    def add(self, piece: int, result: Json) -> None:
        """Remember the result of a piece, for the next start."""
        self._append({"piece": piece, "result": result})

    def finish(self) -> None:
        """Forget everything: the whole result is safe elsewhere."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _append(self, entry: Json) -> None:
        if self._path is None:
            return
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error


def _is_of(head: Json, work: object, path: Path) -> bool:
    """Whether the first line of a journal is that of some work; says what is not as it was."""
    changed = differences(head.get("fingerprint"), work)
    if changed:
        log.warning("%s is of other work (%s): starting anew", path, ", ".join(changed))
    return not changed


def fingerprint_of(path: Path) -> object:
    """Which work a journal is of, None where there is none.

    Raises:
        DataError: it cannot be read.
    """

    def first_line() -> bytes:
        with path.open("rb") as file:
            return file.readline()

    line = read_if_there(first_line, path)
    entry = None if line is None else _parsed(line)
    return None if entry is None else entry.get("fingerprint")


def read_if_there(read: Callable[[], T], path: Path) -> T | None:
    """What `read` makes of a file, None where there is none.

    Raises:
        DataError: it cannot be read, or not for about a minute.
    """

    def read_or_none() -> T | None:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    return with_retries(read_or_none, str(path))


def _parsed(line: bytes) -> Json | None:
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
