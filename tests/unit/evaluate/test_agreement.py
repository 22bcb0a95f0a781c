"""Agreement of nearest neighbours, against a search image by image."""

import pytest
import torch
from torch import Tensor

from dinoscale.evaluate.label_free import agreement as module
from dinoscale.evaluate.label_free.agreement import NEIGHBOURS, agreement, nearest


def _features(images: int) -> Tensor:
    return torch.randn(images, 5, generator=torch.Generator().manual_seed(images))


def test_neighbours_are_the_most_similar_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    features, numbers = _features(30), torch.arange(30) * 2 + 1  # even ones were not read
    table = nearest(features, numbers, num_images=61)
    assert table.shape == (61, NEIGHBOURS)
    for row, number in enumerate(numbers.tolist()):
        similar = [
            float(torch.cosine_similarity(features[row], other, dim=0)) for other in features
        ]
        similar[row] = -2
        best = sorted(range(30), key=similar.__getitem__, reverse=True)[:NEIGHBOURS]
        assert sorted(table[number].tolist()) == sorted(2 * image + 1 for image in best)
    assert (table[0::2] == -1).all()


def test_agreement_is_the_shared_fraction_over_images_in_both() -> None:
    first = torch.tensor([[1, 2], [0, 2], [0, 1], [-1, -1]])
    second = torch.tensor([[2, 1], [0, 3], [-1, -1], [0, 1]])
    assert agreement(first, first) == 1
    assert agreement(first, second) == pytest.approx((2 + 1) / 4)


def test_unrelated_features_agree_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    images = 400
    tables = [
        nearest(
            torch.randn(images, 8, generator=generator), torch.arange(images), num_images=images
        )
        for _ in range(2)
    ]
    chance = NEIGHBOURS / (images - 1)
    assert agreement(*tables) == pytest.approx(chance, abs=4 * (chance / (10 * images)) ** 0.5)


def test_few_images_have_few_neighbours_and_one_has_none() -> None:
    assert nearest(_features(3), torch.arange(3), num_images=3).shape == (3, 2)
    with pytest.raises(ValueError, match="two or more, got 1"):
        nearest(_features(1), torch.arange(1), num_images=1)
    with pytest.raises(ValueError, match="among 3 and 4"):
        agreement(torch.zeros(3, 2), torch.zeros(4, 2))
