"""One optimizer step of DINO, top to bottom. Everything that changes a number is called here.

Shape letters: B images per micro-batch, n local crops, S = 2 + n student crops, K prototypes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from dinoscale.data.augmentation.masks import Masks
from dinoscale.engine.schedules import StepValues
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.losses.centering import entropy
from dinoscale.losses.dino import dino_loss_of_prototypes
from dinoscale.runtime import distributed


@dataclass(frozen=True)
class MicroBatch:
    """The crops of one forward and backward pass on one rank.

    Attributes:
        global_crops: normalised images (2, B, C, H, W) float32.
        local_crops: normalised images (n, B, C, h, w) float32; n may be 0.
        keep: stochastic depth multipliers (depth, 2, S * B) float32, crop-major, or None.
        masks: patches of the global crops that the student does not see, or None.
    """

    global_crops: Tensor
    local_crops: Tensor
    keep: Tensor | None
    masks: Masks | None = None


class StepMetrics:
    """Results of a step; means are over its images on all ranks, in nats.

    They are copied from the device in the background. Reading the first one waits for the copy, and
    so for the end of the step; until then the next step can be launched.
    """

    def __init__(self, sums: Tensor, outcome: Tensor, parts: Tensor) -> None:
        """Start the copy.

        Args:
            sums: over micro-batches and ranks: loss, teacher entropy; then those of `_rank_status`.
            outcome: (3,) whether the step was skipped, entropy and maximum of the mean target.
            parts: loss and teacher entropy of this rank's micro-batches, (M, 2).
        """
        self._ranks = distributed.world_size()
        self._count = len(parts) * self._ranks
        results = torch.cat((sums[:5], outcome, sums[5:], parts.flatten()))
        self._copied: torch.cuda.Event | None = None
        if results.is_cuda:
            self._on_host = torch.empty_like(results, device="cpu", pin_memory=True)
            self._on_host.copy_(results, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True, enable_timing=True)
            self._copied.record()
        else:
            self._on_host = results

    def idle_s(self) -> float:
        """Seconds that the device has been idle since the end of the step; 0 while it still works.

        Infinity on a CPU, which is idle whenever it can ask.
        """
        if self._copied is None:
            return math.inf
        if not self._copied.query():
            return 0.0
        now = torch.cuda.Event(enable_timing=True)
        now.record()  # nothing was launched in between
        now.synchronize()
        return float(self._copied.elapsed_time(now)) / 1000

    @cached_property
    def _numbers(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[float] = self._on_host.tolist()
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
        """Unreadable images on all ranks since the ranks last exchanged them."""
        return round(self._numbers[3])

    @property
    def saving(self) -> bool:
        """Whether any rank was writing or deleting a checkpoint when it began the step."""
        return self._numbers[4] > 0

    @property
    def skipped(self) -> str | None:
        """Why the step was skipped; None if it was applied."""
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
        """Share of the strongest prototype in these targets, 0 to 1."""
        return self._numbers[7]

    @property
    def waited_s(self) -> float:
        """The longest time that any rank waited for its images, in seconds."""
        return max(self._numbers[8 : 8 + self._ranks])

    @property
    def parts(self) -> list[tuple[float, float]]:
        """Loss and teacher entropy of each of this rank's micro-batches."""
        flat = self._numbers[8 + self._ranks :]
        return list(zip(flat[::2], flat[1::2], strict=True))


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

    A step whose loss or gradient is not finite on any rank is skipped on all ranks: weights,
    moments, teacher and center keep their values. The device decides; the host launches the same
    work for every step and never waits. The all-reduce of the loss also carries this rank's status
    (a request to stop, unreadable images, a save in progress, its wait for images), so all ranks
    learn of it at the same step without another collective.

    The next micro-batch is fetched once the forward of the current one has been launched, so it is
    prepared while the device works, and once the current one is released: memory holds one.

    Args:
        micro_batches: of this step and rank; made one by one when this function asks for them.
        student: updated by the optimizer.
        teacher: gives the targets, then averages the student.
        now: scheduled values of the step.
        student_temp: temperature of the student, > 0, dimensionless.
        stop_asked: whether this rank was asked to stop.
        bad_images: unreadable images on this rank since the ranks last exchanged them.
        saving: whether this rank is writing or deleting a checkpoint.
        waited_s: seconds that this rank has waited for images since the last log line.
    """
    student.set_hyperparameters(now)
    losses = []
    remaining = iter(micro_batches)
    batch = next(remaining, None)
    while batch is not None:
        loss, teacher_entropy = _forward(batch, student, teacher, now, student_temp=student_temp)
        del batch
        batch = next(remaining, None)
        student.backward(loss)
        losses.append(torch.stack((loss.detach(), teacher_entropy)))
        if batch is not None:
            student.accumulate()
    parts = torch.stack(losses)  # (M, 2)
    status = _rank_status(
        parts, stop_asked=stop_asked, bad_images=bad_images, saving=saving, waited_s=waited_s
    )
    sums = torch.cat((parts.sum(0), status))
    distributed.all_reduce_sum(sums)  # (5 + ranks,)
    skipped = student.step(non_finite=~sums.isfinite().all())  # the weights move here
    teacher.update(student, momentum=now.momentum, skipped=skipped)  # averages the new weights
    mean_target = teacher.mean_target
    outcome = torch.stack((skipped.float(), entropy(mean_target), mean_target.max()))
    return StepMetrics(sums, outcome, parts)


def _rank_status(
    like: Tensor, *, stop_asked: bool, bad_images: int, saving: bool, waited_s: float
) -> Tensor:
    """Stop request, bad images, save in progress, a place for each rank's wait; (3 + ranks,)."""
    status = like.new_zeros(3 + distributed.world_size())
    status[0].fill_(float(stop_asked))  # fill_ needs no host copy that the host would wait for
    status[1].fill_(float(bad_images))
    status[2].fill_(float(saving))
    status[3 + distributed.rank()].fill_(waited_s)
    return status


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
