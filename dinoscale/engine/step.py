"""One optimizer step of DINO, top to bottom. Everything that changes a number is called here.

Shape letters: B images per micro-batch, n local crops, S = 2 + n student crops, K prototypes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from dinoscale.engine.schedules import StepValues
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.losses.centering import entropy
from dinoscale.losses.dino import dino_loss_of_prototypes
from dinoscale.runtime import distributed


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


class StepMetrics:
    """What a step found; means are over its images on all ranks, in nats.

    The numbers are on their way from the device. The first look at one waits for them, and with
    them for the end of the step; until then the next step can be launched.
    """

    def __init__(self, sums: Tensor, verdict: Tensor, parts: Tensor) -> None:
        """Begin to copy.

        Args:
            sums: over micro-batches and ranks: loss, teacher entropy; then what `_told` holds.
            verdict: (3,) whether the step was skipped, entropy and maximum of the mean target.
            parts: loss and teacher entropy of this rank's micro-batches, (M, 2).
        """
        self._ranks = distributed.world_size()
        self._count = len(parts) * self._ranks
        found = torch.cat((sums[:5], verdict, sums[5:], parts.flatten()))
        self._arrived: torch.cuda.Event | None = None
        if found.is_cuda:
            self._found = torch.empty_like(found, device="cpu", pin_memory=True)
            self._found.copy_(found, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True, enable_timing=True)
            self._arrived.record()
        else:
            self._found = found

    def idle_s(self) -> float:
        """Seconds for which the device has had nothing to do since the step: 0 while it is at it.

        On a CPU infinity: what computes is what asks.
        """
        if self._arrived is None:
            return math.inf
        if not self._arrived.query():
            return 0.0
        now = torch.cuda.Event(enable_timing=True)
        now.record()  # nothing was launched in between
        now.synchronize()
        return float(self._arrived.elapsed_time(now)) / 1000

    @cached_property
    def _numbers(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._found.tolist()
        return numbers

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self._numbers[0] / self._count

    @property
    def teacher_entropy(self) -> float:
        """Mean entropy of the targets."""
        return self._numbers[1] / self._count

    @property
    def kl(self) -> float:
        """KL(teacher || student), mean over pairs: the cross-entropy less the teacher's entropy."""
        return self.loss - self.teacher_entropy

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return self._numbers[2] > 0

    @property
    def bad_images(self) -> int:
        """How many unreadable images all ranks have met since they last told each other."""
        return round(self._numbers[3])

    @property
    def saving(self) -> bool:
        """Whether any rank was writing or deleting a checkpoint when it began the step."""
        return self._numbers[4] > 0

    @property
    def skipped(self) -> str | None:
        """Why the step was not applied; None if it was."""
        if not self._numbers[5]:
            return None
        finite = math.isfinite(self.loss + self.teacher_entropy)
        return "a gradient is not finite" if finite else "the loss is not finite"

    @property
    def mean_target_entropy(self) -> float:
        """Entropy of the mean target of the last step that was applied."""
        return self._numbers[6]

    @property
    def max_prototype_prob(self) -> float:
        """Largest entry of that mean target, 0 to 1: the share of the strongest prototype."""
        return self._numbers[7]

    @property
    def waited_s(self) -> float:
        """What the rank that waited longest for its images had waited, in seconds."""
        return max(self._numbers[8 : 8 + self._ranks])

    @property
    def parts(self) -> list[tuple[float, float]]:
        """Loss and teacher entropy of each of this rank's micro-batches."""
        of_rank = self._numbers[8 + self._ranks :]
        return list(zip(of_rank[::2], of_rank[1::2], strict=True))


def train_step(
    micro_batches: Iterable[MicroBatch],
    student: Student,
    teacher: Teacher,
    now: StepValues,
    *,
    student_temp: float,
    stop_asked: bool = False,
    bad_images: int = 0,
    saving: bool = False,
    waited_s: float = 0.0,
) -> StepMetrics:
    """Run one optimizer step of self-distillation (Caron et al. 2021, algorithm 1).

    A step whose loss or gradient is not finite on any rank is skipped on all: weights, moments,
    teacher and center are as before it. The device decides that; the host launches the same work
    for every step and waits for nothing. Whether this rank wants to end, the unreadable images that
    it has met, whether it still saves and how long it waited for images ride on the reduction of
    the loss, so that all ranks learn of them at the same step and need no collective more.

    The next micro-batch is asked for when the forward of one has been launched, so that it is on
    its way while the device works, and when that one is no longer held: there is memory for one.
    """
    student.set_hyperparameters(now)
    parts = []
    ahead = iter(micro_batches)
    batch = next(ahead, None)
    while batch is not None:
        loss, of_targets = _forward(batch, student, teacher, now, student_temp=student_temp)
        del batch
        batch = next(ahead, None)
        student.backward(loss)
        parts.append(torch.stack((loss.detach(), of_targets)))
        if batch is not None:
            student.accumulate()
    of_rank = torch.stack(parts)  # (M, 2)
    told = _told(
        of_rank, stop_asked=stop_asked, bad_images=bad_images, saving=saving, waited_s=waited_s
    )
    sums = torch.cat((of_rank.sum(0), told))
    distributed.all_reduce_sum(sums)  # (5 + ranks,)
    skipped = student.step(spoilt=~sums.isfinite().all())  # the weights move here
    teacher.update(student, momentum=now.momentum, skipped=skipped)  # of the stepped student
    mean_target = teacher.mean_target
    verdict = torch.stack((skipped.float(), entropy(mean_target), mean_target.max()))
    return StepMetrics(sums, verdict, of_rank)


def _told(
    of_rank: Tensor, *, stop_asked: bool, bad_images: int, saving: bool, waited_s: float
) -> Tensor:
    """What a rank tells: to stop, bad images, a save, seconds in its own place; (3 + ranks,)."""
    told = of_rank.new_zeros(3 + distributed.world_size())
    told[0].fill_(float(stop_asked))  # of views, without a copy that the host would wait for
    told[1].fill_(float(bad_images))
    told[2].fill_(float(saving))
    told[3 + distributed.rank()].fill_(waited_s)
    return told


def _forward(
    batch: MicroBatch, student: Student, teacher: Teacher, now: StepValues, *, student_temp: float
) -> tuple[Tensor, Tensor]:
    """Loss of a micro-batch and entropy of its targets, scalars float32."""
    targets = teacher.targets(batch.global_crops, temp=now.teacher_temp)  # (2, B, K)
    crops = [batch.global_crops.flatten(0, 1)]
    if batch.local_crops.shape[0]:
        crops.append(batch.local_crops.flatten(0, 1))
    objective = partial(dino_loss_of_prototypes, teacher_probs=targets, student_temp=student_temp)
    loss = student(crops, batch.keep, objective)  # all crops in one engine call
    return loss, entropy(targets)
