"""One optimizer step of DINO, top to bottom. Everything that changes a number is called here.

Shape letters: B images per micro-batch, n local crops, S = 2 + n student crops, K prototypes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinoscale import distributed
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import NonFiniteError
from dinoscale.losses.centering import entropy
from dinoscale.losses.dino import dino_loss
from dinoscale.schedules import StepValues


@dataclass(frozen=True)
class MicroBatch:
    """What one rank works on between two gradient accumulations.

    Attributes:
        global_crops: normalised images (2, B, C, H, W) float32.
        local_crops: normalised images (n, B, C, h, w) float32; n may be 0.
        keep: stochastic depth multipliers (depth, 2, S * B) float32, crop-major, or None.
    """

    global_crops: Tensor
    local_crops: Tensor
    keep: Tensor | None


@dataclass(frozen=True)
class StepMetrics:
    """Means over the images of one step on all ranks, in nats."""

    loss: float
    teacher_entropy: float

    @property
    def kl(self) -> float:
        """KL(teacher || student), mean over pairs: the cross-entropy less the teacher's entropy."""
        return self.loss - self.teacher_entropy


def train_step(
    micro_batches: Sequence[MicroBatch],
    student: Student,
    teacher: Teacher,
    now: StepValues,
    *,
    student_temp: float,
) -> StepMetrics:
    """Run one optimizer step of self-distillation (Caron et al. 2021, algorithm 1).

    Raises:
        NonFiniteError: on every rank; weights, teacher and center are as before the step.
    """
    student.set_hyperparameters(now)
    sums = torch.zeros(2, device=micro_batches[0].global_crops.device)
    for index, batch in enumerate(micro_batches, start=1):
        targets = teacher.targets(batch.global_crops, temp=now.teacher_temp)  # (2, B, K)
        crops = [batch.global_crops.flatten(0, 1)]
        if batch.local_crops.shape[0]:
            crops.append(batch.local_crops.flatten(0, 1))
        logits = student(crops, batch.keep)  # (S * B, K), all crops in one engine call
        logits = logits.unflatten(0, (-1, targets.shape[1]))  # (S, B, K)
        loss = dino_loss(logits, targets, student_temp=student_temp)
        student.backward(loss)
        sums += torch.stack((loss.detach(), entropy(targets)))
        if index == len(micro_batches):
            metrics = _mean_over_ranks(sums, count=len(micro_batches))
        student.step()  # accumulates; the weights move on the last micro-batch only
    teacher.update(student, momentum=now.momentum)  # once per step, of the stepped student
    return metrics


def _mean_over_ranks(sums: Tensor, *, count: int) -> StepMetrics:
    """Global means; every rank sees the same numbers, so all stop on a bad one, or none."""
    totals = distributed.all_reduce_sum(sums) / (count * distributed.world_size())
    loss, teacher_entropy = totals.tolist()
    metrics = StepMetrics(loss=loss, teacher_entropy=teacher_entropy)
    if not torch.isfinite(totals).all():
        raise NonFiniteError(
            f"the loss is {loss} (teacher entropy {teacher_entropy}); the step was not applied."
            " Try a lower optim.lr, a smaller optim.clip_grad, or engine.precision=fp32"
        )
    return metrics
