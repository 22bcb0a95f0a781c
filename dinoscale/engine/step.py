"""One optimizer step of DINO, top to bottom. Everything that changes a number is called here.

Shape letters: B images per micro-batch, n local crops, S = 2 + n student crops, K prototypes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dinoscale import distributed
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.losses.centering import entropy
from dinoscale.losses.dino import dino_loss_of_prototypes
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
    """What a step found; means are over its images on all ranks, in nats.

    Attributes:
        loss: mean cross-entropy.
        teacher_entropy: mean entropy of the targets.
        stop: whether any rank was asked to stop.
        skipped: why the step was not applied; None if it was.
        parts: loss and teacher entropy of this rank's micro-batches, (M, 2) float32.
    """

    loss: float
    teacher_entropy: float
    stop: bool
    skipped: str | None
    parts: Tensor

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
    stop_asked: bool = False,
) -> StepMetrics:
    """Run one optimizer step of self-distillation (Caron et al. 2021, algorithm 1).

    A step whose loss or gradient is not finite on any rank is skipped on all: weights, moments,
    teacher and center are as before it. `stop_asked` says that this rank wants to end; it rides on
    the reduction of the loss, so that all ranks learn of it at the same step.
    """
    student.set_hyperparameters(now)
    parts = []
    for index, batch in enumerate(micro_batches, start=1):
        targets = teacher.targets(batch.global_crops, temp=now.teacher_temp)  # (2, B, K)
        crops = [batch.global_crops.flatten(0, 1)]
        if batch.local_crops.shape[0]:
            crops.append(batch.local_crops.flatten(0, 1))
        objective = partial(
            dino_loss_of_prototypes, teacher_probs=targets, student_temp=student_temp
        )
        loss = student(crops, batch.keep, objective)  # all crops in one engine call
        student.backward(loss)
        parts.append(torch.stack((loss.detach(), entropy(targets))))
        if index < len(micro_batches):
            student.step()  # accumulates
    of_rank = torch.stack(parts)  # (M, 2)
    loss_mean, entropy_mean, stop = _agree(of_rank, stop_asked=stop_asked)
    skipped = None if math.isfinite(loss_mean + entropy_mean) else "the loss is not finite"
    if not student.step(apply=skipped is None):  # the weights move here
        skipped = skipped or "a gradient is not finite"
        teacher.skip()
    else:
        teacher.update(student, momentum=now.momentum)  # once per step, of the stepped student
    return StepMetrics(loss_mean, entropy_mean, stop, skipped, of_rank)


def _agree(parts: Tensor, *, stop_asked: bool) -> tuple[float, float, bool]:
    """Mean loss and entropy over micro-batches and ranks, and whether any rank wants to stop."""
    sums = torch.cat((parts.sum(0), parts.new_full((1,), float(stop_asked))))
    distributed.all_reduce_sum(sums)
    loss, teacher_entropy, votes = sums.tolist()
    count = len(parts) * distributed.world_size()
    return loss / count, teacher_entropy / count, votes > 0
