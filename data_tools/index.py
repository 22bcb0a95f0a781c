"""Make the index of a set before a job that would otherwise wait for it."""

from __future__ import annotations

import os
import time

from data_tools.files import shards_of
from data_tools.journal import Json
from dinoscale.data.mixture import left_out_of
from dinoscale.data.shard_index import open_shard_index
from dinoscale.data.sources import open_source
from dinoscale.errors import DataError


def make_index(spec: str, *, workers: int) -> Json:
    """Open a set as a training does, so that the index of its shards is in the cache.

    Args:
        spec: one source of `data.train`.
        workers: processes that read shards.

    Returns:
        The summary, ready for JSON.

    Raises:
        DataError: as `open_source`, there is no worker, or the index cannot be kept.
    """
    if workers < 1:
        raise DataError(f"--workers {workers}: need at least 1")
    begin = time.perf_counter()
    kept = None
    if shards := [os.path.abspath(path) for path in shards_of(spec)]:
        index, _ = open_shard_index(shards, num_processes=workers)
        kept = index.path
        del index  # a temporary one goes with it
        if not os.path.exists(kept):
            raise DataError("the index cannot be kept. Set DINOSCALE_CACHE to a folder with room.")
    source = open_source(spec)
    return {
        "spec": spec,
        "images": len(source),
        "left_out": left_out_of(source).counts,
        "index": kept,
        "seconds": round(time.perf_counter() - begin, 1),
    }
