"""J and F against scikit-learn, a dilation by a disk, and small masks by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from sklearn.metrics import jaccard_score

from dinoscale.data.sources.videos import VOID
from dinoscale.evaluate.dense.mask_scores import boundary, boundary_measure, region_similarity
from dinoscale.evaluate.video.davis import score_objects


def _square(*, top: int = 20, left: int = 20, side: int = 30) -> NDArray[np.bool_]:
    mask = np.zeros((90, 120), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def _blob(seed: int) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    return binary_dilation(rng.random((90, 120)) < 0.003, iterations=6)


def _by_dilation(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """The benchmark's own definition: boundaries dilated by a disk."""
    radius = math.ceil(0.008 * math.hypot(*found.shape))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2
    ours, theirs = boundary(found), boundary(truth)
    precision = (ours & binary_dilation(theirs, disk)).sum() / ours.sum()
    recall = (theirs & binary_dilation(ours, disk)).sum() / theirs.sum()
    return float(2 * precision * recall / (precision + recall))


def test_region_similarity_equals_scikit_learn() -> None:
    found, truth = _blob(0), _blob(1)
    expected = jaccard_score(truth.ravel(), found.ravel())
    assert region_similarity(found, truth) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_boundary_measure_equals_dilation_by_a_disk(seed: int) -> None:
    found, truth = _blob(seed), np.roll(_blob(seed), (seed, 2), axis=(0, 1))
    assert 0 < _by_dilation(found, truth) < 1
    assert boundary_measure(found, truth) == pytest.approx(_by_dilation(found, truth), abs=1e-12)


def test_boundary_of_a_square_by_hand() -> None:
    """Towards the upper left: a row and a column before the square, a row and a column in it."""
    mask = np.zeros((5, 5), dtype=bool)
    mask[2:4, 2:4] = True
    expected = [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    assert boundary(mask).astype(int).tolist() == expected


def test_the_border_of_the_image_is_no_boundary() -> None:
    assert not boundary(np.ones((4, 6), dtype=bool)).any()


def test_equal_masks_score_one_and_empty_ones_agree() -> None:
    empty = np.zeros((90, 120), dtype=bool)
    for score in (region_similarity, boundary_measure):
        assert score(_square(), _square()) == 1
        assert score(empty, empty) == 1
        assert score(_square(), empty) == score(empty, _square()) == 0


def test_a_shift_within_the_tolerance_does_not_lower_the_score() -> None:
    """The diagonal is 150 pixels, the tolerance ceil(1.2) = 2."""
    assert boundary_measure(_square(left=22), _square()) == 1
    assert region_similarity(_square(left=22), _square()) == pytest.approx(28 / 32)
    # By 3: of the 120 boundary pixels of a square the two upright sides miss, but for the two
    # ends of each, which are within 2 of the level sides.
    assert 0.5 < boundary_measure(_square(left=23), _square()) < 0.75


def test_every_object_is_scored_and_void_is_ignored() -> None:
    truth = np.zeros((40, 40), dtype=np.uint8)
    truth[5:15, 5:15], truth[20:30, 20:30] = 3, 7
    found = truth.copy()
    found[20:30, 20:25] = 0
    found[5:15, 15:20] = 3
    scores = score_objects(found, truth, [3, 7])
    np.testing.assert_allclose(scores[:, 0], [100 / 150, 0.5])
    truth[5:15, 15:20] = VOID
    np.testing.assert_allclose(score_objects(found, truth, [3, 7])[0], [1, 1])
