"""The Gram loss against its definition: whole matrices, plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses import gram
from dinoscale.losses.gram import Negatives, gram_loss
from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes

NEGATIVES: list[Negatives] = ["kept", "removed", "removed_from_target"]


def _features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _by_definition(
    student: Tensor, target: Tensor, *, per_crop: bool, negatives: Negatives
) -> Tensor:
    x, y = (F.normalize(features, dim=-1) for features in (student, target))
    if not per_crop:
        x, y = x.flatten(0, 1)[None], y.flatten(0, 1)[None]
    here, there = x @ x.mT, y @ y.mT
    if negatives != "kept":
        there = there.clamp(min=0)
    if negatives == "removed":
        here = here.relu()
    return (here - there).square().mean()


def test_recorded_example() -> None:
    student, target = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]
    loss = gram_loss(torch.tensor([student]), torch.tensor([target]))
    assert loss.item() == pytest.approx(0.4444444, abs=1e-7)


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("per_crop", [False, True])
@pytest.mark.parametrize("chunk", [1, 3 * 9, 2 * 81, 2**22])  # rows, crops, all at once
def test_equals_the_definition_with_its_gradient(
    monkeypatch: pytest.MonkeyPatch, *, negatives: Negatives, per_crop: bool, chunk: int
) -> None:
    monkeypatch.setattr(gram, "CHUNK", chunk)
    student, target = _features(5, 9, 4).requires_grad_(), _features(5, 9, 4, seed=1)
    loss = gram_loss(student, target, per_crop=per_crop, negatives=negatives)
    expected = _by_definition(student, target, per_crop=per_crop, negatives=negatives)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    (wanted,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-13)
    (again,) = torch.autograd.grad(3 * loss, student)  # a second backward
    assert torch.equal(again, gradient)


def test_patches_that_are_not_chosen_have_no_part() -> None:
    student, target = _features(3, 4, 6).requires_grad_(), _features(3, 4, 6, seed=1)
    chosen = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    loss = gram_loss(student, target, per_crop=False, chosen=chosen)
    x, y = (features[chosen][:, None] for features in (student, target))
    expected = _by_definition(x, y, per_crop=False, negatives="kept")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert not gradient[~chosen].any()
    assert gradient[chosen].any()
    assert gram_loss(student, target, per_crop=False, chosen=torch.zeros_like(chosen)) == 0


def test_low_precision_is_computed_in_float32() -> None:
    student, target = (_features(2, 4, 5, seed=i).bfloat16() for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = gram_loss(student, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, gram_loss(student.float(), target.float()))


@pytest.mark.parametrize("per_crop", [False, True])
def test_memory_is_that_of_the_features_and_a_chunk(*, per_crop: bool) -> None:
    patches, width = 1024, 16  # 16 matrices of 4 MB, or one of 1 GB
    student, target = (_features(16, patches, width, dtype=torch.float32) for _ in range(2))
    student.requires_grad_()
    before = live_bytes()
    _, peak = with_peak_bytes(lambda: gram_loss(student, target, per_crop=per_crop).backward())
    of_features = 8 * student.nbytes  # unit vectors, gradients, and what autograd saves
    assert peak - before < 3 * 4 * gram.CHUNK + of_features


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (((2, 4, 3), (2, 5, 3)), {}),
        (((2, 4, 3), (2, 4, 6)), {}),
        (((2, 4, 3), (2, 4, 3)), {"chosen": torch.ones(2, 4, dtype=torch.bool)}),
    ],
)
def test_shapes_that_disagree_are_refused(
    shapes: tuple[tuple[int, ...], ...], named: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match="need"):
        gram_loss(*(_features(*shape) for shape in shapes), **named)
