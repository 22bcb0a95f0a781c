"""`dinoscale data cluster`: against scikit-learn, on hard points, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances_argmin

from data_tools.curation import hierarchy
from data_tools.curation.clusters import open_clusters
from data_tools.curation.hierarchy import ClusterOptions, closest, cluster
from data_tools.curation.kmeans import (
    TILE,
    Held,
    _exact,
    _least,
    _origin,
    _sampled,
    _squared_distances,
    assign,
    first_centroids,
    lloyd,
)
from dinoscale.errors import DataError, OutputError
from tests.unit.data_tools.tiny_features import write_features

CPU = torch.device("cpu")
SMALL = ClusterOptions(levels=(24, 8, 3), iterations=6, resampling=(2,), seed=3)


def _blobs(points: int, blobs: int, *, width: int = 8, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(blobs, width))
    return (centers[np.arange(points) % blobs] + 0.15 * rng.normal(size=(points, width))).astype(
        np.float32
    )


def _nothing(_: int) -> None:
    """No progress."""


def _trained(rows: NDArray[np.float32], clusters: int, *, seed: int) -> float:
    """Inertia of k-means."""
    points, rng = Held(rows), np.random.default_rng(seed)
    centroids = first_centroids(points, clusters, method="kmeans++", rng=rng, device=CPU)
    for _ in range(50):
        after = lloyd(points, centroids, largest=float(np.abs(rows).max()), advance=_nothing)
        centroids = after.centroids
        if not after.moved:
            break
    return float(assign(points, centroids, _nothing)[1].sum())


def test_inertia_is_that_of_scikit_learn() -> None:
    """Best of four starts: one start in two, of either, takes two neighbouring blobs for one."""
    rows = _blobs(10_000, 20)
    theirs = KMeans(20, n_init=4, max_iter=50, random_state=0).fit(rows).inertia_
    ours = min(_trained(rows, 20, seed=seed) for seed in range(4))
    assert ours == pytest.approx(theirs, rel=0.01)


def test_an_iteration_is_that_of_scikit_learn() -> None:
    rows = _blobs(3 * TILE + 7, 30)
    first = rows[:30]
    theirs = KMeans(30, init=first, n_init=1, max_iter=1, algorithm="lloyd").fit(rows)
    ours = lloyd(Held(rows), torch.from_numpy(first), largest=5.0, advance=_nothing)
    # scikit-learn ends with an iteration that moves nothing; its centers are those of the last.
    np.testing.assert_allclose(ours.centroids.numpy(), theirs.cluster_centers_, atol=1e-5)


def test_the_nearest_of_more_centroids_than_one_product_has() -> None:
    rng = np.random.default_rng(0)
    rows, centroids = (rng.normal(size=(n, 2)).astype(np.float32) for n in (300, 9000))
    labels, squared = assign(Held(rows), torch.from_numpy(centroids), _nothing)
    distances = np.square(rows[:, None] - centroids[None]).sum(axis=2)
    np.testing.assert_allclose(squared, distances.min(axis=1), atol=1e-5)
    np.testing.assert_allclose(distances[np.arange(300), labels], squared, atol=1e-6)
    assert labels.max() > 4096


def test_neither_threads_nor_the_order_of_sums_change_a_bit() -> None:
    """Of 4 threads, products in float32 of this many rows and centroids differ from those of 1."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(3, size=(300, 768)).astype(np.float32))
    orders = torch.arange(768), torch.arange(768), torch.from_numpy(rng.permutation(768))
    sample = _sampled(Held(rows.numpy()), np.arange(300), CPU)
    least, distances, before = [], [], torch.get_num_threads()
    try:
        for threads, order in zip((1, 4, 1), orders, strict=True):
            torch.set_num_threads(threads)
            centroids = rows[:100, order] / 3
            origin = _origin(centroids)
            least.append(_least(_exact(rows[:, order], origin), _exact(centroids, origin)))
            squares = sample.square().sum(dim=1)
            distances.append(_squared_distances(sample[:, order], squares, [5, 7]))
    finally:
        torch.set_num_threads(before)
    for other in (1, 2):
        assert torch.equal(least[0][0], least[other][0])
        assert torch.equal(least[0][1], least[other][1])
        assert torch.equal(distances[0], distances[other])
    exact = torch.cdist(rows[[5, 7]].double(), rows.double())
    torch.testing.assert_close(distances[0].sqrt(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("offset", [0, 1000, 100_000])
def test_rows_that_share_a_large_mean_keep_their_clusters(offset: int) -> None:
    rows = np.random.default_rng(0).normal(size=(TILE, 64)).astype(np.float32) + np.float32(offset)
    labels, _ = assign(Held(rows), torch.from_numpy(rows[:64]), _nothing)
    double = rows.astype(np.float64)
    theirs = pairwise_distances_argmin(double - offset, double[:64] - offset)
    np.testing.assert_array_equal(labels, theirs)


def test_kmeans_plus_plus_finds_far_blobs_that_random_points_miss() -> None:
    """One blob in a hundred: random points would hit all ten small ones in one run of a million."""
    rng = np.random.default_rng(0)
    rows = 0.01 * rng.normal(size=(1000, 4)).astype(np.float32)
    rows[:10] += 10 * rng.normal(size=(10, 4)).astype(np.float32)
    draws = np.random.default_rng(0)
    found = first_centroids(Held(rows), 11, method="kmeans++", rng=draws, device=CPU)
    assert (found.norm(dim=1) > 1).sum() == 10


def test_an_empty_cluster_moves_to_the_farthest_points() -> None:
    rows = np.array([[0, 0], [0, 1], [0, 2], [5, 0], [6, 0], [9, 0]], np.float32)
    first = torch.tensor([[0.0, 1.0], [6.0, 0.0], [99.0, 99.0], [98.0, 98.0]])
    after = lloyd(Held(rows), first, largest=9.0, advance=_nothing)
    # Of the first cluster (0, 2) or (0, 0) is 1 away, of the second (9, 0) is 3 away.
    assert after.num_empty == 2
    assert after.centroids.tolist()[2] == [9, 0]
    assert after.centroids.tolist()[3] in ([0, 0], [0, 2])
    np.testing.assert_allclose(after.centroids[:2].numpy(), [[0, 1], [20 / 3, 0]], atol=1e-6)
    assert after.inertia == 1 + 0 + 1 + 1 + 0 + 9


def test_clusters_without_points_do_not_appear(tmp_path: Path) -> None:
    """Three different images, five times each, cannot fill five clusters."""
    rows = np.repeat(np.eye(3, 4, dtype=np.float32), 5, axis=0)
    features = write_features(tmp_path / "features", {"cls": rows})
    found = cluster(features, tmp_path / "out", ClusterOptions(levels=(5, 2), resampling=(0,)))
    assert [level["clusters"] for level in found["levels"]] == [3, 2]
    groups = open_clusters(tmp_path / "out").level(1).assignments.reshape(3, 5)
    assert sorted(groups[:, 0].tolist()) == [0, 1, 2]
    assert (groups == groups[:, :1]).all()
    with pytest.raises(DataError, match="level 1 has only 3 clusters that are not empty, fewer"):
        cluster(features, tmp_path / "more", ClusterOptions(levels=(5, 4), resampling=(0,)))


def _bytes(folder: Path) -> dict[str, bytes]:
    """All arrays of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    return _blobs(TILE + 900, 12)


@pytest.fixture(scope="module")
def clustered(rows: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features and their clusters."""
    place = tmp_path_factory.mktemp("clustered")
    write_features(place / "features", {"cls": rows}, shard_size=500)
    cluster(place / "features", place / "out", SMALL)
    return place


def test_levels_hold_each_other(clustered: Path, rows: NDArray[np.float32]) -> None:
    hierarchy = open_clusters(clustered / "out")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    points = rows / lengths
    for number in range(1, 4):
        level = hierarchy.level(number)
        distances = np.linalg.norm(points[:, None] - level.centroids[None], axis=2)
        own = np.take_along_axis(distances, level.assignments[:, None].astype(int), axis=1)[:, 0]
        np.testing.assert_allclose(own, distances.min(axis=1), atol=1e-5)
        np.testing.assert_allclose(level.distances, own, atol=1e-5)
        assert np.bincount(level.assignments).min() > 0
        points = level.centroids
    of_images = hierarchy.of_images(3)
    first, second = hierarchy.level(2).assignments, hierarchy.level(3).assignments
    assert np.array_equal(of_images, second[first[hierarchy.level(1).assignments]])
    assert not [path for path in (clustered / "out").iterdir() if "state" in path.name]


def test_clusters_do_not_depend_on_how_embeddings_are_cut(
    clustered: Path, rows: NDArray[np.float32], tmp_path: Path
) -> None:
    features = write_features(tmp_path / "features", {"cls": rows}, shard_size=97)
    cluster(features, tmp_path / "out", SMALL)
    assert _bytes(tmp_path / "out") == _bytes(clustered / "out")


def test_another_seed_gives_other_clusters(clustered: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        once = ClusterOptions(levels=(8,), iterations=1, resampling=(0,), seed=seed)
        cluster(clustered / "features", tmp_path / str(seed), once)
    assert _bytes(tmp_path / "0") != _bytes(tmp_path / "1")


class _Killed(BaseException):
    """Ends a run where a kill would."""


class _Disk:
    """Kills at one of the next files that are renamed into place, before or after it."""

    def __init__(self, *, left: int, before: bool) -> None:
        self._left, self._before, self._rename = left, before, os.replace

    def __call__(self, source: Path, target: Path) -> None:
        self._left -= 1
        if self._left or not self._before:
            self._rename(source, target)
        if not self._left:
            raise _Killed


def test_a_killed_clustering_goes_on_to_the_same_bytes(
    clustered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at some of the next files that it writes, in turn before and after it is in place."""
    out, killed = tmp_path / "out", 0
    while not (out / "manifest.json").exists():
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", _Disk(left=4 + killed % 5, before=killed % 2 == 0))
            try:
                cluster(clustered / "features", out, SMALL)
            except _Killed:
                killed += 1
    cluster(clustered / "features", out, SMALL)
    assert killed > 10
    assert _bytes(out) == _bytes(clustered / "out")


def test_a_folder_of_other_clusters_is_refused(
    clustered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ClusterOptions(levels=(24, 8), iterations=6, resampling=(2,), seed=3)
    with pytest.raises(OutputError, match=r"of other work, different in command\.levels:"):
        cluster(clustered / "features", clustered / "out", more)
    with monkeypatch.context() as patch:
        patch.setattr(hierarchy, "find_device", lambda _: torch.device("cuda"))
        with pytest.raises(OutputError, match=r"different in command\.device:"):
            cluster(clustered / "features", clustered / "out", SMALL)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds other files \(mine\.txt\)"):
        cluster(clustered / "features", tmp_path, SMALL)
    half = tmp_path / "half"
    shutil.copytree(clustered / "out", half)
    (half / "manifest.json").rename(half / "unfinished.json")
    with pytest.raises(DataError, match="half is unfinished: start the same"):
        open_clusters(half)


def test_what_cannot_be_clustered_is_refused_by_name(tmp_path: Path) -> None:
    rows = np.ones((9, 4), np.float32)
    rows[6, 1] = np.nan
    features = write_features(tmp_path / "features", {"cls": rows})
    with pytest.raises(DataError, match=r"levels 10: .*features has only 9 images, fewer than"):
        cluster(features, tmp_path / "out", ClusterOptions(levels=(10,)))
    with pytest.raises(DataError, match=r"features of 00006\.jpg \(row 6\) are not finite"):
        cluster(features, tmp_path / "out", ClusterOptions(levels=(2,)))
    array = features / "cls-00000.npy"
    array.write_bytes(array.read_bytes().replace(b"\0\0\x80?", b"\0\0\0?", 1))
    with pytest.raises(DataError, match=r"cls-00000\.npy is damaged: its SHA-256"):
        cluster(features, tmp_path / "another", ClusterOptions(levels=(2,)))
    for wrong in ((3, 3), (2, 5), (), (3, 0)):
        with pytest.raises(DataError, match=r"--levels .*from the most to the fewest"):
            ClusterOptions(levels=wrong)
    with pytest.raises(DataError, match="--resampling 1 2: need one number, or one for each of"):
        ClusterOptions(levels=(3, 2, 1), resampling=(1, 2))


def test_resampling_takes_the_closest_of_each_cluster() -> None:
    labels = np.array([0, 1, 0, 0, 1, 2], np.int32)
    squared = np.array([0.5, 0.0, 0.25, 0.125, 3.0, 7.0], np.float32)
    assert closest(labels, squared, each=2).tolist() == [1, 2, 3, 4, 5]
    assert closest(labels, squared, each=1).tolist() == [1, 3, 5]


def test_resampling_makes_clusters_of_a_skewed_set_more_even(tmp_path: Path) -> None:
    """Plain k-means spends its centroids on the crowded blob."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(12, 8))
    blob = np.concatenate([np.zeros(900, int), np.arange(1, 12).repeat(20)])
    rows = (centers[blob] + 0.2 * rng.normal(size=(len(blob), 8))).astype(np.float32)
    features = write_features(tmp_path / "features", {"cls": rows})
    of_crowd = {}
    for steps in (0, 3):
        out = tmp_path / f"out{steps}"
        cluster(features, out, ClusterOptions(levels=(36,), resampling=(steps,), iterations=4))
        level = open_clusters(out).level(1)
        of_crowd[steps] = len(np.unique(level.assignments[:900]))
    assert of_crowd[3] < of_crowd[0]


def test_the_manifest_says_where_clusters_come_from(clustered: Path) -> None:
    about = json.loads((clustered / "out" / "manifest.json").read_text())
    hierarchy = open_clusters(clustered / "out")
    assert about["embeddings"]["digest"] == hierarchy.embeddings().digest
    moved = clustered / "moved"
    (clustered / "features").rename(moved)
    try:
        find = partial(hierarchy.embeddings, moved)
        assert find().digest == about["embeddings"]["digest"]
        with pytest.raises(DataError, match="features is no folder of features"):
            hierarchy.embeddings()
    finally:
        moved.rename(clustered / "features")
