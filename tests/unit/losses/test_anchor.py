"""The anchor's distance against 1 - cosine."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses.anchor import anchor_distances


def _features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 7)])
def test_is_one_minus_the_cosine_with_its_gradient(shape: tuple[int, ...]) -> None:
    student, target = _features(*shape).requires_grad_(), _features(*shape, seed=1)
    expected = 1 - F.cosine_similarity(student, target, dim=-1)
    expected = expected if expected.ndim == 1 else expected.mean(1)
    found = anchor_distances(student, target)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_equal_features_have_no_distance_and_no_gradient_to_the_bit() -> None:
    student = _features(64, 9, 33, dtype=torch.float32).requires_grad_()
    distances = anchor_distances(student, student.detach().clone())
    (gradient,) = torch.autograd.grad(distances.sum(), student)
    assert not distances.any()
    assert not gradient.any()


def test_length_does_not_count_and_the_opposite_is_two_away() -> None:
    student = _features(4, 6)
    torch.testing.assert_close(anchor_distances(3 * student, student), torch.zeros(4).double())
    torch.testing.assert_close(anchor_distances(-student, student), torch.full((4,), 2.0).double())


def test_low_precision_is_computed_in_float32() -> None:
    student, target = (_features(4, 6, seed=i).bfloat16() for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = anchor_distances(student, target)
    assert found.dtype == torch.float32
    assert torch.equal(found, anchor_distances(student.float(), target.float()))


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3, 4), (2, 3)), ((3,), (3,))])
def test_shapes_that_disagree_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="need"):
        anchor_distances(*(torch.zeros(shape) for shape in shapes))
