"""Read with patience: an error of the file system is no damage, so it is tried again."""

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

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # about a minute: as long as an NFS server restarts

_RENEWED_S = 600.0  # so that files that stay lost cost a tenth of the time at most

# What a file system says of a name, a right or a kind of file; it would say it again.
_ANSWERS = {
    errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.ENXIO, errno.EPERM, errno.ESPIPE,
}  # fmt: skip


def is_answer(error: OSError) -> bool:
    """Whether an error tells something of the file; any other one may be gone a moment later.

    An OSError without a number is of ours, and is one.
    """
    return error.errno is None or error.errno in _ANSWERS


def is_there(path: str) -> bool:
    """Whether a name leads to something.

    Raises:
        OSError: the file system does not say, where `os.path.exists` would say no.
    """
    try:
        os.stat(path)
    except OSError as error:
        if is_answer(error):
            return False
        raise
    except ValueError:  # a null byte
        return False
    return True


class Patience:
    """Tries again for about a minute in all, over however many files.

    A disk that lost a thousand files costs that minute once, and no minute for each of them. The
    time begins anew once a read has succeeded that had failed before, and some minutes after it
    was used up. Of one thread: several that fail together would use it up at once.

    Args:
        pauses_s: seconds before each further try.
        is_final: whether an error is not worth another try.
    """

    def __init__(
        self,
        pauses_s: Sequence[float] = PAUSES_S,
        *,
        is_final: Callable[[OSError], bool] = is_answer,
    ):
        self._pauses_s, self._is_final = pauses_s, is_final
        self._begin()

    def _begin(self) -> None:
        self._left, self._used_up_s = iter(self._pauses_s), math.inf

    def _pause(self) -> float | None:
        """Seconds until the next try; None where there is none."""
        if time.monotonic() - self._used_up_s > _RENEWED_S:
            self._begin()
        pause_s = next(self._left, None)
        if pause_s is None:
            self._used_up_s = min(self._used_up_s, time.monotonic())
        return pause_s

    def read(self, read: Callable[[], T], name: object) -> T:
        """What `read` makes of the file called `name`.

        Raises:
            OSError: it is final, or there still was one at the end.
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
                    self._begin()
                return value


def patiently(read: Callable[[], T], what: str) -> T:
    """What `read` makes of a file; what it is called in messages is e.g. `the list /data/a.txt`.

    Raises:
        DataError: the file system says that it cannot be read.
        UnavailableError: the file system still failed after about a minute.
    """
    try:
        return Patience().read(read, what)
    except OSError as error:
        raise refusal(what, error) from error


def refusal(what: str, error: OSError) -> DataError:
    """What to raise where something cannot be read: whose fault that is shows in the type."""
    text = f"cannot read {what}: {error.strerror or error}."
    if is_answer(error):
        return DataError(text)
    return UnavailableError(f"{text} It may be whole: mend the file system, then start again.")
