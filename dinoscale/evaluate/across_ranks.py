"""Features of a set of images, extracted by all ranks of the job together.

Each rank takes whole batches, the same ones that a single process would form: the last bit of a row
of a matrix product may depend on the number of rows.

Shape letters: N images of the set that can be read.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dinoscale.runtime import distributed

T = TypeVar("T")
Item = TypeVar("Item")

_CHECK_S = 1.0  # between two checks whether another rank has failed

Extract = Callable[[NDArray[np.int64], Callable[[], None]], tuple[Tensor, Tensor]]


def over_ranks(
    extract: Extract, *, num_images: int, batch_size: int, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Let every rank extract its share of a set, and gather the rows; all ranks call it.

    Args:
        extract: takes the indices of images and a function to call after each batch; returns a row
            for each readable image, and the indices of these, (N,) int64. Its batches are
            `batch_size` consecutive indices each.
        num_images: of the set, or those before the end of a part of it.
        batch_size: images of one batch.
        first: image of the part, the first one of a batch.

    Returns:
        Rows (N, ...) and indices (N,) in the order of the set, on every rank.

    Raises:
        DinoscaleError: the first error of any rank, on all ranks, within seconds.
    """
    ids = np.arange(first, num_images, dtype=np.int64)
    rows, numbers = _share_of_rank(extract, ids, batch_size=batch_size)
    if distributed.world_size() == 1:
        return rows, numbers
    rows, numbers = distributed.gather_rows(rows), distributed.gather_rows(numbers)

    def in_order() -> tuple[Tensor, Tensor]:
        order = numbers.argsort()
        return rows[order], numbers[order]

    return distributed.together(in_order)  # copies all rows, so it may run out of memory


def each_on_a_rank(items: Sequence[Item], work: Callable[[Item], T]) -> list[T]:
    """Let every rank do its share of independent items one by one; all ranks call it.

    Args:
        items: the same on every rank.
        work: makes the result of an item, which can be pickled.

    Returns:
        The results in the order of the items, on every rank.

    Raises:
        DinoscaleError: the first error of any rank, on all ranks, within seconds.
    """
    ranks = distributed.world_size()
    share = items[distributed.rank() :: ranks]

    def do_share(check: Callable[[], None]) -> list[T]:
        done = []
        for item in share:
            done.append(work(item))
            check()
        return done

    parts = distributed.gather_objects(distributed.together(until_a_rank_fails(do_share)))
    return [(parts[number % ranks] or [])[number // ranks] for number in range(len(items))]


def _share_of_rank(
    extract: Extract, ids: NDArray[np.int64], *, batch_size: int
) -> tuple[Tensor, Tensor]:
    share = ids[ids // batch_size % distributed.world_size() == distributed.rank()]
    done = distributed.together(until_a_rank_fails(partial(extract, share)))
    assert done is not None
    return done


def until_a_rank_fails(work: Callable[[Callable[[], None]], T]) -> Callable[[], T | None]:
    """Make work of all ranks that ends within seconds once it has failed on one; all call this.

    Args:
        work: takes a function to call again and again while it works.

    Returns:
        The work, for a function that raises the error of one rank on all (`distributed.together`).
        Its result is None where another rank failed.
    """
    alarm = _Alarm()

    def watched() -> T | None:
        try:
            return work(alarm.check)
        except _OtherRankFailed:
            return None  # the caller raises the error of that rank
        except BaseException:
            alarm.ring()
            raise

    return watched


class _OtherRankFailed(Exception):  # noqa: N818  # no error of this rank
    """Stops this rank, whose work is now useless."""


class _Alarm:
    """Tells ranks at work that another rank has failed."""

    def __init__(self) -> None:
        self._store = distributed.KeyValueStore()
        self._key = f"failed {distributed.broadcast_object(uuid.uuid4().hex)}"
        self._next_check = 0.0

    def ring(self) -> None:
        self._store.set(self._key, str(distributed.rank()))

    def check(self) -> None:
        """Raise if a rank has failed; most calls cost nothing."""
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + _CHECK_S
            if self._store.get(self._key) is not None:
                raise _OtherRankFailed
