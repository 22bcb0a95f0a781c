"""Nearest rows against brute force in float64, whatever the blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_tools.curation import neighbours
from data_tools.curation.embeddings import Embeddings, open_embeddings
from data_tools.curation.neighbours import Neighbours, nearest, require_comparable, rescored
from data_tools.curation.search import InvertedLists
from dinoscale.errors import ConfigError, DataError
from tests.unit.data_tools.tiny_features import write_features

WIDTH = 24
BOUND = WIDTH**0.5 * 2**-26 + 2**-23  # of fixed point, and of rows of length 1 in float32
CPU = torch.device("cpu")


def _rows(number: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(number, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    """300 rows; 40 are one row, and 3 a multiple of another one."""
    rows = _rows(300, seed=0)
    rows[100:140] = rows[7]
    rows[[50, 150, 250]] = rows[3] * np.array([[2], [3], [0.5]], dtype=np.float32)
    place = tmp_path_factory.mktemp("neighbours")
    return open_embeddings(write_features(place / "base", {"cls": rows}, shard_size=64))


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    place = tmp_path_factory.mktemp("neighbours")
    return open_embeddings(write_features(place / "queries", {"cls": _rows(70, seed=1)}))


def _cosines(queries: Embeddings, base: Embeddings) -> NDArray[np.float64]:
    """All of them, in float64; -3 of a row with itself."""
    one, other = (of.rows(0, len(of)).astype(np.float64) for of in (queries, base))
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    cosines: NDArray[np.float64] = one @ other.T
    if queries is base:
        np.fill_diagonal(cosines, -3)
    return cosines


def _nearest(
    queries: Embeddings, base: Embeddings, *, k: int, block: int, at_least: float = -2.0
) -> Neighbours:
    parts = [
        nearest(
            *(queries, base, range(start, min(start + block, len(queries)))),
            k=k,
            at_least=at_least,
            device=CPU,
        )
        for start in range(0, len(queries), block)
    ]
    fields = ("rows", "cosines", "closest")
    return Neighbours(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _require_equal(one: Neighbours, other: Neighbours) -> None:
    assert np.array_equal(one.rows, other.rows)
    assert np.array_equal(one.cosines, other.cosines)
    assert np.array_equal(one.closest, other.closest)


@pytest.mark.parametrize("k", [1, 5, 60])
def test_neighbours_are_those_of_brute_force(queries: Embeddings, base: Embeddings, k: int) -> None:
    for of in (queries, base):
        found, cosines = _nearest(of, base, k=k, block=1000), _cosines(of, base)
        expected = np.sort(cosines, axis=1)[:, ::-1]
        assert np.abs(found.cosines - expected[:, :k]).max() < BOUND
        # Every row that is named has the cosine that is said of it, and none is named twice.
        assert np.abs(np.take_along_axis(cosines, found.rows, 1) - found.cosines).max() < BOUND
        assert all(len({*rows}) == k for rows in found.rows.tolist())
        assert np.array_equal(found.closest, found.cosines[:, 0])


def test_equal_cosines_go_by_row(base: Embeddings) -> None:
    found = _nearest(base, base, k=45, block=1000)
    copies = [7, *range(100, 140)]
    for row in copies:
        assert found.rows[row, :40].tolist() == [other for other in copies if other != row]
    assert _nearest(base, base, k=5, block=1000).rows[139].tolist() == [7, 100, 101, 102, 103]


def test_neighbours_do_not_depend_on_blocks(
    queries: Embeddings, base: Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [_nearest(of, base, k=20, block=1000) for of in (queries, base)]
    for block, tile in [(47, 2**12), (300, 2**13)]:
        monkeypatch.setattr(neighbours, "_TILE", tile)
        monkeypatch.setattr(neighbours, "_LEAST_TILE", 7)
        for of, expected in zip((queries, base), whole, strict=True):
            _require_equal(_nearest(of, base, k=20, block=block), expected)


def test_rows_that_are_too_far_are_no_neighbours(base: Embeddings) -> None:
    far, all_of = (_nearest(base, base, k=60, block=90, at_least=a) for a in (0.3, -2.0))
    near = all_of.cosines >= 0.3 - neighbours.ROUNDING
    assert 0 < near.sum() < near.size
    assert np.array_equal(far.rows, np.where(near, all_of.rows, -1))
    assert np.array_equal(far.cosines[near], all_of.cosines[near])
    assert np.array_equal(far.closest, all_of.closest)


def test_more_neighbours_than_rows_are_filled_with_none(queries: Embeddings) -> None:
    found = _nearest(queries, queries, k=80, block=70)
    assert (found.rows[:, :69] >= 0).all()
    assert (found.rows[:, 69:] == -1).all()


def test_candidates_get_the_cosines_of_the_exact_search(base: Embeddings) -> None:
    exact = _nearest(base, base, k=12, block=1000)
    drawn = np.random.default_rng(2)
    candidates = np.concatenate(
        [exact.rows, np.arange(300)[:, None], np.full((300, 2), -1)], axis=1
    )  # a query itself, and none, are among them
    candidates = drawn.permuted(candidates, axis=1)
    _require_equal(rescored(base, base, range(300), candidates, k=12), exact)
    part = rescored(base, base, range(280, 300), candidates[280:], k=12)
    assert np.array_equal(part.rows, exact.rows[280:])


def test_lists_of_faiss_find_copies_and_most_neighbours(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    rows = _rows(4000, seed=5)
    rows[2000:] = rows[:2000] + 0.05 * _rows(2000, seed=6)
    embeddings = open_embeddings(write_features(tmp_path / "rows", {"cls": rows}, shard_size=999))
    exact = _nearest(embeddings, embeddings, k=10, block=4000)
    lists = InvertedLists(embeddings)
    found = rescored(
        embeddings, embeddings, range(4000), lists.candidates(embeddings.rows(0, 4000), 11), k=10
    )
    assert np.array_equal(found.rows[:, 0], (np.arange(4000) + 2000) % 4000)
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found.rows, exact.rows, strict=True)])
    assert recall > 0.5


def test_approximate_search_without_faiss_says_what_to_install(
    base: Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"--approximate needs faiss.*dinoscale\[curation\]"):
        InvertedLists(base)


def test_rows_that_cannot_be_compared_are_refused_by_name(base: Embeddings, tmp_path: Path) -> None:
    wide = write_features(tmp_path / "wide", {"cls": np.ones((3, WIDTH + 1), np.float32)})
    with pytest.raises(
        DataError, match=r"wide cannot be compared with .*base: its width.*25 and 24"
    ):
        require_comparable(base, open_embeddings(wide))
    broken = np.ones((3, WIDTH), np.float32)
    broken[1, 2] = np.nan
    folder = open_embeddings(write_features(tmp_path / "broken", {"cls": broken}))
    with pytest.raises(DataError, match=r"broken: the features of 00001.jpg \(row 1\) are not fin"):
        _nearest(folder, base, k=2, block=10)
