"""The nearest rows of embeddings by cosine: exact, and the same for any cut of the work.

Coordinates of rows of length 1 are rounded to multiples of 2^-26. A product of two such rows is
then a sum of multiples of 2^-52 whose parts add up to no more than 2 in absolute value (Cauchy and
Schwarz): float64 holds it exactly, in whatever order a library adds. So a cosine is a function of
its two rows alone, on any device, and neighbours depend neither on blocks nor on ranks. Rounding
moves a cosine by at most sqrt(D) 2^-26: less than 1e-6 up to D = 4096.

Shape letters: N rows that are searched, Q queries of a block, B rows of a tile, D width, k
neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_tools.curation.embeddings import Embeddings
from dinoscale.errors import DataError

ROUNDING = 1e-6  # of a cosine; one that misses a threshold by less has reached it
BLOCK = 8192  # queries at a time

_SCALE = 2.0**26
_TILE = 2**25  # cosines at a time: 256 MiB
_LEAST_TILE = 256  # rows, for any number of queries
_RESCORED = 256  # queries at a time whose candidates are read


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest rows of some queries, the nearest first; of equally near ones the lower row.

    Attributes:
        rows: (Q, k) int64, -1 where there are fewer.
        cosines: (Q, k) float64, below any cosine where there are fewer.
        closest: cosine of the nearest row, reported or not, (Q,) float64.
    """

    rows: NDArray[np.int64]
    cosines: NDArray[np.float64]
    closest: NDArray[np.float64]


def require_comparable(one: Embeddings, other: Embeddings) -> None:
    """Refuse embeddings whose cosines mean nothing.

    Raises:
        DataError: they are of other features or weights.
    """
    for name, a, b in (
        ("features", one.features, other.features),
        ("width", one.width, other.width),
        *(
            (name, one.about["settings"].get(name), other.about["settings"].get(name))
            for name in ("weights", "preprocessing")
        ),
    ):
        if a != b:
            raise DataError(
                f"{other.path} cannot be compared with {one.path}: its {name} are not the same"
                f" ({_short(b)} and {_short(a)}). Embed both with one command"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(
    queries: Embeddings,
    base: Embeddings,
    span: range,
    *,
    k: int,
    at_least: float = -2.0,
    device: torch.device,
) -> Neighbours:
    """Find the nearest rows of `base` for a run of queries, by comparing with all of them.

    A row is no neighbour of itself where both are the same embeddings. It takes 2 Q N D operations
    in float64, and 8 (Q D + 3 x 2^25) bytes on the device, whatever N.

    Args:
        queries: embeddings of the queries.
        base: embeddings that are searched.
        span: rows of the queries.
        k: how many neighbours.
        at_least: cosine of a neighbour; farther rows are none.
        device: where products are computed.

    Raises:
        DataError: a row cannot be read, or is not finite.
    """
    block = _fixed_point(queries.rows(span.start, span.stop), device)  # (Q, D)
    best = _Best(len(block), k, at_least=at_least, device=device)
    for start, tile in _tiles(base, rows=max(_LEAST_TILE, _TILE // len(block)), device=device):
        cosines = block @ tile.T  # (Q, B), times 2^52
        if queries is base:
            _mask_own(cosines, first_query=span.start, first_row=start)
        best.offer(cosines, torch.arange(start, start + len(tile), device=device))
    return best.found()


def rescored(
    queries: Embeddings,
    base: Embeddings,
    span: range,
    candidates: NDArray[np.int64],
    *,
    k: int,
    at_least: float = -2.0,
) -> Neighbours:
    """Find the nearest among candidates (Q, C) for each of a run of queries, -1 where fewer.

    The cosines are those of `nearest`.

    Raises:
        DataError: as `nearest`.
    """
    parts = []
    for start in range(span.start, span.stop, _RESCORED):
        some = range(start, min(start + _RESCORED, span.stop))
        # Ascending, so that of equal cosines the first is that of the lower row.
        numbers = np.sort(candidates[some.start - span.start : some.stop - span.start], axis=1)
        parts.append(_rescored(queries, base, some, numbers, k=k, at_least=at_least))
    return Neighbours(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.cosines for part in parts]),
        np.concatenate([part.closest for part in parts]),
    )


def _rescored(
    queries: Embeddings,
    base: Embeddings,
    span: range,
    numbers: NDArray[np.int64],
    *,
    k: int,
    at_least: float,
) -> Neighbours:
    """As `rescored`, of ascending candidates (Q, C)."""
    device = torch.device("cpu")
    block = _fixed_point(queries.rows(span.start, span.stop), device)
    rows = _fixed_point(base.take(np.maximum(numbers, 0).ravel()), device)  # (Q * C, D)
    cosines = (rows.view(*numbers.shape, -1) @ block[:, :, None])[:, :, 0]  # (Q, C)
    own = np.arange(span.start, span.stop)[:, None] if queries is base else -1
    cosines[torch.from_numpy((numbers < 0) | (numbers == own))] = -torch.inf
    best = _Best(len(block), k, at_least=at_least, device=device)
    best.offer(cosines, torch.from_numpy(numbers))
    return best.found()


def _fixed_point(rows: NDArray[np.float32], device: torch.device) -> Tensor:
    """Rows of length 1 as whole numbers, times 2^26, in float64."""
    return torch.from_numpy(rows).to(device).double().mul_(_SCALE).round_()


def _tiles(base: Embeddings, *, rows: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """All rows a few at a time, each with its first row, read while the last ones are used."""
    spans = [(start, min(start + rows, len(base))) for start in range(0, len(base), rows)]
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(base.rows, *spans[0])
        for number, (start, _) in enumerate(spans):
            read = coming.result()
            if number + 1 < len(spans):
                coming = pool.submit(base.rows, *spans[number + 1])
            yield start, _fixed_point(read, device)


def _mask_own(cosines: Tensor, *, first_query: int, first_row: int) -> None:
    """Make sure that no query finds itself."""
    start = max(first_query, first_row)
    stop = min(first_query + cosines.shape[0], first_row + cosines.shape[1])
    own = torch.arange(start, max(start, stop), device=cosines.device)
    cosines[own - first_query, own - first_row] = -torch.inf


class _Best:
    """The k nearest rows so far of each query; cosines times 2^52."""

    def __init__(self, queries: int, k: int, *, at_least: float, device: torch.device) -> None:
        floor = (at_least - ROUNDING) * _SCALE**2
        new = partial(torch.full, device=device)
        self._cosines = new((queries, k), floor, dtype=torch.float64)
        self._rows = new((queries, k), -1, dtype=torch.int64)
        self._closest = new((queries,), -torch.inf, dtype=torch.float64)

    def offer(self, cosines: Tensor, rows: Tensor) -> None:
        """Take in cosines (Q, B) of ascending rows, (B,) or (Q, B), after all those before."""
        largest = cosines.amax(dim=1)
        torch.maximum(self._closest, largest, out=self._closest)
        (moved,) = (largest > self._cosines[:, -1]).nonzero(as_tuple=True)
        if len(moved):
            values, columns = _top(cosines[moved], self._rows.shape[1])
            numbers = rows[columns] if rows.dim() == 1 else rows[moved].gather(1, columns)
            self._merge(moved, values, numbers)

    def _merge(self, queries: Tensor, cosines: Tensor, rows: Tensor) -> None:
        """Merge what was found before with later rows: of equals, the earlier stay in front."""
        k = self._rows.shape[1]
        both = torch.cat((self._cosines[queries], cosines), dim=1)
        numbers = torch.cat((self._rows[queries], rows), dim=1)
        order = both.argsort(dim=1, descending=True, stable=True)[:, :k]
        self._cosines[queries] = both.gather(1, order)
        self._rows[queries] = numbers.gather(1, order)

    def found(self) -> Neighbours:
        scale = 1 / _SCALE**2
        return Neighbours(
            self._rows.cpu().numpy(),
            self._cosines.mul(scale).cpu().numpy(),
            self._closest.mul(scale).cpu().numpy(),
        )


def _top(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (R, B), descending, of equals the first; with their columns."""
    k = min(k, cosines.shape[1])
    values, columns = cosines.topk(k, dim=1)
    # Of cosines equal to the last one, topk may have taken any.
    (tied,) = ((cosines >= values[:, -1:]).sum(dim=1) > k).nonzero(as_tuple=True)
    if len(tied):
        whole = cosines[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
        columns[tied] = whole
        values[tied] = cosines[tied].gather(1, whole)
    columns = columns.sort(dim=1).values
    values, order = cosines.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)
