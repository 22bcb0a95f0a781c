"""Read files of a checkpoint: an error of the file system is no damage, so it is tried again."""

import errno
import logging
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dinoscale import distributed
from dinoscale.errors import CheckpointError, MissingFileError, UnreadableError

log = logging.getLogger(__name__)
T = TypeVar("T")

_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # about a minute: as long as an NFS server restarts
_MAX_OPEN = 256  # files at a time; a process may usually open 1024


def patiently(read: Callable[[], T], path: Path) -> T:
    """What `read` makes of the file `path`; errors of the file system are met by trying again.

    Raises:
        MissingFileError: its folder has no such file.
        UnreadableError: there still was an error after about a minute.
    """
    for pause_s in (*_PAUSES_S, None):
        try:
            return read()
        except OSError as error:  # noqa: PERF203  # a file at a time, and it waits
            if error.errno == errno.ENOENT and is_missing(path):
                raise MissingFileError(
                    f"{path.parent} is damaged: {path.name} is missing, so it is not a complete"
                    " checkpoint"
                ) from error
            if pause_s is None:
                raise _unreadable(path, error) from error
            log.warning("cannot read %s (%s): trying again in %g s", path, error, pause_s)
            time.sleep(pause_s)
    raise AssertionError("unreachable")


def is_missing(path: Path) -> bool:
    """Whether the folder, listed anew, does not name the file; ESTALE and the like say nothing."""
    try:
        return path.name not in os.listdir(path.parent)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    number = error.errno or 0
    reason = f"{error.strerror or error} ({errno.errorcode.get(number, 'errno')} {number})"
    return UnreadableError(
        f"rank {distributed.rank()} on {socket.gethostname()} cannot read {path}: {reason}, after"
        f" trying for {sum(_PAUSES_S):.0f} s. The checkpoint may be whole, and nothing of it was"
        " changed: mend the file system or leave out that machine, then start again"
    )


class ShardFiles:
    """The shard files of a checkpoint, opened when something of them is needed.

    Picklable: another process opens its own.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: the checkpoint's."""
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()  # name -> descriptor, oldest use first

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def fill(self, values: NDArray[np.float32], name: str, *, offset: int) -> None:
        """Read `values`, contiguous, from the bytes that begin at `offset` of a file.

        Raises:
            CheckpointError: the file ends before.
            UnreadableError: it cannot be read.
        """
        path = self._folder / name
        patiently(lambda: self._fill(memoryview(values.data).cast("B"), path, offset), path)

    def _fill(self, into: memoryview, path: Path, offset: int) -> None:
        descriptor = self._descriptor(path)
        done = 0
        try:
            while done < len(into):  # a read returns 2 GiB at most
                count = os.preadv(descriptor, [into[done:]], offset + done)
                if not count:
                    raise CheckpointError(f"{path.parent} is damaged: {path.name} is cut off")
                done += count
        except OSError:
            os.close(self._open.pop(path.name))  # a stale handle stays stale
            raise

    def _descriptor(self, path: Path) -> int:
        descriptor = self._open.pop(path.name, None)
        if descriptor is None:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[path.name] = descriptor
        return descriptor
