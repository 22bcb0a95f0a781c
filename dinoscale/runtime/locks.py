"""One process at a time: a lock on a file that goes with the process, however it ends."""

import fcntl
import logging
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)


def try_lock(path: Path) -> IO[str] | None:
    """Make a file and hold it while the result is open; None while another process does.

    Where the file system knows no locks, it is taken for free, with a warning.

    Raises:
        OSError: the file cannot be made.
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
