"""Read with patience: an error of the file system is no damage, so it is tried again."""

import errno
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # about a minute: as long as an NFS server restarts

# What a file system says of a name, a right or a kind of file; it would say it again.
_ANSWERS = {
    errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.ENXIO, errno.EPERM,
}  # fmt: skip


def is_answer(error: OSError) -> bool:
    """Whether an error tells something of the file; any other one may be gone a moment later.

    An OSError without a number is of ours, and is one.
    """
    return error.errno is None or error.errno in _ANSWERS


class Patience:
    """Tries again for about a minute in all, over however many files.

    A disk that lost a thousand files costs that minute once, and no minute for each of them. Once
    a read has succeeded that had failed before, the time begins anew.

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
        self._left = [*pauses_s]

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
                if not self._left or self._is_final(error):
                    raise
                pause_s, failed = self._left.pop(0), True
                log.warning("cannot read %s (%s): trying again in %g s", name, error, pause_s)
                time.sleep(pause_s)
            else:
                if failed:
                    self._left = [*self._pauses_s]
                return value
