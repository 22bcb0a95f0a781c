"""The journal of finished work, with which the same command continues after an interruption."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
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
_HEAD = b'{"fingerprint"'  # starts a journal; shorter if the process was killed


def write_whole(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, in one piece or piece by piece, whole or not at all.

    Raises:
        DataError: it cannot be written.
        OutputError: something else is there.
    """
    with _as_data_error(path), atomic_write(path) as beside, beside.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)


def require_writable(path: Path, source: object = None) -> None:
    """Find out now, not after hours of work, whether a file can be written.

    Args:
        path: path of the file.
        source: what the work reads.

    Raises:
        DataError: it cannot.
        OutputError: something else is there, or the source itself.
    """
    with _as_data_error(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        require_ours(path, source=source)
        with staging_folder(path):
            pass


@contextmanager
def _as_data_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


class Journal:
    """A file with one JSON line for each finished piece of work; locked within its `with` block.

    Its first line is the fingerprint of the work. A journal of other work is started over, with a
    warning, and a line that was cut off is ignored.

    Args:
        path: path of the file, or None to keep nothing.
        work: fingerprint of the work.

    Raises:
        DataError: it cannot be written, or another process does the same work.
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
            raise DataError(f"another process is writing {path}; wait until it ends") from None
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from error
        self._file.seek(0)
        if not _HEAD.startswith(self._file.read(len(_HEAD))):
            raise OutputError(f"{path} exists and is not a list of finished work: remove it")
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
        """Store the result of a piece for the next start."""
        self._append({"piece": piece, "result": result})

    def finish(self) -> None:
        """Remove the journal: the whole result is stored elsewhere."""
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
    """Whether a journal with this first line is of this work; warns of what has changed."""
    changed = differences(head.get("fingerprint"), work)
    if changed:
        log.warning("%s is of other work (%s): starting over", path, ", ".join(changed))
    return not changed


def fingerprint_of(path: Path) -> object:
    """The fingerprint in a journal, None if there is none.

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
    """The result of `read` for a file, None if there is no file.

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
