"""Ranks as threads of this process, for leaves that are given their collectives."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

Share = TypeVar("Share")
Result = TypeVar("Result")
Reduction = Callable[[Tensor], Tensor]

TIMEOUT_S = 60.0  # of a thread that waits for the others in a collective


def on_ranks(
    work: Callable[[Share, Reduction, Reduction], Result], shares: Sequence[Share]
) -> list[Result]:
    """Call `work(share, sum_over_ranks, max_over_ranks)` for every share at the same time."""
    barrier, parts = threading.Barrier(len(shares)), [torch.empty(0)] * len(shares)

    def reduce(rank: int, among: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
        parts[rank] = part
        barrier.wait(TIMEOUT_S)
        result = among(torch.stack(parts))
        barrier.wait(TIMEOUT_S)
        return result

    def run(rank: int) -> Result:
        try:
            total = partial(reduce, rank, partial(torch.sum, dim=0))
            highest = partial(reduce, rank, partial(torch.amax, dim=0))
            return work(shares[rank], total, highest)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(shares)) as threads:
        return list(threads.map(run, range(len(shares))))
