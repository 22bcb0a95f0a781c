"""Make the index of shards before a job that would otherwise wait for it."""

from __future__ import annotations

import os
import time

from data_tools.journal import Json
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.mixture import left_out_of
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError


def make_index(spec: str, *, workers: int) -> Json:
    """Open a set as a training does, so that the index of its shards is in the cache.

    Args:
        spec: one source of `data.train`.
        workers: number of processes that read shards.

    Returns:
        The summary, ready for JSON.

    Raises:
        DataError: as in `open_source`; or there is no worker, or the index cannot be kept.
    """
    if workers < 1:
        raise DataError(f"--workers {workers}: need at least 1")
    begin = time.perf_counter()
    source = open_source(spec, num_processes=workers)
    images, left_out = len(source), left_out_of(source).counts
    kept = source.index_path if isinstance(source, TarSource) else None
    del source  # and its index, if that cannot be kept
    if kept is not None and not os.path.exists(kept):
        raise DataError("the index cannot be kept. Set DINOSCALE_CACHE to a folder with room.")
    return {
        "spec": spec,
        "images": images,
        "left_out": left_out,
        "index": kept,
        "seconds": round(time.perf_counter() - begin, 1),
    }
