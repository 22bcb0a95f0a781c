import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses.koleo import koleo_loss


def _tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_recorded_example() -> None:
    loss, distance = koleo_loss(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]]))
    assert loss.item() == pytest.approx(0.3426208, abs=1e-6)
    nearest = (0.8**0.5 + 0.4**0.5 + 0.4**0.5) / 3  # |a - b|^2 = 2 - 2 cos
    assert distance.item() == pytest.approx(nearest, abs=1e-6)


def test_equals_the_definition_with_its_gradient() -> None:
    tokens = _tokens(2, 7, 5).requires_grad_()
    loss, distance = koleo_loss(tokens)
    distances = []
    for view in F.normalize(tokens, dim=-1):
        apart = torch.cdist(view, view) + torch.eye(len(view)) * 9
        distances.append(apart.min(1).values)
    expected = -sum(some.log().mean() for some in distances)
    # The authors' 1e-8 moves a distance by less than D times itself.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(distance, torch.stack(distances).detach().mean(), rtol=1e-6, atol=0)
    assert not distance.requires_grad
    (gradient,) = torch.autograd.grad(loss, tokens)
    (wanted,) = torch.autograd.grad(expected, tokens)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_views_do_not_see_each_other() -> None:
    one, other = _tokens(2, 6, 5)
    loss, _ = koleo_loss(torch.stack([one, other]))
    # The same picture in both views is the nearest of all, and no neighbour.
    alone = [koleo_loss(view[None])[0] for view in (one, other)]
    torch.testing.assert_close(loss, alone[0] + alone[1])
    twice, _ = koleo_loss(torch.stack([one, one]))
    torch.testing.assert_close(twice, 2 * alone[0])


def test_equal_and_opposite_images_give_finite_numbers() -> None:
    one = _tokens(1, 4, dtype=torch.float32)
    for pair in (torch.cat([one, one]), torch.cat([one, -one])):
        tokens = pair[None].requires_grad_()
        loss, distance = koleo_loss(tokens)
        (gradient,) = torch.autograd.grad(loss, tokens)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        expected = torch.linalg.vector_norm(F.normalize(pair, dim=-1).diff(dim=0))
        torch.testing.assert_close(distance, expected, rtol=1e-6, atol=1e-7)


def test_low_precision_is_computed_in_float32() -> None:
    tokens = _tokens(2, 6, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, distance = koleo_loss(tokens)
    assert loss.dtype == distance.dtype == torch.float32
    assert torch.equal(loss, koleo_loss(tokens.float())[0])


def test_an_image_alone_in_its_view_is_refused() -> None:
    with pytest.raises(ValueError, match="need at least 2 images in a view"):
        koleo_loss(_tokens(2, 1, 5))
