"""Nearest neighbours: cases by hand, and settings that must not change the result."""

import logging
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dinoscale.evaluate.classification.knn import knn_accuracy, nearest_neighbours
from dinoscale.planning.bench.tensor_memory import with_peak_bytes


def _unit(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_nearest_image_decides_for_k_1() -> None:
    bank, labels = _unit(0, 40, 90), torch.tensor([0, 1, 2])
    found = knn_accuracy(bank, labels, _unit(10, 35, 80), torch.tensor([0, 1, 0]), ks=(1,))
    assert found[1].top1 == pytest.approx(200 / 3)
    assert found[1].top5 == found[1].top1  # one class may be right, as in the published code


def test_a_near_neighbour_outvotes_two_far_ones_unless_votes_are_equal() -> None:
    bank, labels = _unit(0, 60, 60), torch.tensor([0, 1, 1])
    weighted = knn_accuracy(bank, labels, _unit(5), torch.tensor([0]), ks=(3,))
    assert weighted[3].top1 == 100
    equal = knn_accuracy(bank, labels, _unit(5), torch.tensor([0]), ks=(3,), temp=math.inf)
    assert equal[3].top1 == 0


@pytest.mark.parametrize("temp", [1e-300, 1e-6, 1e-3, 0.01])
def test_no_temperature_is_too_small(temp: float) -> None:
    bank, labels = _unit(*range(0, 60, 10)), torch.tensor([4, 3, 2, 1, 0, 5])
    test = _unit(1, 1, 1, 1, 51, 51)
    of_test = torch.tensor([4, 3, 0, 5, 5, 4])  # nearest, second, fifth, sixth; nearest, sixth
    found = knn_accuracy(bank, labels, test, of_test, ks=(6,), temp=temp)[6]
    assert found.top1 == pytest.approx(200 / 6)
    assert found.top5 == pytest.approx(400 / 6)


def test_on_chunk_is_called_after_each_chunk() -> None:
    bank, labels, chunks = _unit(0, 40, 90), torch.tensor([0, 1, 2]), list[int]()
    test, of_test = _unit(*range(7)), torch.zeros(7, dtype=torch.int64)
    alive = partial(chunks.append, 1)
    knn_accuracy(bank, labels, test, of_test, ks=(1,), chunk_size=2, on_chunk=alive)
    assert len(chunks) == 4


def test_the_norm_of_a_feature_does_not_matter() -> None:
    bank, labels = _unit(0, 30), torch.tensor([0, 1])
    long = bank * torch.tensor([[1.0], [1000.0]])
    assert knn_accuracy(long, labels, _unit(10), torch.tensor([0]), ks=(1,))[1].top1 == 100


def test_top_5_counts_the_five_classes_with_most_votes() -> None:
    bank, labels = _unit(*range(0, 70, 10)), torch.arange(7)
    test_labels = torch.tensor([0, 4, 5, 6])
    found = knn_accuracy(bank, labels, _unit(0, 0, 0, 0), test_labels, ks=(7,))
    assert found[7].top1 == 25
    assert found[7].top5 == 50


def _random_sets(*, num_test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(6, 16, generator=generator)
    train_labels, test_labels = torch.arange(200) % 6, torch.arange(num_test) % 6
    train = centers[train_labels] + 2 * torch.randn(200, 16, generator=generator)
    test = centers[test_labels] + 2 * torch.randn(num_test, 16, generator=generator)
    return train, train_labels, test, test_labels


@pytest.mark.parametrize("num_test", [1, 3, 99, 101, 250])
def test_chunks_do_not_change_the_result_nor_lose_an_image(num_test: int) -> None:
    sets = _random_sets(num_test=num_test)
    whole = knn_accuracy(*sets, ks=(1, 20, 200), chunk_size=num_test)
    assert (whole[20].top1 * num_test / 100) == pytest.approx(
        round(whole[20].top1 * num_test / 100)
    )
    for chunk_size in (1, 2, 64, None):
        assert knn_accuracy(*sets, ks=(1, 20, 200), chunk_size=chunk_size) == whole


@given(
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    k=st.integers(1, 40),
    bank_chunk=st.integers(1, 41),
)
def test_of_equally_similar_images_the_first_of_the_bank_are_nearest(
    rows: list[int], k: int, bank_chunk: int
) -> None:
    axes = torch.eye(4)  # cosines of exactly 0 and 1: ties everywhere
    k = min(k, len(rows))
    found = nearest_neighbours(axes[rows], axes, k=k, bank_chunk_size=bank_chunk)
    cosines = axes @ axes[rows].T
    whole = cosines.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found[0], whole.values[:, :k])
    assert torch.equal(found[1], whole.indices[:, :k])


@pytest.mark.parametrize("bank_chunk", [1, 7, 64, 199, 200, 1000])
def test_chunks_of_the_bank_do_not_change_the_result(bank_chunk: int) -> None:
    sets = _random_sets(num_test=101)
    whole = knn_accuracy(*sets, ks=(1, 20, 200))
    assert knn_accuracy(*sets, ks=(1, 20, 200), chunk_size=50, bank_chunk_size=bank_chunk) == whole


def test_memory_does_not_grow_with_either_set() -> None:
    bank, test = torch.randn(20_000, 8), torch.randn(4_000, 8)
    sets = (bank, torch.arange(20_000) % 10, test, torch.arange(4_000) % 10)
    _, bytes_before = with_peak_bytes(lambda: None)
    chunks = {"chunk_size": 250, "bank_chunk_size": 2_000}
    _, peak = with_peak_bytes(lambda: knn_accuracy(*sets, ks=(10,), **chunks))
    assert peak - bytes_before < 2 * 250 * 2_000 * 4  # all cosines are 160 times one chunk of them


def test_one_call_for_many_k_equals_one_call_each() -> None:
    sets = _random_sets(num_test=60)
    together = knn_accuracy(*sets, ks=(5, 50, 20))
    assert list(together) == [5, 50, 20]
    for k in together:
        assert knn_accuracy(*sets, ks=(k,))[k] == together[k]


def test_more_neighbours_than_images_uses_all_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sets = _random_sets(num_test=20)
    with caplog.at_level(logging.WARNING):
        found = knn_accuracy(*sets, ks=(20, 1000))
    assert "[1000]" in caplog.text
    assert "200 images" in caplog.text
    assert (found[1000].k, found[1000].neighbours) == (1000, 200)
    assert found[1000].top1 == knn_accuracy(*sets, ks=(200,))[200].top1


def test_a_class_that_the_bank_lacks_is_never_right() -> None:
    found = knn_accuracy(_unit(0, 1), torch.tensor([0, 0]), _unit(0), torch.tensor([9]), ks=(2,))
    assert found[2].top1 == found[2].top5 == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (0,)}, "k, temp"),
        ({"ks": ()}, "k, temp"),
        ({"temp": 0.0}, "k, temp"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"bank_chunk_size": 0}, "chunk_size"),
        ({"train_labels": torch.tensor([0, -1])}, "train: every image needs a label"),
        ({"test_labels": torch.tensor([0, 1])}, "test: need features"),
        ({"test_features": torch.ones(1, 3)}, "different widths"),
        ({"train_features": torch.ones(0, 2), "train_labels": torch.ones(0)}, "N > 0"),
    ],
)
def test_bad_calls_are_refused(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "train_features": _unit(0, 90),
        "train_labels": torch.tensor([0, 1]),
        "test_features": _unit(10),
        "test_labels": torch.tensor([0]),
        "ks": (1,),
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**good, **change})  # type: ignore[arg-type]  # wrong on purpose


def test_one_image_of_many_counts_exactly() -> None:
    bank, labels = _unit(0, 90), torch.tensor([0, 1])
    found = knn_accuracy(bank, labels, _unit(*[1] * 7), torch.tensor([0] * 6 + [1]), ks=(1,))
    assert found[1].top1 == 600 / 7
