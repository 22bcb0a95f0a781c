"""Distances of features against their literal form, channel by channel."""

import pytest
import torch
from torch import Tensor

from dinoscale.losses.features import FeatureLoss, feature_distances


def _features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _literal(x: Tensor, y: Tensor, kind: FeatureLoss) -> Tensor:
    """Of one feature, (D,) twice."""
    if kind == "cosine":
        return 1 - (x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt())
    mean = sum(y) / len(y)
    variance = sum((value - mean) ** 2 for value in y) / len(y)
    total = x.new_zeros(())
    for own, value in zip(x, y, strict=True):
        error = (own - (value - mean) / (variance + 1e-6) ** 0.5).abs()
        total = total + (error**2 / 2 if error < 1 else error - 0.5)
    return total / len(x)


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("patches", [None, 4])
def test_is_the_literal_distance_with_its_gradient(kind: FeatureLoss, patches: int | None) -> None:
    shape = (3, 7) if patches is None else (3, patches, 7)
    x, y = 2 * _features(*shape), 5 * _features(*shape, seed=1) + 3
    x.requires_grad_()
    rows = zip(x.reshape(-1, 7), y.reshape(-1, 7), strict=True)
    each = torch.stack([_literal(*row, kind) for row in rows])
    expected = each.view(3, -1).mean(1)
    found = feature_distances(x, y, kind=kind)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(d.sum(), x, retain_graph=True)[0] for d in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_the_scale_of_the_teacher_does_not_count(kind: FeatureLoss) -> None:
    x, y = _features(4, 64), 10 * _features(4, 64, seed=1)
    found = feature_distances(x, 7 * y, kind=kind)
    torch.testing.assert_close(found, feature_distances(x, y, kind=kind), rtol=1e-6, atol=0)


def test_low_precision_is_computed_in_float32() -> None:
    x, y = (_features(4, 6, seed=i).bfloat16() for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = feature_distances(x, y, kind="smooth_l1")
    assert found.dtype == torch.float32
    assert torch.equal(found, feature_distances(x.float(), y.float(), kind="smooth_l1"))


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_shapes_that_disagree_are_refused(kind: FeatureLoss) -> None:
    with pytest.raises(ValueError, match="need"):
        feature_distances(torch.zeros(2, 3), torch.zeros(2, 4), kind=kind)
