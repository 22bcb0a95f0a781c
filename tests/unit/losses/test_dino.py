import pytest
import torch
from torch import Tensor

from dinoscale.losses.dino import dino_loss


def _pair_by_pair(student: Tensor, teacher: Tensor, temp: float) -> Tensor:
    """Equation 3 of the paper as written, divided by the number of pairs."""
    terms = [
        -(teacher[t] * torch.log_softmax(student[s] / temp, -1)).sum(-1).mean()
        for t in range(len(teacher))
        for s in range(len(student))
        if s != t
    ]
    return torch.stack(terms).mean()


def _views(
    students: int, teachers: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(students, 5, 11, generator=generator, dtype=dtype)
    teacher = torch.randn(teachers, 5, 11, generator=generator, dtype=dtype).softmax(-1)
    return student.requires_grad_(), teacher


def test_recorded_example() -> None:
    teacher = torch.tensor([[[0.2, -0.1, 0.4], [0, 0.3, -0.2]], [[0.1, 0.1, 0.5], [-0.3, 0.6, 0]]])
    student = torch.tensor(
        [
            [[0.1, 0, 0.3], [0.2, 0.1, -0.1]],
            [[0, 0.2, 0.4], [-0.2, 0.5, 0.1]],
            [[0.3, -0.3, 0.2], [0.1, 0.4, -0.4]],
        ]
    ).requires_grad_()
    center = torch.tensor([0.05, -0.05, 0.1])
    loss = dino_loss(student, ((teacher - center) / 0.04).softmax(-1), student_temp=0.1)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0.5618528, abs=1e-6)
    expected = torch.tensor([0.1425463, 0.0501045, -0.1926509])
    torch.testing.assert_close(gradient[0, 0], expected, rtol=1e-5, atol=1e-6)
    assert gradient.norm().item() == pytest.approx(2.8670352, rel=1e-6)


@pytest.mark.parametrize(("students", "teachers"), [(2, 2), (5, 2), (10, 2), (4, 3), (3, 3)])
def test_equals_the_sum_over_pairs_with_its_gradient(students: int, teachers: int) -> None:
    student, teacher = _views(students, teachers)
    loss = dino_loss(student, teacher, student_temp=0.1)
    expected = _pair_by_pair(student, teacher, 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (ours,) = torch.autograd.grad(loss, student)
    (theirs,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_loss_of_a_matching_student_is_the_entropy() -> None:
    logits = torch.randn(1, 5, 11, generator=torch.Generator().manual_seed(1)).double()
    student = logits.expand(4, -1, -1)
    teacher = (logits / 0.1).softmax(-1).expand(2, -1, -1)
    entropy = torch.special.entr(teacher).sum(-1).mean()
    torch.testing.assert_close(dino_loss(student, teacher, student_temp=0.1), entropy)


def test_a_second_backward_gives_the_same_gradient() -> None:
    student, teacher = _views(4, 2)
    loss = dino_loss(student, teacher, student_temp=0.1)
    (first,) = torch.autograd.grad(2 * loss, student, retain_graph=True)
    (again,) = torch.autograd.grad(2 * loss, student)
    assert torch.equal(first, again)


def test_low_precision_logits_are_computed_in_float32() -> None:
    student, teacher = _views(4, 2, torch.float32)
    loss = dino_loss(student.bfloat16(), teacher, student_temp=0.1)
    assert loss.dtype == torch.float32
    exact = _pair_by_pair(student.bfloat16().float(), teacher, 0.1)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((4, 5, 11), (1, 5, 11)),
        ((2, 5, 11), (3, 5, 11)),
        ((4, 5, 11), (2, 6, 11)),
        ((4, 5), (2, 5)),
    ],
)
def test_views_that_do_not_pair_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="need \\(S,B,K\\)"):
        dino_loss(torch.zeros(student), torch.zeros(teacher), student_temp=0.1)
