import math

import pytest
import torch

from dinoscale.losses.centering import entropy, teacher_probs, updated_center


def test_recorded_example() -> None:
    logits = torch.tensor([[[0.2, -0.1, 0.4], [0, 0.3, -0.2]], [[0.1, 0.1, 0.5], [-0.3, 0.6, 0]]])
    center = torch.tensor([0.05, -0.05, 0.1])
    probs = teacher_probs(logits, center, temp=0.04)
    expected = torch.tensor([0.0229738, 0.000154796, 0.9768714])
    torch.testing.assert_close(probs[0, 0], expected, rtol=1e-5, atol=1e-7)
    moved = updated_center(center, logits.mean((0, 1)), momentum=0.9)
    torch.testing.assert_close(moved, torch.tensor([0.045, -0.0225, 0.1075]))


def test_targets_are_float32_distributions_without_gradient() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    probs = teacher_probs(logits.bfloat16().requires_grad_(), torch.zeros(1, 7), temp=0.04)
    assert probs.dtype == torch.float32
    assert not probs.requires_grad
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3))
    assert teacher_probs(logits.double(), torch.zeros(7), temp=0.04).dtype == torch.float64


def test_a_large_center_entry_suppresses_its_prototype() -> None:
    center = torch.tensor([1.0, 0, 0])
    assert teacher_probs(torch.zeros(2, 1, 3), center, temp=0.1)[..., 0].max() < 1e-4


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="need temp > 0, got 0"):
        teacher_probs(torch.zeros(2, 1, 3), torch.zeros(3), temp=0)


def test_center_and_mean_must_have_one_shape() -> None:
    with pytest.raises(ValueError, match="need equal shapes"):
        updated_center(torch.zeros(1, 3), torch.zeros(3), momentum=0.9)


def test_entropy_is_zero_for_one_winner_and_log_k_for_uniform() -> None:
    assert entropy(torch.eye(5)).item() == 0
    assert entropy(torch.full((2, 3, 5), 0.2)).item() == pytest.approx(math.log(5), rel=1e-6)
    half = torch.stack((torch.eye(5)[0], torch.full((5,), 0.2)))
    assert entropy(half).item() == pytest.approx(math.log(5) / 2, rel=1e-6)
