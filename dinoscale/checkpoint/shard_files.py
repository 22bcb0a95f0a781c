"""Read the shard files of a checkpoint at any offset."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoscale.checkpoint.read_errors import with_retries
from dinoscale.errors import CheckpointError

_MAX_OPEN = 256  # files at a time; a process may usually open 1024


class ShardFiles:
    """The shard files of a checkpoint, opened on first use.

    Picklable: another process opens the files again.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: of the checkpoint."""
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()  # name -> descriptor, oldest use first

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def fill(self, values: NDArray[np.float32], name: str, *, offset: int) -> None:
        """Fill `values`, which is contiguous, with the bytes of a file from `offset` on.

        Raises:
            CheckpointError: the file is too short.
            UnreadableError: it cannot be read.
        """
        path = self._folder / name
        with_retries(lambda: self._fill(memoryview(values.data).cast("B"), path, offset), path)

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
