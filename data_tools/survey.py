"""Read images in blocks over processes, remembering finished blocks beside the output file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.journal import Journal, Json, check_place, fingerprint
from data_tools.parallel import ordered_map
from dinoscale.data.sources import Source
from dinoscale.errors import DataError

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

BLOCK = 256  # images that one process reads between two lines of the journal


def survey(
    task: Callable[[S, T], Json],
    shared: S,
    blocks: Sequence[T],
    *,
    sizes: Sequence[int],
    out: Path | None,
    work: Sequence[object],
    workers: int,
) -> Iterator[Json]:
    """Yield the result of every block in order, done now or by an interrupted run before.

    Args:
        task: a function of a module; its result goes through JSON.
        shared: what all blocks need.
        blocks: the work.
        sizes: of the blocks, for the progress bar.
        out: file that the caller writes at the end; `OUT.state` lies beside it until then, and is
            removed when the caller has taken the last result. None remembers nothing.
        work: what the results depend on; a state of other work is not used.
        workers: processes.

    Raises:
        DataError: `out` cannot be written, or there is no worker.
        RunFailedError: a worker was killed.
    """
    state = None
    if out is not None:
        check_place(out)
        state = out.with_name(out.name + ".state")
    journal = Journal(state, fingerprint([task.__module__, *work]))
    if journal.done:
        log.info("going on: %d of %d pieces are done", len(journal.done), len(blocks))
    left = [number for number in range(len(blocks)) if number not in journal.done]
    results = ordered_map(task, shared, [blocks[number] for number in left], workers=workers)
    with tqdm(total=sum(sizes), unit="img", disable=None) as bar:
        for number in range(len(blocks)):
            if number not in journal.done:
                journal.add(number, next(results))
            yield journal.done.pop(number)
            bar.update(sizes[number])
    journal.finish()


def sample_ids(num_images: int, *, wanted: int | None, seed: int = 0) -> NDArray[np.int64]:
    """Choose images, the same ones every time, in ascending order; None or too many takes all.

    Raises:
        DataError: less than one is wanted.
    """
    if wanted is not None and wanted < 1:
        raise DataError(f"--images {wanted}: need at least 1")
    if wanted is None or wanted >= num_images:
        return np.arange(num_images, dtype=np.int64)
    chosen = np.random.default_rng(seed).choice(num_images, wanted, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64)


def in_blocks(ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Cut into blocks of at most BLOCK images."""
    return [ids[first : first + BLOCK] for first in range(0, len(ids), BLOCK)]


def identity(source: Source) -> list[object]:
    """What tells a source from another or from itself after a change, without reading images."""
    paths = [source.path(i) for i in range(len(source))]
    shards = sorted({path.partition(".tar::")[0] + ".tar" for path in paths if ".tar::" in path})
    return [paths, [stamp(path) for path in shards]]


def stamp(path: str) -> list[object]:
    """Path, size and time of change of a file."""
    try:
        status = os.stat(path)
    except OSError:
        return [path, 0, 0]
    return [path, status.st_size, status.st_mtime_ns]
