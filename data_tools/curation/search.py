"""A search in pieces: over the ranks of a job, on a bar, continued after an interruption.

Where all pairs take too long, candidates come from the inverted lists of faiss: rows are sorted
into lists by the nearest of some centroids, and a query looks into those of the centroids nearest
to it. What is found gets its exact cosine; what is not found is missing. The lists are trained by
each rank in sums whose order follows its threads, so that other ranks or threads may miss others.

Shape letters: N rows that are searched, Q queries, D width, k neighbours.
"""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.curation.embeddings import Embeddings
from data_tools.curation.neighbours import Neighbours, nearest, rescored
from data_tools.journal import Journal, Json
from dinoscale.errors import ConfigError, DataError
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import on_all_ranks

S = TypeVar("S", bound=np.generic)

_LISTS = 4  # times sqrt(N), within what faiss recommends (4 to 16)
_PROBED = 32  # lists that a query looks into
_TRAINED_ON = 64  # rows for each centroid; faiss warns below 39
_AT_ONCE = 65536  # rows in memory beside the lists


@dataclass(frozen=True)
class Way:
    """How neighbours are searched.

    Attributes:
        block: queries at a time, which are also a piece of finished work.
        device: where products are computed.
        approximate: look into the lists of faiss instead of comparing all pairs.
    """

    block: int
    device: torch.device
    approximate: bool = False

    def __post_init__(self) -> None:
        """Refuse a number out of range."""
        if self.block < 1:
            raise DataError(f"--block {self.block}: need at least one row")


def settings_of(way: Way) -> Json:
    """What pieces of finished work depend on besides the embeddings; all ranks call it.

    Raises:
        ConfigError: faiss is asked for and not there, on every rank if it lacks on one.
    """

    def version() -> str | None:
        return str(require_faiss().__version__) if way.approximate else None

    # The first rank's: all ranks name the same work, whatever versions they have.
    faiss = distributed.broadcast_object(distributed.together(version))
    return {"block": way.block, "approximate": way.approximate, "faiss": faiss}


class Searched:
    """Embeddings in which neighbours are searched; lists of faiss are made at the first search.

    Args:
        base: the embeddings.
        way: how.
    """

    def __init__(self, base: Embeddings, way: Way) -> None:
        self.base, self._way = base, way
        self._lists: InvertedLists | None = None

    def nearest(
        self, queries: Embeddings, span: range, *, k: int, at_least: float = -2.0
    ) -> Neighbours:
        """As `neighbours.nearest`, of candidates only where the search is approximate."""
        if not self._way.approximate:
            return nearest(
                queries, self.base, span, k=k, at_least=at_least, device=self._way.device
            )
        if self._lists is None:
            self._lists = InvertedLists(self.base)
        own = int(queries is self.base)  # a query finds itself, too
        rows = self._lists.candidates(queries.rows(span.start, span.stop), k + own)
        return rescored(queries, self.base, span, rows, k=k, at_least=at_least)


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
        for span in spans_of(number, _AT_ONCE):
            self._index.add(embeddings.rows(span.start, span.stop))

    def candidates(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """Rows near each query (Q, D), in no certain order, (Q, k); -1 where there are fewer."""
        _, rows = self._index.search(queries, k)
        found: NDArray[np.int64] = rows
        return found


def _spread_rows(embeddings: Embeddings, number: int) -> NDArray[np.float32]:
    """So many rows, the same every time, drawn from all."""
    chosen = np.random.default_rng(0).choice(len(embeddings), number, replace=False, shuffle=False)
    return embeddings.take(np.sort(chosen).astype(np.int64))


@contextmanager
def journal_beside(out: Path, work: object) -> Iterator[Journal | None]:
    """The journal of a list that will be written, `OUT.state`; None on all ranks but the first.

    It is removed at the end of the block, in which the list is written.

    Raises:
        DataError: it cannot be written, on every rank.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> Journal | None:
            if distributed.rank():
                return None
            return stack.enter_context(Journal(out.with_name(out.name + ".state"), work))

        journal = distributed.together(enter)
        yield journal
        if journal is not None:
            journal.finish()


def in_turns(
    find: Callable[[int], Json],
    sizes: Sequence[int],
    journal: Journal | None,
    *,
    progress: bool = True,
) -> list[Json]:
    """The result of every piece, in order, done now or before an interruption; all ranks call it.

    In each turn every rank takes one of the pieces that are left. Pieces may take hours and differ
    in length: a rank that is done waits for the others without a collective, which would time out.

    Args:
        find: number of a piece -> its result; the same on every rank.
        sizes: images of each piece.
        journal: of the first rank.
        progress: show a bar.

    Returns:
        The results on the first rank, none on the others.

    Raises:
        DinoscaleError: a piece failed on a rank, on all.
    """
    world, rank = distributed.world_size(), distributed.rank()
    known = dict(journal.done) if journal is not None else {}
    done = distributed.broadcast_object(sorted(known))
    left = sorted({*range(len(sizes))} - {*done})
    with tqdm(total=sum(sizes), unit="img", disable=None if progress and not rank else True) as bar:
        bar.update(sum(sizes[number] for number in done))
        for first in range(0, len(left), world):
            turn = left[first : first + world]
            mine = turn[rank] if rank < len(turn) else None
            result = on_all_ranks(partial(_found, find, mine), lambda: None)
            results = distributed.gather_objects(result)
            for number, result in zip(turn, results, strict=False):
                if journal is not None:
                    journal.add(number, result)
                    known[number] = result
                bar.update(sizes[number])
    return [known[number] for number in range(len(sizes))] if journal is not None else []


def _found(find: Callable[[int], Json], number: int | None, _: object) -> Json:
    return {} if number is None else find(number)


def spans_of(number: int, block: int) -> list[range]:
    """Rows in runs of a block."""
    return [range(start, min(start + block, number)) for start in range(0, number, block)]


def packed(array: NDArray[np.generic]) -> str:
    """An array as text for a journal."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def unpacked(text: str, dtype: type[S]) -> NDArray[S]:
    """The array in a text of `packed`, one-dimensional."""
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def joined(results: Sequence[Json], name: str, dtype: type[S]) -> NDArray[S]:
    """The arrays of that name in the results of all pieces, one after another."""
    return np.concatenate([unpacked(result[name], dtype) for result in results])
