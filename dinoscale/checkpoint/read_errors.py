"""Read checkpoint files with retries, and tell a missing file from one that is unreadable now."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dinoscale.errors import MissingFileError, UnreadableError
from dinoscale.runtime.retry import PAUSES_S, RetryBudget

T = TypeVar("T")

_NO_FOLDER = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)  # errors of a path that is no folder


def with_retries(read: Callable[[], T], path: Path) -> T:
    """The result of `read` on the file or folder `path`; file system errors are retried.

    Raises:
        MissingFileError: its folder has no such file.
        UnreadableError: it still fails after about a minute.
    """
    gone = False

    def is_gone(error: OSError) -> bool:
        nonlocal gone
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR) and is_missing(path)
        return gone

    try:
        return RetryBudget(is_final=is_gone).read(read, path)
    except OSError as error:
        if not gone:
            raise _unreadable(path, error) from error
        if is_missing(path):
            raise MissingFileError(
                f"{path.parent} is damaged: {path.name} is missing, so it is not a complete"
                " checkpoint"
            ) from error
    return with_retries(read, path)  # another process has written it, or that listing was stale


def is_missing(path: Path) -> bool:
    """Whether a new listing of the folder lacks the file; ESTALE and the like prove nothing."""
    try:
        return path.name not in os.listdir(path.parent)
    except NotADirectoryError:
        return True
    except FileNotFoundError:
        return path.parent != path and is_missing(path.parent)
    except OSError:
        return False


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder; none if the folder does not exist.

    Raises:
        UnreadableError: it cannot be listed, so its contents are unknown.
    """

    def listed() -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except OSError as error:
            if error.errno in _NO_FOLDER:
                return []
            raise

    try:
        return with_retries(listed, folder)
    except MissingFileError:
        return []


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    from dinoscale.runtime import distributed  # imports torch, which most listings avoid

    number = error.errno or 0
    reason = f"{error.strerror or error} ({errno.errorcode.get(number, 'errno')} {number})"
    return UnreadableError(
        f"rank {distributed.rank()} on {socket.gethostname()} cannot read {path}: {reason}, after"
        f" trying for {sum(PAUSES_S):.0f} s. The checkpoint may be intact and was not changed:"
        " repair the file system or leave out that machine, then start again"
    )
