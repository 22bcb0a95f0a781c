"""Candidates for the nearest rows from the inverted lists of faiss, where all pairs take too long.

Rows are sorted into lists by the nearest of some centroids, and a query looks into the lists of the
centroids nearest to it. What is found gets its exact cosine; what is not found is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.curation.embeddings import Embeddings
from dinoscale.errors import ConfigError

_LISTS = 4  # times sqrt(N), within what faiss recommends (4 to 16)
_PROBED = 32  # lists that a query looks into
_TRAINED_ON = 64  # rows for each centroid; faiss warns below 39
_AT_ONCE = 65536  # rows in memory beside the lists


def require_faiss() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"--approximate needs faiss ({error}): pip install 'dinoscale[curation]', or leave the"
            " option out, which compares all pairs"
        ) from error
    return faiss


class InvertedLists:
    """The rows of embeddings in lists, 4 N D bytes in memory.

    Args:
        embeddings: N rows of width D.
    """

    def __init__(self, embeddings: Embeddings) -> None:
        faiss = require_faiss()
        number = len(embeddings)
        lists = max(1, min(int(_LISTS * math.sqrt(number)), number // _TRAINED_ON))
        quantizer = faiss.IndexFlatIP(embeddings.width)
        self._index = faiss.IndexIVFFlat(
            quantizer, embeddings.width, lists, faiss.METRIC_INNER_PRODUCT
        )
        self._index.nprobe = min(lists, _PROBED)
        self._index.cp.spherical = True  # its seed is a constant
        self._index.train(_spread_rows(embeddings, min(number, lists * _TRAINED_ON)))
        for start, stop in _spans(number):
            self._index.add(embeddings.rows(start, stop))

    def candidates(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """Rows near each query (Q, D), in no certain order, (Q, k); -1 where there are fewer."""
        _, rows = self._index.search(queries, k)
        found: NDArray[np.int64] = rows
        return found


def _spread_rows(embeddings: Embeddings, number: int) -> NDArray[np.float32]:
    """So many rows, the same every time, drawn from all."""
    chosen = np.random.default_rng(0).choice(len(embeddings), number, replace=False, shuffle=False)
    return embeddings.take(np.sort(chosen).astype(np.int64))


def _spans(number: int) -> Iterator[tuple[int, int]]:
    for start in range(0, number, _AT_ONCE):
        yield start, min(start + _AT_ONCE, number)
