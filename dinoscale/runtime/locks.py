"""File locks, released when the process ends, however it ends."""

import fcntl
import logging
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)


def try_lock(path: Path) -> IO[str] | None:
    """Create a file and lock it while the result is open; None if another process holds the lock.

    A file system without locks counts as free, with a warning.

    Raises:
        OSError: the file cannot be created.
    """
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError as error:
        log.warning("cannot lock %s (%s): start no second process there", path, error)
    return file
