"""Choose images like those of a seed set: its nearest neighbours, or images of its clusters.

Source: Oquab et al. 2023 (arXiv:2304.07193), appendix A.4. Of a large seed set the k nearest images
of each seed are taken (DINOv2: k = 4, and 32 for ImageNet-1k). For a small one these are too few:
each seed belongs to the cluster of the nearest centroid, and of every cluster with more than three
seeds so many images are drawn (DINOv2: 10,000 of each, of 100,000 clusters).

Shape letters: N images, S seeds, K clusters, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.curation.clusters import Clusters, open_clusters
from data_tools.curation.embeddings import Embeddings, open_embeddings, verify
from data_tools.curation.kmeans import assign
from data_tools.curation.neighbours import require_comparable
from data_tools.curation.page import (
    Example,
    Section,
    Strip,
    Table,
    classes_table,
    page_of,
    require_page,
    write_page,
)
from data_tools.curation.search import (
    Searched,
    Way,
    in_turns,
    joined,
    journal_beside,
    packed,
    settings_of,
    spans_of,
)
from data_tools.curation.selection import (
    record_of,
    require_lines,
    require_list,
    write_selection,
)
from data_tools.journal import Json
from dinoscale.data.order.permutation import hash64
from dinoscale.data.seeding import Stream, generator
from dinoscale.errors import DataError
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import code_fingerprint, fingerprint
from dinoscale.runtime.opening import on_first_rank

_IMAGES = 3  # what is drawn, see `dinoscale.data.seeding`; others are in `hierarchy` and `balance`
_SHOWN = 12  # seeds or clusters on the page
_OF_EACH = 8  # images of each
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent


@dataclass(frozen=True)
class BySeed:
    """The nearest images of every seed.

    Attributes:
        k: images of a seed.
        at_least: cosine of an image and its seed.
        images: at most; None: any number. First neighbours go first, then second ones, and so on,
            each in the order of their cosines.
    """

    k: int
    at_least: float
    images: int | None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.k < 1 or not -1 <= self.at_least <= 1:
            raise DataError(
                f"need --neighbours >= 1 and --threshold from -1 to 1, got {self.k} and"
                f" {self.at_least:g}"
            )
        _require_some(self.images)


@dataclass(frozen=True)
class ByCluster:
    """Images drawn of the clusters of seeds.

    Attributes:
        min_seeds: a cluster with fewer seeds gives nothing.
        per_cluster: images of a cluster, all where it has no more.
        images: at most, drawn from these; None: any number.
        seed: of the draw, >= 0.
    """

    min_seeds: int
    per_cluster: int
    images: int | None
    seed: int

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.min_seeds < 1 or self.per_cluster < 1 or self.seed < 0:
            raise DataError(
                "need --min-seeds >= 1, --per-cluster >= 1 and --seed >= 0, got"
                f" {self.min_seeds}, {self.per_cluster} and {self.seed}"
            )
        _require_some(self.images)


def _require_some(images: int | None) -> None:
    if images is not None and images < 1:
        raise DataError(f"--images {images}: need at least one")


@dataclass(frozen=True)
class Output:
    """What is written where.

    Attributes:
        path: of the list, NAME.txt; beside it are NAME.json and NAME.html.
        images: folder of the images, if it has moved.
        seed_images: folder of the images of the seeds, if it has moved; for the page.
    """

    path: Path
    images: str | None = None
    seed_images: str | None = None


@dataclass(frozen=True, eq=False)
class _Choice:
    """What was chosen, and what is said of it."""

    rows: NDArray[np.int64]  # ascending
    numbers: Json
    said: str
    tables: Sequence[Table]
    section: Section


def retrieve_neighbours(
    folder: Path,
    seeds: Path,
    out: Output,
    by: BySeed,
    *,
    way: Way,
    features: Sequence[str] = (),
    progress: bool = True,
) -> Json:
    """Write the list of the nearest images of every seed, and a page; all ranks call it.

    Args:
        folder: embeddings of the images.
        seeds: embeddings of the seeds; they enter the list only where they are among the images.
        out: the list.
        by: which images.
        way: how neighbours are searched.
        features: as `open_embeddings` takes them.
        progress: show a bar.

    Returns:
        The summary, ready for JSON.

    Raises:
        ConfigError: faiss is asked for and not there.
        DataError: embeddings cannot be read or compared, have changed since they were written,
            nothing is found, or a file cannot be written.
        OutputError: something else has the name of a file.
    """

    def opened() -> tuple[Embeddings, Embeddings]:
        whole = open_embeddings(folder, features=features)
        of_seeds = open_embeddings(seeds, features=features)
        require_comparable(whole, of_seeds)
        _require_files(out, whole, of_seeds)
        return whole, of_seeds

    whole, of_seeds = distributed.together(opened)
    require_lines(whole, out.images)
    spans = spans_of(len(of_seeds), way.block)
    searched = Searched(whole, way)

    def piece(number: int) -> Json:
        found = searched.nearest(of_seeds, spans[number], k=by.k, at_least=by.at_least)
        return {"rows": packed(found.rows), "cosines": packed(found.cosines)}

    work = fingerprint(
        input={"images": whole.digest, "seeds": of_seeds.digest},
        command={"k": by.k, "at_least": by.at_least, **settings_of(way)},
        code=code_fingerprint(__name__),
    )
    with journal_beside(out.path, work) as journal:
        verify(whole, of_seeds)
        results = in_turns(piece, [len(span) for span in spans], journal, progress=progress)

        def write(_: object) -> Json:
            rows = joined(results, "rows", np.int64).reshape(-1, by.k)
            cosines = joined(results, "cosines", np.float64).reshape(-1, by.k)
            choice = _of_seeds(whole, of_seeds, rows, cosines, by.images)
            settings = {**asdict(by), "approximate": way.approximate}
            return _written(whole, of_seeds, choice, settings, out)

        summary = on_first_rank(write)
    return distributed.broadcast_object(summary) or {}


def _require_files(out: Output, whole: Embeddings, seeds: Embeddings) -> None:
    """Refuse what could not be written, on the first rank."""
    if not distributed.rank():
        require_list(out.path, whole, seeds)
        require_page(out.path)


def _of_seeds(
    whole: Embeddings,
    seeds: Embeddings,
    rows: NDArray[np.int64],
    cosines: NDArray[np.float64],
    most: int | None,
) -> _Choice:
    """Choose among the neighbours (S, k) of all seeds."""
    found = rows >= 0
    if not found.any():
        raise DataError("no image has a seed as near as --threshold says: take a smaller one")
    rank = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    order = np.lexsort((rows[found], -cosines[found], rank[found]))
    ordered = rows[found][order]
    _, first = np.unique(ordered, return_index=True)
    chosen = np.sort(ordered[np.sort(first)[:most]])
    per_seed = found.sum(axis=1)
    numbers = {
        "seeds": len(rows),
        "seeds_without_images": int((per_seed == 0).sum()),
        "neighbours": int(found.sum()),
        "different": len(first),
    }
    quantiles = np.percentile(cosines[found], _QUANTILES)
    table = Table(
        "Cosines of seeds and their images",
        ["", "cosine"],
        [[f"{q} % are at most", f"{c:.3f}"] for q, c in zip(_QUANTILES, quantiles, strict=True)],
    )
    said = (
        f"Of each of {len(rows):,} seeds the {rows.shape[1]} nearest images were taken,"
        f" {found.sum():,} in all, of which {len(first):,} are different ones."
    )
    strips = [
        _strip_of_seed(whole, seeds, seed, rows[seed], cosines[seed])
        for seed in _spread(len(rows), _SHOWN)
    ]
    section = Section("Some seeds", "Each seed, with its nearest images and their cosines.", strips)
    return _Choice(chosen, numbers, said, [table], section)


def _strip_of_seed(
    whole: Embeddings,
    seeds: Embeddings,
    seed: int,
    rows: NDArray[np.int64],
    cosines: NDArray[np.float64],
) -> Strip:
    near = [
        Example(whole, row, f"{cosine:.3f}")
        for row, cosine in zip(rows[:_OF_EACH].tolist(), cosines.tolist(), strict=False)
        if row >= 0
    ]
    return Strip(f"seed {seed}", [Example(seeds, seed, "seed"), *near])


def _spread(number: int, most: int) -> list[int]:
    """Some of 0..number - 1, spread evenly."""
    return sorted({int(place) for place in np.linspace(0, number - 1, min(number, most))})


def retrieve_clusters(
    folder: Path | None,
    seeds: Path,
    clusters: Path,
    out: Output,
    by: ByCluster,
    *,
    device: torch.device,
    progress: bool = True,
) -> Json:
    """Write a list of images drawn of the clusters of seeds, and a page; all ranks call it.

    Args:
        folder: embeddings that were clustered; None takes them from where they were.
        seeds: embeddings of the seeds.
        clusters: folder that `cluster` has written; its level 1 is used.
        out: the list.
        by: which images.
        device: where products are computed.
        progress: show a bar.

    Returns:
        The summary, ready for JSON.

    Raises:
        DataError: a folder cannot be read, the embeddings are others than were clustered, no
            cluster has seeds enough, or a file cannot be written.
        OutputError: something else has the name of a file.
    """

    def opened() -> tuple[Clusters, Embeddings, Embeddings]:
        hierarchy = open_clusters(clusters)
        whole = hierarchy.embeddings(folder)
        of_seeds = open_embeddings(seeds, features=whole.features, normalize=whole.normalized)
        require_comparable(whole, of_seeds)
        _require_files(out, whole, of_seeds)
        return hierarchy, whole, of_seeds

    hierarchy, whole, of_seeds = distributed.together(opened)
    number = hierarchy.about["levels"][0]["clusters"]
    # Comparing checksums reads all its arrays: one rank does, and no other waits in a collective.
    level = on_first_rank(lambda _: hierarchy.level(1))
    centroids = torch.empty(number, whole.width) if level is None else torch.tensor(level.centroids)
    distributed.broadcast(centroids)
    require_lines(whole, out.images)
    verify(of_seeds)
    shown = progress and not distributed.rank()
    with tqdm(total=len(of_seeds), unit="img", disable=None if shown else True) as bar:
        of_seed, _ = assign(of_seeds, centroids.to(device), partial(_advance, bar))

    def write(_: object) -> Json:
        assert level is not None  # of the first rank, which writes
        labels = np.asarray(level.assignments)
        choice = _of_clusters(whole, of_seeds, labels, of_seed, number, by)
        settings = {**asdict(by), "clusters": str(clusters.resolve())}
        return _written(whole, of_seeds, choice, settings, out)

    return distributed.broadcast_object(on_first_rank(write)) or {}


def _advance(bar: tqdm[NoReturn], rows: int) -> None:
    bar.update(rows)


def _of_clusters(
    whole: Embeddings,
    seeds: Embeddings,
    labels: NDArray[np.int32],
    of_seed: NDArray[np.int32],
    clusters: int,
    by: ByCluster,
) -> _Choice:
    """Draw from the clusters (N,) of images, given those of seeds, (S,)."""
    num_seeds = np.bincount(of_seed, minlength=clusters)
    sizes = np.bincount(labels, minlength=clusters)
    enough = num_seeds >= by.min_seeds
    if not enough.any():
        raise DataError(
            f"--min-seeds {by.min_seeds}: no cluster has so many, the most are"
            f" {num_seeds.max()}; take fewer, or make fewer clusters"
        )
    key = generator(by.seed, Stream.CURATION, _IMAGES, 0, 0).integers(2**64, dtype=np.uint64)
    keys = hash64(np.arange(len(labels), dtype=np.uint64), key)
    order = np.lexsort((keys, labels))
    place = np.empty(len(labels), dtype=np.int64)  # of an image among those of its cluster
    place[order] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    drawn = np.flatnonzero(enough[labels] & (place < by.per_cluster))
    chosen = np.sort(drawn[np.argsort(keys[drawn], kind="stable")[: by.images]])
    numbers = {
        "seeds": len(of_seed),
        "clusters": clusters,
        "clusters_with_seeds": int((num_seeds > 0).sum()),
        "clusters_taken": int(enough.sum()),
        "images_of_these": int(sizes[enough].sum()),
        "drawn": len(drawn),
    }
    said = (
        f"{numbers['clusters_taken']:,} of {clusters:,} clusters have at least"
        f" {by.min_seeds} seeds; of each up to {by.per_cluster:,} images were drawn."
    )
    most = np.argsort(-num_seeds, kind="stable")[: numbers["clusters_taken"]]
    strips = []
    for cluster in most[_spread(len(most), _SHOWN)].tolist():
        near = np.flatnonzero(of_seed == cluster)[: _OF_EACH // 2].tolist()
        some = chosen[labels[chosen] == cluster][:_OF_EACH].tolist()
        title = (
            f"cluster {cluster}: {num_seeds[cluster]:,} seeds, {sizes[cluster]:,} images,"
            f" {min(sizes[cluster], by.per_cluster):,} drawn"
        )
        examples = [Example(seeds, seed, "seed") for seed in near]
        strips.append(Strip(title, [*examples, *(Example(whole, row) for row in some)]))
    section = Section("Some clusters", "Seeds of a cluster, then images drawn from it.", strips)
    return _Choice(chosen, numbers, said, [], section)


def _written(
    whole: Embeddings, seeds: Embeddings, choice: _Choice, settings: Json, out: Output
) -> Json:
    """Write all files, and return the summary."""
    numbers = {"images": len(whole), **choice.numbers, "chosen": len(choice.rows)}
    about = {
        "command": "retrieve",
        "settings": settings,
        "seeds": {"path": str(seeds.path), "digest": seeds.digest},
        "numbers": numbers,
    }
    moved = {whole.path: out.images, seeds.path: out.seed_images}
    write_page(
        out.path,
        title=f"Images of {whole.path.name} like those of {seeds.path.name}",
        said=[f"{len(choice.rows):,} of {len(whole):,} images are chosen. {choice.said}"],
        tables=[_numbers_table(numbers), *choice.tables, *classes_table(whole, choice.rows)],
        sections=[choice.section],
        settings={"embeddings": whole.path, "seeds": seeds.path, **settings},
        images={path: place for path, place in moved.items() if place is not None},
    )
    record = write_selection(out.path, whole, choice.rows, about=about, images=out.images)
    return {
        "list": str(out.path),
        "record": str(record_of(out.path)),
        "page": str(page_of(out.path)),
        "train_on": record["train_on"],
        **numbers,
    }


def _numbers_table(numbers: dict[str, Any]) -> Table:
    rows = [[name.replace("_", " "), f"{count:,}"] for name, count in numbers.items()]
    return Table("Numbers", ["", ""], rows)
