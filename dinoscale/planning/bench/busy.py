"""Processes that keep the other cores busy during a measurement, as the workers of a run do."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing import synchronize

import torch

from dinoscale.data.worker_process import end_with_parent, leave_signals_to_parent

_BEGIN_S = 60.0  # for the first item of a process


@contextlib.contextmanager
def busy(work: Callable[[int], Iterator[object]], *, others: int) -> Iterator[None]:
    """Keep other cores busy while the body runs, once all of them have begun.

    Args:
        work: makes an endless iterator from a seed; each process consumes one of its own.
        others: number of processes, one per core.
    """
    context = multiprocessing.get_context("fork")  # as the loader starts its workers
    begun = context.Semaphore(0)
    processes = [
        context.Process(target=_consume, args=(work, seed, begun), daemon=True)
        for seed in range(1, others + 1)
    ]
    try:
        for process in processes:
            process.start()
        for _ in processes:
            begun.acquire(timeout=_BEGIN_S)
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _consume(
    work: Callable[[int], Iterator[object]], seed: int, begun: synchronize.Semaphore
) -> None:
    leave_signals_to_parent()
    end_with_parent()
    torch.set_num_threads(1)
    items = work(seed)
    try:
        next(items)
    finally:
        begun.release()
    for _ in items:
        pass
