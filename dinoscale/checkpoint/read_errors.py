"""Read checkpoints with patience: what is missing is told from what cannot be read now."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dinoscale.errors import MissingFileError, UnreadableError
from dinoscale.runtime.retry import PAUSES_S, RetryBudget

T = TypeVar("T")

_NO_FOLDER = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)  # whatever may be there


def with_retries(read: Callable[[], T], path: Path) -> T:
    """What `read` makes of the file or folder `path`; errors of the file system are tried again.

    Raises:
        MissingFileError: its folder has no such file.
        UnreadableError: there still was an error after about a minute.
    """

    def is_gone(error: OSError) -> bool:
        return error.errno in (errno.ENOENT, errno.ENOTDIR) and is_missing(path)

    try:
        return RetryBudget(is_final=is_gone).read(read, path)
    except OSError as error:
        if is_gone(error):
            raise MissingFileError(
                f"{path.parent} is damaged: {path.name} is missing, so it is not a complete"
                " checkpoint"
            ) from error
        raise _unreadable(path, error) from error


def is_missing(path: Path) -> bool:
    """Whether the folder, listed anew, does not name the file; ESTALE and the like say nothing."""
    try:
        return path.name not in os.listdir(path.parent)
    except NotADirectoryError:
        return True
    except FileNotFoundError:
        return path.parent != path and is_missing(path.parent)
    except OSError:
        return False


def names_in(folder: Path) -> list[str]:
    """Names of what is in a folder, sorted; none where its own folder does not name it.

    Raises:
        UnreadableError: it cannot be listed, so it may hold anything.
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
    from dinoscale.runtime import distributed  # loads torch, which most listings do without

    number = error.errno or 0
    reason = f"{error.strerror or error} ({errno.errorcode.get(number, 'errno')} {number})"
    return UnreadableError(
        f"rank {distributed.rank()} on {socket.gethostname()} cannot read {path}: {reason}, after"
        f" trying for {sum(PAUSES_S):.0f} s. The checkpoint may be whole, and nothing of it was"
        " changed: mend the file system or leave out that machine, then start again"
    )
