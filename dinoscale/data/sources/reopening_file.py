"""A file that is read at any place, and reopened when a read fails: handles go stale."""

import os
from collections.abc import Callable
from typing import TypeVar

from dinoscale.data.shards.row_table import read_at
from dinoscale.runtime.retry import RetryBudget

T = TypeVar("T")


class ReopeningFile:
    """A file on disk, opened when it is first read.

    Args:
        path: path of the file.
        retries: shared by files that fail together; None: for this file alone.

    Raises:
        OSError: from every method but `close`: it still fails after retries.
    """

    def __init__(self, path: str, retries: RetryBudget | None = None):
        self.path = path
        self._retries = retries or RetryBudget()
        self._descriptor = -1

    def __enter__(self) -> "ReopeningFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file until it is read again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def read_at(self, size: int, offset: int) -> bytes:
        """Bytes at a place; fewer only at the end of the file."""
        return self._tried(lambda descriptor: read_at(descriptor, size, offset))

    def status(self) -> os.stat_result:
        """Status of the open file, whatever has its name by now."""
        return self._tried(os.fstat)

    def _tried(self, use: Callable[[int], T]) -> T:
        return self._retries.read(lambda: self._used(use), self.path)

    def _used(self, use: Callable[[int], T]) -> T:
        if self._descriptor < 0:
            # Without waiting: opening a pipe would block until somebody writes to it.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor = os.open(self.path, flags)
        try:
            return use(self._descriptor)
        except OSError:
            self.close()
            raise
