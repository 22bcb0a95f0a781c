"""Many strings in two arrays, so that a worker process does not copy a million Python objects."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class PackedNames:
    """An immutable sequence of file names: one byte blob and the ends of the names in it.

    A list of strings costs about 100 bytes and one reference count a name; reading the count in a
    forked worker writes to its page and so copies the list. Arrays have neither problem.
    """

    def __init__(self, names: Iterable[str]):
        blob = bytearray()
        ends = [0]
        for name in names:
            blob += os.fsencode(name)
            ends.append(len(blob))
        self._blob: NDArray[np.uint8] = np.frombuffer(bytes(blob), dtype=np.uint8)
        self._ends: NDArray[np.int64] = np.array(ends, dtype=np.int64)

    @classmethod
    def joined(cls, parts: Sequence["PackedNames"]) -> "PackedNames":
        """The names of all parts in their order."""
        whole = cls(())
        starts = np.cumsum([0, *(part._ends[-1] for part in parts)])
        shifted = [part._ends[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
        whole._blob = np.concatenate([whole._blob, *(part._blob for part in parts)])
        whole._ends = np.concatenate([whole._ends, *shifted])
        return whole

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        return os.fsdecode(self._blob[self._ends[index] : self._ends[index + 1]].tobytes())
