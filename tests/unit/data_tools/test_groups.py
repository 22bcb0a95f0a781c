"""Groups of copies: what is joined, what is kept, and what that takes of memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from data_tools.curation import groups
from data_tools.curation.groups import Found, Groups, decide, groups_in
from data_tools.near_duplicates import Groups as UnionFind


def _found(images: int, pairs: NDArray[np.int64], near: list[int]) -> Found:
    tests = [(np.array([[row, 0] for row in near], np.int64).reshape(-1, 2), np.ones(len(near)))]
    return Found(images, pairs, np.ones(len(pairs)), 0, np.zeros(11, np.int64), tests)


def _as_lists(found: Groups) -> list[list[int]]:
    return [part.tolist() for part in np.split(found.rows, found.starts[1:-1])]


def test_groups_are_those_of_union_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 7 pairs and more; then what is kept, said image by image."""
    monkeypatch.setattr(groups, "_PAIRS", 7)
    rng = np.random.default_rng(0)
    pairs, pixels = rng.integers(0, 60, size=(150, 2)) * 2, rng.integers(1, 3, size=200)
    pairs = pairs[(pairs[:, 0] // 20) == (pairs[:, 1] // 20)]  # several groups, and odd rows alone
    found, joined = _found(200, pairs, [6, 13, 44]), UnionFind(200)
    for one, other in pairs.tolist():
        joined.join(one, other)
    expected = joined.of_several()
    several = groups_in(found)
    assert len(expected) > 4
    assert _as_lists(several) == expected
    grouped = decide(found, several, pixels[several.rows])
    good = [group for group in expected if not {6, 13, 44} & {*group}]
    assert grouped.keepers.tolist() == [max(group, key=lambda i: pixels[i]) for group in good]
    for place, (keep, group) in enumerate(zip(grouped.keepers.tolist(), good, strict=True)):
        assert grouped.copies_of(place) == [row for row in group if row != keep]
    bad = {row for group in expected if group not in good for row in group}
    assert grouped.near.tolist() == [6, 13, 44]
    assert grouped.beside.tolist() == sorted(bad - {6, 44})
    gone = {*grouped.near.tolist(), *grouped.beside.tolist(), *grouped.copies.tolist()}
    assert grouped.kept.tolist() == sorted({*range(200)} - gone)


def test_without_pairs_all_images_are_kept() -> None:
    found = _found(5, np.empty((0, 2), np.int64), [])
    grouped = decide(found, groups_in(found), np.empty(0, np.int64))
    assert grouped.kept.tolist() == [0, 1, 2, 3, 4]
    assert len(grouped.keepers) == len(grouped.copies) == 0


def _peak(work: Callable[[], object]) -> int:
    """Bytes that some work holds at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are joined in blocks; as Python's numbers they would take 184 bytes each."""
    monkeypatch.setattr(groups, "_PAIRS", 5000)
    pairs = np.random.default_rng(0).integers(0, 1000, size=(100_000, 2))
    found = _found(1000, pairs, [])
    assert _peak(lambda: groups_in(found)) < 16 * len(pairs)
