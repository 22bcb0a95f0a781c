"""Loss, its gradient and the center against consecutive calls of the reference's loss object."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dinoscale.engine.schedules import teacher_temp
from dinoscale.losses.centering import teacher_probs, updated_center
from dinoscale.losses.dino import dino_loss

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def _calls(tensors: dict[str, Tensor]) -> int:
    return sum(name.endswith(".loss") for name in tensors)


def test_loss_gradient_and_center_match_on_every_call(
    golden_tensors: Callable[[str], dict[str, Tensor]],
) -> None:
    tensors = golden_tensors("dino_loss")
    assert _calls(tensors) > 1
    center = tensors["center_initial"]
    for e in range(_calls(tensors)):
        teacher = torch.unflatten(tensors[f"step{e}.teacher_logits"], 0, (2, -1))  # (2, B, K)
        student = tensors[f"step{e}.student_logits"].view(-1, *teacher.shape[1:])
        student.requires_grad_()
        temp = teacher_temp(e, warmup_temp=0.04, temp=0.07, warmup=3)
        loss = dino_loss(student, teacher_probs(teacher, center, temp=temp), student_temp=0.1)
        (gradient,) = torch.autograd.grad(loss, student)
        center = updated_center(center, teacher.mean((0, 1))[None], momentum=0.9)
        assert_close(loss.detach(), tensors[f"step{e}.loss"][0])
        assert_close(gradient, tensors[f"step{e}.student_logits_grad"].view_as(student))
        assert_close(center, tensors[f"step{e}.center_after"])
