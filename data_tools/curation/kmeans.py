"""k-means on points that need not fit in memory, by one process or all ranks of a job.

Points are read in tiles, of which each rank takes a run. A tile is always the same rows, and sums
over points are whole numbers (values times a power of two, rounded), so neither the number of ranks
nor the order of their sums changes a bit of a centroid. Nor does the number of threads, on which
the sums inside a product depend: rows and centroids are moved by a common origin and rounded to 26
bits of their length, so that float64 holds their products exactly, whatever the order (as
`neighbours` does). The origin also keeps what differs between rows that share a large mean.

Memory: 16 K D bytes for centroids and sums, 24 K for counts, 64 MiB for the products of a tile,
32 KiB D for centroids in float64, and some copies of its rows.

Shape letters: N points, K clusters, D width, n rows of a tile, S points of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dinoscale.data.order.permutation import Permutation
from dinoscale.evaluate.progress import bar_options
from dinoscale.runtime import distributed

Start = Literal["kmeans++", "random"]

TILE = 2048  # rows of one product
MOST_POINTS = 2**32  # a number of a point has 32 bits, see `_Sums.farthest`
_COLUMNS = 4096  # centroids of one product: with TILE rows 64 MiB of float64
_FIXED = 26  # bits of a coordinate; products of two vectors then have 52, float64 has 53
_BITS = 62  # of a sum; int64 has 63
_SAMPLE = 16, 2**15  # k-means++ looks at so many points a cluster, and at least so many


class Points(Protocol):
    """Rows of float32 that are read when they are needed."""

    @property
    def width(self) -> int:
        """D."""
        ...

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """The rows start..stop - 1, (n, D)."""
        ...

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows of these numbers, (n, D)."""
        ...


@dataclass(frozen=True, eq=False)
class Held:
    """Points in memory, (N, D)."""

    array: NDArray[np.float32]

    @property
    def width(self) -> int:
        """D."""
        return int(self.array.shape[1])

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """As `Points`."""
        return self.array[start:stop]

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `Points`."""
        return self.array[numbers]


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some of other points, by their numbers (N,)."""

    points: Points
    numbers: NDArray[np.int64]

    @property
    def width(self) -> int:
        """D."""
        return self.points.width

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """As `Points`."""
        return self.points.take(self.numbers[start:stop])

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `Points`."""
        return self.points.take(self.numbers[numbers])


@dataclass(frozen=True, eq=False)
class Iteration:
    """What one iteration of Lloyd's algorithm gives.

    Attributes:
        centroids: the new ones, (K, D).
        inertia: sum of the squared distances to the old ones.
        num_empty: clusters that no point was nearest to.
        moved: whether a centroid has changed.
    """

    centroids: Tensor
    inertia: float
    num_empty: int
    moved: bool


def largest_value(points: Points, advance: Callable[[int], None]) -> float:
    """The largest absolute value of all points; reads them once, and so finds what is not finite.

    Args:
        points: the points.
        advance: called with the number of rows after each tile.

    Raises:
        DataError: as `points` raise it.
    """

    def largest() -> float:
        found = 0.0
        for _, rows in _tiles(points, torch.device("cpu"), advance):
            found = max(found, float(rows.abs().max()))
        return found

    return max(distributed.gather_objects(distributed.together(largest)))


def first_centroids(
    points: Points, clusters: int, *, method: Start, rng: np.random.Generator, device: torch.device
) -> Tensor:
    """Choose the centroids that Lloyd's algorithm begins with.

    `random` takes K different points. `kmeans++` (Arthur and Vassilvitskii 2007) draws one after
    another, each with a probability that grows with the squared distance to those before; of
    2 + log K draws it takes the one that leaves the smallest sum of squared distances. Among more
    than 16 K points it looks at 16 K of them (at least 32768) drawn at random, 128 K D bytes.

    Args:
        points: the points, K or more.
        clusters: K.
        method: how.
        rng: draws.
        device: where to compute.

    Returns:
        (K, D) float32 on the device.
    """
    number = clusters
    if method == "kmeans++":
        number = min(len(points), max(_SAMPLE[0] * clusters, _SAMPLE[1]))
    drawn = Permutation(len(points), rng)(np.arange(number))

    def chosen() -> Tensor:
        numbers = np.sort(drawn)
        if method == "kmeans++":
            numbers = numbers[_plus_plus(_sampled(points, numbers, device), clusters, rng)]
        return torch.from_numpy(points.take(numbers)).to(device)

    centroids = distributed.together(chosen)
    distributed.broadcast(centroids)  # the ranks may have devices of two kinds
    return centroids


def _sampled(points: Points, numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """Points of these numbers, rounded by `_exact`, (S, D) float64, near the first of them."""
    found = torch.empty(len(numbers), points.width, dtype=torch.float64, device=device)
    origin = torch.from_numpy(points.take(numbers[:1])).to(device).double()
    for first in range(0, len(numbers), TILE):
        rows = torch.from_numpy(points.take(numbers[first : first + TILE])).to(device)
        found[first : first + TILE] = _exact(rows, origin)
    return found


def _plus_plus(rows: Tensor, clusters: int, rng: np.random.Generator) -> list[int]:
    """Which K of a sample (S, D), rounded by `_exact`."""
    draws = torch.from_numpy(rng.random((clusters, 2 + int(math.log(clusters)))))
    squares = rows.square().sum(dim=1)
    whole = _whole_numbers(4 * float(squares.max()), len(rows))  # |x - y|^2 <= 4 max |x|^2
    chosen = [int(draws[0, 0] * len(rows))]
    left = _squared_distances(rows, squares, chosen)[0]  # to the nearest of the chosen, (S,)
    bar = tqdm(total=clusters - 1, desc="kmeans++", **bar_options(shown=distributed.rank() == 0))
    with bar:
        for draw in draws[1:]:
            sums = whole(left).cumsum(dim=0)
            below = (draw * int(sums[-1])).long().to(rows.device)
            tried = torch.searchsorted(sums, below, right=True).clamp_(max=len(rows) - 1)
            lefts = _squared_distances(rows, squares, tried.tolist()).minimum(left)
            best = int(whole(lefts).sum(dim=1).argmin())
            left = lefts[best]
            chosen.append(int(tried[best]))
            bar.update()
    return chosen


def _squared_distances(rows: Tensor, squares: Tensor, chosen: list[int]) -> Tensor:
    """Of some rows to all, (C, S); a row's own is exactly 0."""
    distances = (rows[chosen] @ rows.T).mul_(-2).add_(squares)
    distances.add_(squares[chosen, None]).clamp_(min=0)
    distances[torch.arange(len(chosen)), chosen] = 0
    return distances


def _whole_numbers(largest: float, number: int) -> Callable[[Tensor], Tensor]:
    """Maps values up to `largest` to int64, of which `number` can be added."""
    factor = _factor(largest, number)
    return lambda values: (values.double() * factor).round_().long()


def _factor(largest: float, number: int) -> float:
    """The power of two by which values are multiplied."""
    exponent = math.floor(_BITS - math.log2(number) - math.log2(max(largest, 2.0**-126)))
    return 2.0**exponent


def lloyd(
    points: Points, centroids: Tensor, *, largest: float, advance: Callable[[int], None]
) -> Iteration:
    """Move every centroid to the mean of the points that it is nearest to (Lloyd 1982).

    A centroid without points moves to a point: of the points that are farthest from their centroid
    within each cluster, those with the largest distances, to one empty cluster each.

    Args:
        points: the points.
        centroids: (K, D) float32, equal on all ranks.
        largest: `largest_value` of the points.
        advance: called with the number of rows after each tile.

    Raises:
        DataError: as `points` raise it, on all ranks.
    """
    sums = _Sums.zero(centroids)
    factor = _factor(largest, len(points))
    inertias = distributed.together(partial(_add_tiles, sums, points, centroids, factor, advance))
    distributed.all_reduce_sum(sums.values)
    distributed.all_reduce_sum(sums.counts)
    distributed.all_reduce_max(sums.farthest)
    empty = sums.counts == 0
    moved = centroids.clone()
    for some in (~empty).nonzero()[:, 0].split(_COLUMNS):  # a float64 copy of all would be as much
        moved[some] = (sums.values[some].double() / (factor * sums.counts[some, None])).float()
    # One of several clusters around one point stays empty: nothing is left that could fill it.
    sources = sums.farthest[(sums.counts > 1) & (sums.farthest >= MOST_POINTS)]
    numbers = (sources.sort(descending=True).values % MOST_POINTS)[: int(empty.sum())]
    if len(numbers):
        filling = distributed.together(lambda: points.take(numbers.cpu().numpy()))
        moved[empty.nonzero()[: len(numbers), 0]] = torch.from_numpy(filling).to(moved)
    return Iteration(
        moved,
        math.fsum(value for part in distributed.gather_objects(inertias) for value in part),
        int(empty.sum()),
        not torch.equal(moved, centroids),
    )


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of the points of each cluster, int64.

    Attributes:
        values: times a factor, (K, D).
        counts: (K,).
        farthest: the point farthest from the centroid: the bits of its squared distance, which are
            ordered as the distance is, times 2^32, plus its number; -1 without points; (K,).
    """

    values: Tensor
    counts: Tensor
    farthest: Tensor

    @classmethod
    def zero(cls, centroids: Tensor) -> _Sums:
        counts = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)
        return cls(torch.zeros_like(centroids, dtype=torch.int64), counts, counts - 1)

    def add(self, rows: Tensor, first: int, near: Tensor, distances: Tensor, factor: float) -> None:
        """Add a tile: rows (n, D), their clusters and squared distances (n,)."""
        self.counts.index_add_(0, near, torch.ones_like(near))
        self.values.index_add_(0, near, (rows.double() * factor).round_().long())
        numbers = torch.arange(first, first + len(rows), device=rows.device)
        keys = distances.view(torch.int32).long() * MOST_POINTS + numbers
        self.farthest.scatter_reduce_(0, near, keys, "amax")


def _add_tiles(
    sums: _Sums,
    points: Points,
    centroids: Tensor,
    factor: float,
    advance: Callable[[int], None],
) -> list[float]:
    """Add the tiles of this rank; return the sum of squared distances of each."""
    origin = _origin(centroids)
    inertias = []
    for first, rows in _tiles(points, centroids.device, advance):
        near, distances = _nearest(rows, centroids, origin)
        sums.add(rows, first, near, distances, factor)
        inertias.append(float(distances.double().sum()))
    return inertias


def assign(
    points: Points, centroids: Tensor, advance: Callable[[int], None]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The nearest centroid of each point, the first of equal ones, and the squared distance.

    Args:
        points: the points.
        centroids: (K, D) float32, equal on all ranks.
        advance: called with the number of rows after each tile.

    Returns:
        Numbers of clusters (N,) and squared distances (N,), on every rank, 8 N bytes.

    Raises:
        DataError: as `points` raise it, on all ranks.
    """
    origin = _origin(centroids)

    def of_rank() -> tuple[Tensor, Tensor]:
        tiles = _own_tiles(points)
        begin = min(len(points), tiles.start * TILE)
        number = min(len(points), tiles.stop * TILE) - begin
        # At once: small results between the products of the tiles would leave holes in the heap.
        near, distances = torch.empty(number, dtype=torch.int32), torch.empty(number)
        for first, rows in _tiles(points, centroids.device, advance):
            own = slice(first - begin, first - begin + len(rows))
            near[own], distances[own] = _nearest(rows, centroids, origin)
        return near, distances

    labels, squared = distributed.together(of_rank)
    return (
        distributed.gather_rows(labels).numpy(),
        distributed.gather_rows(squared).numpy(),
    )


def _tiles(
    points: Points, device: torch.device, advance: Callable[[int], None]
) -> Iterator[tuple[int, Tensor]]:
    """Number of the first row, and rows (n, D), of the tiles of this rank."""
    for tile in _own_tiles(points):
        first, stop = tile * TILE, min(len(points), (tile + 1) * TILE)
        rows = np.ascontiguousarray(points.rows(first, stop))
        yield first, torch.from_numpy(rows).to(device)
        advance(stop - first)


def _own_tiles(points: Points) -> range:
    tiles, ranks = -(-len(points) // TILE), distributed.world_size()
    return range(tiles * distributed.rank() // ranks, tiles * (distributed.rank() + 1) // ranks)


def _nearest(rows: Tensor, centroids: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row, (n,) int64, and the squared distance to it, (n,)."""
    exact = _exact(rows, origin)
    least, near = _least(exact, _exact(centroids[:_COLUMNS], origin))
    for first in range(_COLUMNS, len(centroids), _COLUMNS):
        value, index = _least(exact, _exact(centroids[first : first + _COLUMNS], origin))
        nearer = value < least
        least = torch.where(nearer, value, least)
        near = torch.where(nearer, index + first, near)
    # From the difference, since the form of `_least` loses the digits of a small distance.
    return near, (rows - centroids[near]).square().sum(dim=1)


def _least(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and number of the nearest centroid, (n,) each, of rows of `_exact`."""
    # |x - c|^2 = |x|^2 + |c|^2 - 2 x c, where |x|^2 does not change which is nearest. Product and
    # sum are two steps: one that rounds at places of its own choice would depend on threads.
    distances = (rows @ centroids.T).mul_(-2).add_(centroids.square().sum(dim=1))
    found = distances.min(dim=1)
    return found.values, found.indices


def _origin(centroids: Tensor) -> Tensor:
    """The middle of the smallest and the largest of each coordinate, (D,) float64."""
    return (centroids.amin(dim=0).double() + centroids.amax(dim=0)) / 2


def _exact(rows: Tensor, origin: Tensor) -> Tensor:
    """Rows (n, D) from another origin, in float64, whose products are exact.

    Coordinates are multiples of 2^-26 times the power of two above the length of their row.
    """
    moved = rows.double() - origin
    lengths = moved.square().sum(dim=1, keepdim=True).sqrt_().clamp_(min=2.0**-126)
    unit = lengths / torch.frexp(lengths).mantissa * 2.0**-_FIXED
    return moved.div_(unit).round_().mul_(unit)
