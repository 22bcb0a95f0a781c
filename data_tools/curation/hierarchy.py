"""`dinoscale data cluster`: hierarchical k-means with resampling, on the features of `embed`.

Source: Vo et al. 2024, "Automatic data curation for self-supervised learning: a clustering-based
approach" (arXiv:2405.15613). Level 1 clusters the images, each further level the centroids of the
one below. k-means puts more centroids where there are more points. Each step of resampling
therefore takes the points closest to each centroid, as many from a small cluster as from a large
one, finds centroids for these alone, and assigns all points to them: the centroids spread more
evenly over what there is.

Shape letters: N points of a level, K clusters, D width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data_tools.curation.clusters import ClusterFolder, Level, State
from data_tools.curation.embeddings import Embeddings, open_embeddings
from data_tools.curation.kmeans import (
    MOST_POINTS,
    Chosen,
    Held,
    Points,
    Start,
    assign,
    first_centroids,
    largest_value,
    lloyd,
)
from data_tools.journal import Json
from dinoscale.data.seeding import Stream, generator
from dinoscale.errors import DataError, RunFailedError
from dinoscale.evaluate.features import find_device
from dinoscale.evaluate.progress import bar_options
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import code_fingerprint, fingerprint
from dinoscale.runtime.opening import on_first_rank
from dinoscale.runtime.outputs import writing_into
from dinoscale.runtime.versions import package_version

log = logging.getLogger(__name__)

T = TypeVar("T")

_START = 0  # what is drawn, see `dinoscale.data.seeding`


@dataclass(frozen=True)
class ClusterOptions:
    """How to cluster.

    Attributes:
        levels: K of each level, each smaller than the one before.
        iterations: most iterations of Lloyd's algorithm; fewer if no centroid moves any more.
        resampling: steps of each level, or one number for all.
        start: how the first centroids are chosen.
        features: which make a row; empty takes the usual one.
        normalize: whether rows have length 1.
        seed: of all draws, >= 0.
    """

    levels: tuple[int, ...]
    iterations: int = 50
    resampling: tuple[int, ...] = (10,)
    start: Start = "kmeans++"
    features: tuple[str, ...] = ()
    normalize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        falling = all(a > b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if not self.levels or not falling or self.levels[-1] < 1:
            raise DataError(
                f"--levels {_listed(self.levels)}: need numbers of clusters, from the most to the"
                " fewest, such as 800 100 25"
            )
        if self.iterations < 1 or min(self.resampling) < 0 or self.seed < 0:
            raise DataError(
                "need --iterations >= 1, --resampling >= 0 and --seed >= 0, got"
                f" {self.iterations}, {_listed(self.resampling)} and {self.seed}"
            )
        if len(self.resampling) not in (1, len(self.levels)):
            raise DataError(
                f"--resampling {_listed(self.resampling)}: need one number, or one for each of the"
                f" {len(self.levels)} levels"
            )

    def steps(self, level: int) -> int:
        """Steps of resampling at a level, from 1."""
        return self.resampling[level - 1 if len(self.resampling) > 1 else 0]


def _listed(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


@dataclass(frozen=True)
class _Job:
    options: ClusterOptions
    folder: ClusterFolder
    device: torch.device


def cluster(embeddings: Path, out: Path, options: ClusterOptions) -> Json:
    """Cluster embeddings into a hierarchy; the same call continues after an interruption.

    All ranks of a job call it; each reads and compares its share, and all get the summary. The
    result is the same for any number of ranks, threads and interruptions, on one kind of machine.
    Memory of a rank: 16 K D + 24 K bytes for the largest K, 128 K D bytes (at least 256 KiB D) for
    k-means++, 48 bytes an image, and half a GB.

    Args:
        embeddings: folder of features, as `dinoscale embed` wrote it.
        out: folder to write to, which all ranks must see.
        options: how.

    Returns:
        What the folder holds, ready for JSON.

    Raises:
        ConfigError: there is no such device.
        DataError: the embeddings cannot be used, or are too few for the clusters.
        OutputError: the folder holds something else, or cannot be written.
        RunFailedError: memory does not suffice.
    """
    started = time.monotonic()
    points = distributed.together(partial(_opened, embeddings, options))
    job = _Job(options, ClusterFolder(out), find_device(None))
    try:
        about = _on_first(job, lambda: job.folder.begin(_work(points, job)))
        if about is None:
            _on_first(job, partial(_verify_once, job.folder, points))
            with _enough_memory():
                about = _levels(job, points)
    finally:
        job.folder.release()
    seconds = round(time.monotonic() - started, 1)
    keys = ("levels_asked", "images", "levels")
    return {"out": str(out), **{key: about[key] for key in keys}, "seconds": seconds}


def _opened(path: Path, options: ClusterOptions) -> Embeddings:
    points = open_embeddings(path, features=options.features, normalize=options.normalize)
    if len(points) < options.levels[0]:
        raise DataError(
            f"--levels {options.levels[0]}: {path} has only {len(points)} images, fewer than"
            " clusters. Ask for fewer clusters"
        )
    if len(points) >= MOST_POINTS:
        raise DataError(f"{path} has {len(points)} images, more than {MOST_POINTS - 1}")
    return points


def _work(points: Embeddings, job: _Job) -> dict[str, object]:
    """All that the clusters depend on; devices of two kinds may round sums of squares apart."""
    return fingerprint(
        input={"embeddings": points.digest},
        command={**asdict(job.options), "device": job.device.type},
        code=code_fingerprint(__name__),
    )


def _verify_once(folder: ClusterFolder, points: Embeddings) -> None:
    """Compare the checksums of the embeddings, unless a clustering of them has begun."""
    if folder.state() is None and folder.level(1) is None:
        points.verify()


def _on_first(job: _Job, work: Callable[[], T]) -> T:
    """Do something on rank 0 and return its result on all; errors of the file system as ours."""

    def done() -> T:
        with writing_into(job.folder.path):
            return work()

    result = distributed.broadcast_object(on_first_rank(lambda _: done()))
    return result  # type: ignore[return-value]  # that of rank 0


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Turn a lack of memory into a sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunFailedError(
            f"the clusters need more memory than available ({str(error).split('. ')[0]}); ask for"
            " fewer, or --start random"
        ) from error


def _levels(job: _Job, images: Embeddings) -> Json:
    """Cluster what is not clustered yet; write and return the manifest."""
    points: Points = images
    levels = []
    for number, asked in enumerate(job.options.levels, 1):
        if len(points) < asked:
            raise DataError(
                f"level {number - 1} has only {len(points)} clusters that are not empty, fewer than"
                f" the {asked} of level {number}: the embeddings hold too many equal images. Ask"
                " for fewer clusters"
            )
        kept = _on_first(job, partial(_kept, job.folder, number))
        if kept is None:
            level = _cluster_level(job, points, number)
            kept = _on_first(job, partial(_added, job.folder, number, level))
        about, centroids = kept
        levels.append(about)
        points = Held(centroids)

    def finish() -> Json:
        about = {
            "levels_asked": [*job.options.levels],
            "images": len(images),
            "levels": levels,
            "embeddings": {
                "path": str(images.path.resolve()),
                "digest": images.digest,
                "features": [*images.features],
                "normalized": images.normalized,
            },
            "seed": job.options.seed,
            "version": package_version("dinoscale"),
            "work": _work(images, job),
        }
        job.folder.finish(about)
        return about

    return _on_first(job, finish)


def _kept(folder: ClusterFolder, number: int) -> tuple[Json, NDArray[np.float32]] | None:
    """Record and centroids of a finished level."""
    level = folder.level(number)
    return None if level is None else (level.about, level.centroids)


def _added(folder: ClusterFolder, number: int, level: Level) -> tuple[Json, NDArray[np.float32]]:
    """Write a level; its record, which has the names of the files, and its centroids."""
    folder.add(number, level)
    kept = _kept(folder, number)
    assert kept is not None
    return kept


def _cluster_level(job: _Job, points: Points, number: int) -> Level:
    """k-means, and k-means on resampled points, from where an earlier start has stopped."""
    clusters, steps = job.options.levels[number - 1], job.options.steps(number)
    state = _on_first(job, job.folder.state)
    if state is not None and state.level != number:
        state = None
    first = 0 if state is None else state.step
    centroids = None if state is None else torch.from_numpy(state.centroids).to(job.device)
    passes = (steps - first + 1) * (job.options.iterations + 1) + 1  # of all points, at most
    bar = tqdm(
        total=passes * len(points),
        unit="row",
        unit_scale=True,
        desc=f"level {number}",
        **bar_options(shown=distributed.rank() == 0),
    )
    with bar:
        counted = _counted(bar)
        largest = largest_value(points, counted)
        taken = first
        for step in range(first, steps + 1):
            resumed = state if step == first else None
            chosen: Points | None = points
            if step and not (resumed and resumed.done):
                chosen = _resampled(job, points, centroids, number, step, counted)
            if chosen is None:
                break
            centroids = _kmeans(job, chosen, number, step, largest, resumed, counted)
            taken = step
        assert centroids is not None
        labels, squared = assign(points, centroids, counted)
    about = {"asked": clusters, "points": len(points), "resampling_steps": taken}
    return _without_empty(centroids.cpu().numpy(), labels, squared, about)


def _counted(bar: tqdm[int]) -> Callable[[int], None]:
    """Advance a bar by the rows of this rank, for all ranks."""

    def advance(rows: int) -> None:
        bar.update(rows * distributed.world_size())

    return advance


def _kmeans(
    job: _Job,
    points: Points,
    level: int,
    step: int,
    largest: float,
    state: State | None,
    advance: Callable[[int], None],
) -> Tensor:
    """Centroids (K, D) of points after all iterations; each is kept."""
    if state is None:
        rng = generator(job.options.seed, Stream.CURATION, _START, level, step)
        clusters = job.options.levels[level - 1]
        method = job.options.start
        centroids = first_centroids(points, clusters, method=method, rng=rng, device=job.device)
        iterations, done = 0, False
    else:
        centroids = torch.from_numpy(state.centroids).to(job.device)
        iterations, done = state.iterations, state.done
    while not done:
        after = lloyd(points, centroids, largest=largest, advance=advance)
        centroids, iterations = after.centroids, iterations + 1
        done = iterations == job.options.iterations or not after.moved
        kept = State(level, step, iterations, done, centroids.cpu().numpy())
        _on_first(job, partial(job.folder.keep, kept))
        if done:
            log.info(
                "level %d, step %d: mean squared distance %.6g after %d iterations",
                *(level, step, after.inertia / len(points), iterations),
            )
    return centroids


def _resampled(
    job: _Job,
    points: Points,
    centroids: Tensor | None,
    level: int,
    step: int,
    advance: Callable[[int], None],
) -> Chosen | None:
    """The points closest to each centroid of the step before; None if too few differ."""
    numbers = _on_first(job, partial(job.folder.sample, level, step))
    if numbers is None:
        assert centroids is not None
        labels, squared = assign(points, centroids, advance)
        numbers = closest(labels, squared, each=resampled_each(len(points), len(centroids)))
        _on_first(job, partial(job.folder.keep_sample, level, step, numbers))
    clusters = job.options.levels[level - 1]
    if len(numbers) <= clusters:
        log.info("level %d: %d points to resample, no more than clusters", level, len(numbers))
        return None
    return Chosen(points, numbers)


def resampled_each(points: int, clusters: int) -> int:
    """Points that resampling takes of a cluster: half the mean size, as published, two at least."""
    return max(2, points // (2 * clusters))


def closest(
    labels: NDArray[np.int32], squared: NDArray[np.float32], *, each: int
) -> NDArray[np.int64]:
    """The points closest to the centroid of each cluster, ascending.

    Args:
        labels: cluster of each point, (N,).
        squared: distances, (N,), not negative.
        each: how many of a cluster; a smaller one gives all.
    """
    # The bits of a float that is not negative are ordered as it is: one sort of whole numbers.
    keys = (labels.astype(np.uint64) << np.uint64(32)) | squared.view(np.uint32)
    order = np.argsort(keys, kind="stable")
    del keys  # as long as the order
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    place = np.arange(len(labels)) - np.repeat(starts, sizes)  # within its cluster
    return np.sort(order[place < each])


def _without_empty(
    centroids: NDArray[np.float32],
    labels: NDArray[np.int32],
    squared: NDArray[np.float32],
    about: Json,
) -> Level:
    """A level whose clusters all have points, numbered anew."""
    sizes = np.bincount(labels, minlength=len(centroids))
    filled = np.flatnonzero(sizes)
    renumbered = np.full(len(centroids), -1, dtype=np.int32)
    renumbered[filled] = np.arange(len(filled))
    record = {
        **about,
        "clusters": len(filled),
        "inertia": float(squared.sum(dtype=np.float64)),
        "smallest": int(sizes[filled].min()),
        "median": float(np.median(sizes[filled])),
        "largest": int(sizes.max()),
    }
    return Level(record, centroids[filled], renumbered[labels], np.sqrt(squared))
