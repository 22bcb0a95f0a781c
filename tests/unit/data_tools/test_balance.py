"""`dinoscale data balance`: shares against brute force, and lists of a small hierarchy."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_tools.curation.balance import BalanceOptions, balance, balanced, shares
from data_tools.curation.clusters import Clusters, open_clusters
from data_tools.curation.hierarchy import ClusterOptions, cluster
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError, OutputError
from tests.unit.data.conftest import jpeg
from tests.unit.data_tools.tiny_features import write_features

# Images of each blob; blobs 0-1, 2-3 and 4-5 are neighbours, so three top clusters of two.
SIZES = (30, 6, 2, 3, 8, 1)
PLACES = np.array([[10, 0, 1], [10, 0, -1], [0, 10, 1], [0, 10, -1], [-10, 0, 1], [-10, 0, -1]])


def _keys(number: int) -> NDArray[np.uint64]:
    return np.random.default_rng(0).permutation(number).astype(np.uint64)


@pytest.mark.parametrize("budget", range(12))
def test_shares_are_as_even_as_sizes_allow(budget: int) -> None:
    sizes = np.array([5, 1, 3, 2])
    found = shares(sizes, min(budget, 11), _keys(4), repeat=False)
    allowed = [
        split
        for split in product(*(range(size + 1) for size in sizes))
        if sum(split) == min(budget, 11)
    ]
    evenest = min(sum(part**2 for part in split) for split in allowed)
    assert tuple(found.tolist()) in allowed
    assert sum(part**2 for part in found.tolist()) == evenest


def test_shares_with_repeats_are_equal_whatever_the_sizes() -> None:
    found = shares(np.array([5, 1, 3, 2]), 15, _keys(4), repeat=True)
    assert sorted(found.tolist()) == [3, 4, 4, 4]
    assert found[_keys(4) == 3] == 3  # the rest goes to the smallest keys


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, features and clusters of 50 images in six blobs; the class is the top cluster."""
    place = tmp_path_factory.mktemp("balance")
    blob = np.repeat(np.arange(6), SIZES)
    noise = np.random.default_rng(0).normal(size=(50, 3))
    rows = (PLACES[blob] + 0.05 * noise).astype(np.float32)
    names = [f"{i:02d}.jpg" for i in range(50)]
    (place / "images").mkdir()
    for name in names:
        (place / "images" / name).write_bytes(jpeg(1, width=16, height=16))
    write_features(
        place / "features",
        {"cls": rows},
        names=names,
        labels=(blob // 2).tolist(),
        spec=str(place / "images"),
    )
    options = ClusterOptions(levels=(6, 3), resampling=(0,), normalize=False)
    cluster(place / "features", place / "clusters", options)
    return place


def _chosen_of_blobs(hierarchy: Clusters, options: BalanceOptions) -> list[int]:
    counts = balanced(hierarchy, options)
    blob = np.repeat(np.arange(6), SIZES)
    return [int(counts[blob == i].sum()) for i in range(6)]


def test_a_small_case_is_balanced_as_by_hand(place: Path) -> None:
    hierarchy = open_clusters(place / "clusters")
    # 24 of 50. Three top clusters of 36, 5 and 9: the second gives its 5, the third its 9, and the
    # first the other 10: 6 of the blob of 6 would be more than half, so 5 of each.
    assert _chosen_of_blobs(hierarchy, BalanceOptions(24)) == [5, 5, 2, 3, 8, 1]
    # 12: 4 each. 2 + 2; 2 + 2; 1 and 3.
    assert _chosen_of_blobs(hierarchy, BalanceOptions(12)) == [2, 2, 2, 2, 3, 1]
    assert _chosen_of_blobs(hierarchy, BalanceOptions(50)) == [*SIZES]
    # 60 with repeats: 20 of each top cluster, 10 of each blob.
    assert _chosen_of_blobs(hierarchy, BalanceOptions(60, repeat=True)) == [10] * 6


def test_repeats_are_even_within_a_cluster(place: Path) -> None:
    counts = balanced(open_clusters(place / "clusters"), BalanceOptions(60, repeat=True))
    blob = np.repeat(np.arange(6), SIZES)
    for i, size in enumerate(SIZES):
        assert set(counts[blob == i].tolist()) <= {10 // size, 10 // size + 1}


def test_images_are_picked_by_chance_or_by_distance(place: Path) -> None:
    hierarchy = open_clusters(place / "clusters")
    level = hierarchy.level(1)
    own = level.assignments == level.assignments[0]  # of the largest blob
    chosen = {
        pick: balanced(hierarchy, BalanceOptions(12, pick)) > 0  # type: ignore[arg-type]  # a test's text
        for pick in ("random", "closest", "furthest")
    }
    ordered = np.argsort(np.where(own, level.distances, np.inf))[: own.sum()]
    assert set(np.flatnonzero(chosen["closest"] & own)) == set(ordered[:2])
    assert set(np.flatnonzero(chosen["furthest"] & own)) == set(ordered[-2:])
    again = balanced(hierarchy, BalanceOptions(12)) > 0
    other = balanced(hierarchy, BalanceOptions(12, seed=1)) > 0
    assert np.array_equal(chosen["random"], again)
    assert not np.array_equal(chosen["random"], other)


def test_the_list_and_its_record(place: Path) -> None:
    out = place / "balanced.txt"
    record = balance(place / "clusters", out, BalanceOptions(12))
    trained = open_source(str(out))
    assert len(trained) == 12
    assert len({trained.path(i) for i in range(12)}) == 12
    assert json.loads((place / "balanced.json").read_text()) == record
    by_class = record["entropy"]["classes"]
    shares_before = np.array([36, 5, 9]) / 50
    assert by_class["before"] == pytest.approx(-(shares_before * np.log(shares_before)).sum())
    assert by_class["after"] == pytest.approx(math.log(3))
    assert by_class["most"] == pytest.approx(math.log(3))
    assert record["entropy"]["top_clusters"] == pytest.approx(by_class)
    page = (place / "balanced.html").read_text()
    assert "12 lines name 12 of 50 images" in page
    assert page.count("data:image/jpeg") == 12
    assert page.count(": 36 images, 4 lines") == 1


def test_mistakes_are_named(place: Path) -> None:
    with pytest.raises(DataError, match=r"--images 51: there are only 50, .* add --repeat"):
        balance(place / "clusters", place / "a.txt", BalanceOptions(51))
    with pytest.raises(DataError, match=r"a\.csv: data\.train takes a list by its ending"):
        balance(place / "clusters", place / "a.csv", BalanceOptions(5))
    with pytest.raises(DataError, match="features is no folder of clusters"):
        balance(place / "features", place / "a.txt", BalanceOptions(5))
    (place / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.txt exists"):
        balance(place / "clusters", place / "mine.txt", BalanceOptions(5))
    other = write_features(place / "other", {"cls": np.ones((50, 3), np.float32)})
    with pytest.raises(DataError, match="other holds other embeddings than"):
        balance(place / "clusters", place / "a.txt", BalanceOptions(5), embeddings=other)
