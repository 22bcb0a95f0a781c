"""Pieces of work over a few processes, with results in the order of the pieces."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from dinoscale.data.worker_process import end_with_parent
from dinoscale.errors import DataError, RunFailedError

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 3  # pieces submitted per worker, so that a slow one does not stop the others


def ordered_map(
    task: Callable[[S, T], R], shared: S, pieces: Sequence[T], *, workers: int
) -> Iterator[R]:
    """Yield task(shared, piece) for every piece, in order.

    Args:
        task: a function of a module.
        shared: what all pieces need.
        pieces: the work.
        workers: number of processes; 1 works in this one. They end with this process.

    Raises:
        DataError: there is no worker.
        RunFailedError: a worker was killed.
    """
    if workers < 1:
        raise DataError(f"--workers {workers}: need at least 1")
    if workers == 1 or len(pieces) == 1:
        for piece in pieces:
            yield task(shared, piece)
        return
    pool = ProcessPoolExecutor(
        min(workers, max(1, len(pieces))),
        mp_context=multiprocessing.get_context("fork"),  # shares what `shared` holds, unpickled
        initializer=_start_worker,
        initargs=(task, shared),
    )
    waiting: deque[Future[R]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_work, piece))
            if len(waiting) > _AHEAD * workers:
                yield waiting[0].result()
                waiting.popleft()
        while waiting:
            yield waiting[0].result()
            waiting.popleft()
    except BrokenProcessPool as error:
        raise RunFailedError(
            "a worker process was killed, usually because memory ran out. Use fewer --workers; "
            "the same command continues after the finished work"
        ) from error
    finally:
        pool.shutdown(wait=not waiting, cancel_futures=True)


_task: Callable[..., Any]
_shared: object


def _start_worker(task: Callable[..., object], shared: object) -> None:
    """Ctrl-C reaches all processes of a terminal; only the parent reacts."""
    global _task, _shared
    _task, _shared = task, shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger().setLevel(logging.WARNING)  # one line per shard is too much
    end_with_parent()


def _work(piece: object) -> Any:  # what the task of the pool returns
    return _task(_shared, piece)
