"""Retries of reads: a transient error of the file system does not mean that a file is damaged."""

import errno
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from dinoscale.errors import DataError, UnavailableError

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # about a minute: an NFS server restarts in less

_RENEWED_S = 600.0  # so that files that stay lost cost at most a tenth of the time

# Errors about the name, permissions or kind of a file, which a retry would only repeat.
_PERMANENT = {
    errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.ENXIO, errno.EPERM, errno.ESPIPE,
}  # fmt: skip


def is_permanent(error: OSError) -> bool:
    """Whether an error is about the file itself; any other one may be gone a moment later.

    An OSError without a number is one of ours, and permanent.
    """
    return error.errno is None or error.errno in _PERMANENT


def path_exists(path: str) -> bool:
    """Whether a path exists.

    Raises:
        OSError: the file system fails, where `os.path.exists` would return False.
    """
    try:
        os.stat(path)
    except OSError as error:
        if is_permanent(error):
            return False
        raise
    except ValueError:  # a null byte
        return False
    return True


class RetryBudget:
    """Retries reads for about a minute in all, over any number of files.

    A disk that lost a thousand files costs that minute once, not once for each. The budget is
    renewed when a retried read succeeds, and some minutes after it was used up. It is for one
    thread: several that fail together would use it up at once.

    Args:
        pauses_s: seconds before each retry.
        is_final: whether an error is not worth a retry.
    """

    def __init__(
        self,
        pauses_s: Sequence[float] = PAUSES_S,
        *,
        is_final: Callable[[OSError], bool] = is_permanent,
    ):
        self._pauses_s, self._is_final = pauses_s, is_final
        self._renew()

    def _renew(self) -> None:
        self._left, self._used_up_s = iter(self._pauses_s), math.inf

    def _pause(self) -> float | None:
        """Seconds until the next retry; None if the budget is used up."""
        if time.monotonic() - self._used_up_s > _RENEWED_S:
            self._renew()
        pause_s = next(self._left, None)
        if pause_s is None:
            self._used_up_s = min(self._used_up_s, time.monotonic())
        return pause_s

    def read(self, read: Callable[[], T], name: object) -> T:
        """Call `read`, again after errors, and return its result; messages call the file `name`.

        Raises:
            OSError: it is final, or the budget is used up.
        """
        failed = False
        while True:
            try:
                value = read()
            except OSError as error:  # noqa: PERF203  # a file at a time, and it waits
                pause_s = None if self._is_final(error) else self._pause()
                if pause_s is None:
                    raise
                failed = True
                log.warning("cannot read %s (%s): trying again in %g s", name, error, pause_s)
                time.sleep(pause_s)
            else:
                if failed:
                    self._renew()
                return value


def with_retries(read: Callable[[], T], what: str) -> T:
    """Call `read`, again after errors, and return its result; `what` is e.g. `the list a.txt`.

    Raises:
        DataError: the error is about the file itself.
        UnavailableError: the file system still failed after about a minute.
    """
    try:
        return RetryBudget().read(read, what)
    except OSError as error:
        raise read_error(what, error) from error


def read_error(what: str, error: OSError) -> DataError:
    """The error to raise for a failed read; its type tells a bad file from a bad file system."""
    text = f"cannot read {what}: {error.strerror or error}."
    if is_permanent(error):
        return DataError(text)
    return UnavailableError(f"{text} It may be intact: repair the file system, then start again.")
