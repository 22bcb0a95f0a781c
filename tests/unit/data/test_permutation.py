import itertools
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dinoscale.data.order.permutation import Permutation


def _order(size: int, seed: int) -> np.ndarray:
    return Permutation(size, np.random.default_rng(seed))(np.arange(size))


def _chi_square(counts: np.ndarray) -> float:
    """Standard deviations above what equal chances give; beyond 5 is no accident."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - freedom) / np.sqrt(2 * freedom))


@settings(deadline=None, max_examples=100)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**32))
@example(size=1, seed=0)
@example(size=2, seed=0)
@example(size=3, seed=0)
def test_every_number_comes_exactly_once(size: int, seed: int) -> None:
    order = _order(size, seed)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("power", [2, 3, 4, 7, 8, 12, 16, 17])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_sizes_beside_powers_of_two_are_permuted(power: int, off: int) -> None:
    size = 2**power + off
    np.testing.assert_array_equal(np.sort(_order(size, seed=power)), np.arange(size))


@given(size=st.integers(2, 2**62 - 1), data=st.data())
@settings(deadline=None)
def test_places_of_huge_sets_have_distinct_images(size: int, data: st.DataObject) -> None:
    places = st.lists(st.integers(0, size - 1), min_size=2, max_size=20, unique=True)
    images = Permutation(size, np.random.default_rng(0))(np.array(data.draw(places)))
    assert len(set(images.tolist())) == images.size
    assert 0 <= images.min() <= images.max() < size


def test_an_image_does_not_depend_on_what_else_is_asked_for() -> None:
    permutation = Permutation(1000, np.random.default_rng(0))
    whole = permutation(np.arange(1000))
    assert [int(permutation(np.array([i]))[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_a_small_set_are_equally_likely(size: int) -> None:
    rng = np.random.default_rng(size)
    places = np.arange(size)
    orders = {order: 0 for order in itertools.permutations(range(size))}
    for _ in range(1500):
        orders[tuple(Permutation(size, rng)(places).tolist())] += 1
    assert abs(_chi_square(np.array(list(orders.values())))) < 4


@pytest.mark.parametrize("size", [1000, 65_537])
def test_images_are_spread_evenly_over_places(size: int) -> None:
    """All pairs of (a part of the places, a part of the images) meet equally often."""
    boxes = 16 if size < 10_000 else 64
    part = np.arange(size) * boxes // size
    total = np.zeros((boxes, boxes))
    for seed in range(10):
        image_part = _order(size, seed) * boxes // size
        np.add.at(total, (part, image_part), 1)
    # A permutation fills rows and columns exactly: (boxes - 1)^2 degrees of freedom, not boxes^2.
    expected = total.sum() / boxes**2
    freedom = (boxes - 1) ** 2
    statistic = ((total - expected) ** 2).sum() / expected
    assert abs(statistic - freedom) / np.sqrt(2 * freedom) < 4


def test_differences_of_neighbours_are_uniform() -> None:
    size, total = 65_537, np.zeros(128)
    for seed in range(5):
        differences = np.diff(_order(size, seed)) % size
        total += np.bincount(differences * 128 // size, minlength=128)
    assert abs(_chi_square(total)) < 4


def test_each_of_two_images_comes_first_equally_often() -> None:
    """Over many permutations, for pairs near and far apart."""
    draws, size = 1500, 97
    pairs = [(0, 1), (0, 96), (3, 50), (48, 49)]
    first = np.zeros(len(pairs))
    rng = np.random.default_rng(0)
    for _ in range(draws):
        place = np.argsort(Permutation(size, rng)(np.arange(size)))
        first += [place[a] < place[b] for a, b in pairs]
    assert np.abs(first - draws / 2).max() < 4 * np.sqrt(draws / 4)


def test_permutations_of_other_keys_are_not_correlated() -> None:
    orders = [_order(100_000, seed).astype(float) for seed in range(6)]
    orders.append(np.arange(100_000.0))
    correlations = np.corrcoef(orders)[np.triu_indices(7, k=1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(100_000)


def test_a_batch_of_a_hundred_million_images_takes_no_longer_than_one_of_few() -> None:
    """The shuffled array of all of them took seconds and 400 MB at the start of each epoch."""
    places = np.arange(4096)

    def least_s(num_images: int) -> float:
        times = []
        for seed in range(10):
            begin = time.process_time()
            Permutation(num_images, np.random.default_rng(seed))(places)
            times.append(time.process_time() - begin)
        return min(times)

    assert least_s(100_000_000) < 20 * least_s(10_000)


@pytest.mark.parametrize("size", [0, -1, 2**62])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="size"):
        Permutation(size, np.random.default_rng(0))
