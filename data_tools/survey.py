"""Read images in blocks over processes; finished blocks are stored beside the output file.

A file that cannot be read says nothing about its image. The result of a block lists such files
under `unavailable`, as {"path", "reason"}. Such a result is not stored, so that the same command
reads the block again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.journal import Journal, Json, require_writable
from data_tools.parallel import ordered_map
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.errors import DataError, UnavailableError

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

_SHOWN = 3  # unavailable files listed in a message
BLOCK = 256  # images that a process reads for one line of the journal
MAX_UNAVAILABLE = 0.01  # of the images of a set; the default of data.max_bad_fraction


def survey(
    task: Callable[[S, T], Json],
    shared: S,
    blocks: Sequence[T],
    *,
    sizes: Sequence[int],
    out: Path | None,
    work: object,
    workers: int,
    max_unavailable: float = MAX_UNAVAILABLE,
) -> Iterator[Json]:
    """Yield the result of every block in order, done now or by an interrupted run before.

    Args:
        task: a function of a module; its result goes through JSON.
        shared: what all blocks need.
        blocks: the work.
        sizes: number of images in each block.
        out: file that the caller writes at the end; `OUT.state` beside it is removed when the
            caller has taken the last result and all files could be read. None stores nothing.
        work: fingerprint of what the results depend on; a state of other work is not used.
        workers: number of processes.
        max_unavailable: fraction of the images whose files may be unavailable.

    Raises:
        DataError: `out` cannot be written, or there is no worker.
        RunFailedError: a worker was killed.
        UnavailableError: after the last result, if too many files could not be read.
    """
    state = None
    if out is not None:
        require_writable(out)
        state = out.with_name(out.name + ".state")
    with Journal(state, work) as journal:
        yield from _surveyed(task, shared, blocks, sizes, journal, workers, max_unavailable)


def _surveyed(
    task: Callable[[S, T], Json],
    shared: S,
    blocks: Sequence[T],
    sizes: Sequence[int],
    journal: Journal,
    workers: int,
    max_unavailable: float,
) -> Iterator[Json]:
    if journal.done:
        log.info("continuing: %d of %d pieces are done", len(journal.done), len(blocks))
    left = [number for number in range(len(blocks)) if number not in journal.done]
    results = ordered_map(task, shared, [blocks[number] for number in left], workers=workers)
    unavailable: list[Json] = []
    with tqdm(total=sum(sizes), unit="img", disable=None) as bar:
        for number in range(len(blocks)):
            known = journal.done.pop(number, None)
            result = next(results) if known is None else known
            if found := result.get("unavailable"):
                unavailable += found
            elif known is None:
                journal.add(number, result)
            yield result
            bar.update(sizes[number])
    require_few_unavailable(unavailable, of=sum(sizes), max_fraction=max_unavailable)
    if not unavailable:
        journal.finish()


def unavailable_of(error: BadSampleError) -> list[Json]:
    """The `unavailable` entries for a bad sample: none if it was read and is damaged."""
    return [{"path": error.path, "reason": error.reason}] if error.unavailable else []


def require_few_unavailable(
    entries: Sequence[Json], *, of: int, max_fraction: float = MAX_UNAVAILABLE
) -> None:
    """Warn of the files that cannot be read, or refuse to continue without them.

    Args:
        entries: path and reason of each.
        of: number of all images.
        max_fraction: fraction of them that may be unavailable.

    Raises:
        UnavailableError: more are.
    """
    if not entries:
        return
    shown = "".join(f"\n  {entry['path']}: {entry['reason']}" for entry in entries[:_SHOWN])
    text = f"{len(entries)} of {of} files cannot be read:{shown}"
    if len(entries) > max_fraction * of:
        raise UnavailableError(
            f"{text}\nThey may be intact. Repair the file system or make them readable; the same"
            " command reads them again and keeps the finished work."
        )
    log.warning("%s", text)


def sample_ids(num_images: int, *, wanted: int | None, seed: int = 0) -> NDArray[np.int64]:
    """Choose images, the same every time, in ascending order; None or too many takes all.

    Raises:
        DataError: `wanted` is less than one.
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
