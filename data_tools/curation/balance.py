"""`dinoscale data balance`: choose images evenly over a hierarchy of clusters.

Source: hierarchical sampling of Vo et al. 2024 (arXiv:2405.15613), section 3.3. The number of
images is split equally over the clusters of the top level; a cluster with fewer images than its
share gives all, and what is left over goes to the others, again equally. The share of a cluster is
split over its clusters of the level below in the same way, and at level 1 images are picked.

Shape letters: N images, n clusters that share a number of images.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_tools.curation.clusters import Clusters, open_clusters
from data_tools.curation.embeddings import Embeddings
from data_tools.curation.page import (
    Example,
    Section,
    Strip,
    classes_table,
    entropy,
    require_page,
    sizes_table,
    write_page,
)
from data_tools.curation.selection import require_lines, require_list, write_selection
from data_tools.journal import Json
from dinoscale.data.order.permutation import hash64
from dinoscale.data.seeding import Stream, generator
from dinoscale.errors import DataError

Pick = Literal["random", "closest", "furthest"]

_SHOWN, _OF_EACH = 20, 8  # clusters on the page, and images of each
_SHARES, _IMAGES = 1, 2  # what is drawn, see `dinoscale.data.seeding`; 0 is in `hierarchy`


@dataclass(frozen=True)
class BalanceOptions:
    """How many images, and which of a cluster.

    Attributes:
        images: lines of the list.
        pick: which images of a cluster of level 1.
        repeat: give every cluster its equal share: an image of a small one stands in the list more
            than once. Otherwise an image is chosen at most once.
        seed: of all draws, >= 0.
    """

    images: int
    pick: Pick = "random"
    repeat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.images < 1 or self.seed < 0:
            raise DataError(
                f"need --images >= 1 and --seed >= 0, got {self.images} and {self.seed}"
            )


def balance(
    clusters: Path,
    out: Path,
    options: BalanceOptions,
    *,
    embeddings: Path | None = None,
    images: str | None = None,
) -> Json:
    """Choose images evenly over the clusters, and write them as a list that `data.train` takes.

    Memory: 64 bytes an image, and the names of a few thousand.

    Args:
        clusters: folder that `cluster` has written.
        out: list to write, NAME.txt; NAME.json beside it says how they were chosen, and NAME.html
            shows examples.
        options: how many, and which.
        embeddings: folder of the embeddings, if it has moved.
        images: folder of the images, if it has moved.

    Returns:
        The summary, ready for JSON.

    Raises:
        DataError: a folder cannot be used, or there are fewer images than asked for.
        OutputError: something else has the name of an output.
    """
    hierarchy = open_clusters(clusters)
    points = hierarchy.embeddings(embeddings)
    require_list(out, points)
    require_lines(points, images)
    require_page(out)
    if options.images > len(points) and not options.repeat:
        raise DataError(
            f"--images {options.images}: there are only {len(points)}, and each is chosen at most"
            " once. Ask for fewer, or add --repeat"
        )
    counts = balanced(hierarchy, options)
    chosen = np.flatnonzero(counts)
    summary = {
        "command": "balance",
        "clusters": {"path": str(clusters.resolve()), "work": hierarchy.about["work"]},
        "settings": asdict(options),
        "entropy": entropies(hierarchy, points, counts),
    }
    _write_page(out, hierarchy, points, counts, options, images)
    return write_selection(out, points, chosen, counts=counts[chosen], about=summary, images=images)


def _write_page(
    out: Path,
    hierarchy: Clusters,
    points: Embeddings,
    counts: NDArray[np.int64],
    options: BalanceOptions,
    images: str | None,
) -> None:
    """Write the page: sizes of top clusters before and after, and images of some of them."""
    chosen = np.flatnonzero(counts)
    top = hierarchy.of_images(hierarchy.num_levels).astype(np.int64)
    before, after = np.bincount(top), np.bincount(np.repeat(top, counts), minlength=top.max() + 1)
    write_page(
        out,
        title=f"An even choice of {points.path.name}",
        said=[
            f"{options.images:,} lines name {len(chosen):,} of {len(points):,} images, split"
            f" equally over {len(before):,} top clusters as far as these have as many. The"
            f" {len(points) - len(chosen):,} others are left out: each is of a cluster that had"
            " more images than its share."
        ],
        tables=[
            sizes_table("Top clusters", [str(i) for i in range(len(before))], before, after),
            *classes_table(points, chosen, counts[chosen]),
        ],
        sections=[_section(points, top, counts, before, after)],
        settings={"clusters": hierarchy.path, "levels": hierarchy.num_levels, **asdict(options)},
        images={} if images is None else {points.path: images},
    )


def _section(
    points: Embeddings,
    top: NDArray[np.int64],
    counts: NDArray[np.int64],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
) -> Section:
    """Images chosen of top clusters, from the largest to the smallest."""
    order = np.argsort(-before, kind="stable")
    places = np.linspace(0, len(order) - 1, min(len(order), _SHOWN)).astype(np.int64)
    strips = []
    for cluster in order[places].tolist():
        some = np.flatnonzero((top == cluster) & (counts > 0))
        spread = some[np.linspace(0, len(some) - 1, min(len(some), _OF_EACH)).astype(np.int64)]
        title = f"cluster {cluster}: {before[cluster]:,} images, {after[cluster]:,} lines"
        strips.append(Strip(title, [Example(points, row) for row in spread.tolist()]))
    said = "Chosen images of top clusters, from the largest cluster to the smallest."
    return Section("Some clusters", said, strips)


def balanced(hierarchy: Clusters, options: BalanceOptions) -> NDArray[np.int64]:
    """How often each image is chosen, (N,)."""
    sizes = _sizes(hierarchy)
    top = hierarchy.num_levels
    keys = _keys(options.seed, _SHARES, top, len(sizes[-1]))
    budgets = shares(sizes[-1], options.images, keys, repeat=options.repeat)
    for level in range(top - 1, 0, -1):
        parents = np.asarray(hierarchy.level(level + 1).assignments)
        keys = _keys(options.seed, _SHARES, level, len(parents))
        below = np.empty(len(parents), dtype=np.int64)
        order = np.argsort(parents, kind="stable")
        ends = np.cumsum(np.bincount(parents, minlength=len(budgets)))
        for children, budget in zip(np.split(order, ends[:-1]), budgets.tolist(), strict=True):
            own = sizes[level - 1][children]
            below[children] = shares(own, budget, keys[children], repeat=options.repeat)
        budgets = below
    return _picked(hierarchy, budgets, options)


def _sizes(hierarchy: Clusters) -> list[NDArray[np.int64]]:
    """Images of each cluster, for all levels from 1."""
    level = hierarchy.level(1)
    sizes = [np.bincount(level.assignments, minlength=len(level.centroids))]
    for number in range(2, hierarchy.num_levels + 1):
        level = hierarchy.level(number)
        summed = np.zeros(len(level.centroids), dtype=np.int64)
        np.add.at(summed, level.assignments, sizes[-1])
        sizes.append(summed)
    return sizes


def _keys(seed: int, use: int, level: int, number: int) -> NDArray[np.uint64]:
    """Random numbers of clusters or images 0..number - 1: functions of the seed and the number."""
    key = generator(seed, Stream.CURATION, use, level, 0).integers(2**64, dtype=np.uint64)
    return hash64(np.arange(number, dtype=np.uint64), key)


def shares(
    sizes: NDArray[np.int64], budget: int, keys: NDArray[np.uint64], *, repeat: bool
) -> NDArray[np.int64]:
    """Split a number of images over clusters, equally as far as they have as many.

    A cluster gets min(size, t), with the largest whole t for which these add up to at most the
    budget; the rest, fewer than there are clusters larger than t, goes one each to those with the
    smallest keys.

    Args:
        sizes: images of each cluster, (n,), positive.
        budget: number to split, at most the sum of the sizes unless `repeat`.
        keys: decide who gets one of the rest, (n,).
        repeat: whether a cluster may get more than it has.

    Returns:
        (n,), of sum `budget`.
    """
    if repeat:
        found = np.full(len(sizes), budget // len(sizes), dtype=np.int64)
    else:
        ordered = np.sort(sizes)
        before = np.cumsum(ordered) - ordered  # of the smaller ones
        level = (budget - before) // np.arange(len(sizes), 0, -1)  # t, if those give all
        first = np.flatnonzero(level < ordered)
        if not len(first):
            return sizes.astype(np.int64)
        found = np.minimum(sizes, level[first[0]])
    larger = np.arange(len(sizes)) if repeat else np.flatnonzero(sizes > found)
    rest = budget - int(found.sum())
    found[larger[np.argsort(keys[larger], kind="stable")[:rest]]] += 1
    return found


def _picked(
    hierarchy: Clusters, budgets: NDArray[np.int64], options: BalanceOptions
) -> NDArray[np.int64]:
    """How often each image is chosen, given how many of each cluster of level 1, (N,)."""
    level = hierarchy.level(1)
    labels = np.asarray(level.assignments)
    keys = _keys(options.seed, _IMAGES, 0, len(labels))
    if options.pick == "random":
        order = np.lexsort((keys, labels))
    else:
        sign = np.float32(1 if options.pick == "closest" else -1)
        order = np.lexsort((keys, sign * level.distances, labels))
    sizes = np.bincount(labels, minlength=len(budgets))
    starts = np.cumsum(sizes) - sizes
    whole, rest = np.divmod(budgets, sizes)
    counts = np.empty(len(labels), dtype=np.int64)
    place = np.arange(len(labels)) - np.repeat(starts, sizes)
    counts[order] = np.repeat(whole, sizes) + (place < np.repeat(rest, sizes))
    return counts


def entropies(
    hierarchy: Clusters, points: Embeddings, counts: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """How even the images are over top clusters, and over classes where these are known.

    H = - sum over i of p_i log p_i, in nats; `most` is that of equal shares.

    Args:
        hierarchy: the clusters.
        points: with the labels.
        counts: how often each image is chosen, (N,).
    """
    groups = {"top_clusters": hierarchy.of_images(hierarchy.num_levels).astype(np.int64)}
    labels = points.labels
    if labels is not None and (labels >= 0).any():
        groups["classes"] = labels
    return {name: _entropies(numbers, counts) for name, numbers in groups.items()}


def _entropies(numbers: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[str, float]:
    known = numbers >= 0
    before = np.bincount(numbers[known])
    after = np.bincount(np.repeat(numbers[known], counts[known]))
    return {
        "before": entropy(before),
        "after": entropy(after),
        "most": math.log(int((before > 0).sum())),
    }
