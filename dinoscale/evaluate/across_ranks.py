"""Work on a set of images, shared out over the ranks of the job.

One process is one rank with all of it. A rank takes whole batches, those that one process would
make: a row of a matrix product may depend in its last bit on how many rows are with it.

Shape letters: N images of the set that can be read.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dinoscale.runtime import distributed

_LOOK_S = 1.0  # between two looks whether another rank has failed

Extract = Callable[[NDArray[np.int64], Callable[[], None]], tuple[Tensor, Tensor]]


def over_ranks(extract: Extract, *, num_images: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Let every rank extract its share of a set, and put the rows together; all ranks call it.

    Args:
        extract: takes the numbers of the images and a function that it calls after each batch;
            gives a row for each image that can be read, and the numbers of these, (N,) int64. Its
            batches are `batch_size` consecutive numbers each.
        num_images: of the set.
        batch_size: images of one batch.

    Returns:
        Rows (N, ...) and numbers (N,) in the order of the set, on every rank.

    Raises:
        DinoscaleError: the first that a rank met, on all of them, within seconds.
    """
    rows, numbers = _share_of_rank(extract, num_images=num_images, batch_size=batch_size)
    if distributed.world_size() == 1:
        return rows, numbers
    rows, numbers = distributed.gather_rows(rows), distributed.gather_rows(numbers)

    def in_order() -> tuple[Tensor, Tensor]:
        order = numbers.argsort()
        return rows[order], numbers[order]

    return distributed.together(in_order)  # takes the memory of all rows once more


def _share_of_rank(extract: Extract, *, num_images: int, batch_size: int) -> tuple[Tensor, Tensor]:
    ids = np.arange(num_images, dtype=np.int64)
    share = ids[ids // batch_size % distributed.world_size() == distributed.rank()]
    alarm = _Alarm()

    def work() -> tuple[Tensor, Tensor] | None:
        try:
            return extract(share, alarm.check)
        except _OtherRankFailed:
            return None  # whose error `together` raises
        except BaseException:
            alarm.ring()
            raise

    done = distributed.together(work)
    assert done is not None
    return done


class _OtherRankFailed(Exception):  # noqa: N818  # no error of this rank
    """What this rank does is no longer of use."""


class _Alarm:
    """Tells the other ranks amid their work that one has failed."""

    def __init__(self) -> None:
        self._store = distributed.KeyValueStore()
        self._key = f"failed {distributed.broadcast_object(uuid.uuid4().hex)}"
        self._next_look = 0.0

    def ring(self) -> None:
        self._store.set(self._key, str(distributed.rank()))

    def check(self) -> None:
        """Raise if a rank has failed; costs nothing most of the time."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_S
            if self._store.get(self._key) is not None:
                raise _OtherRankFailed
