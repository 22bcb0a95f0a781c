"""One optimizer step of DINO, top to bottom. Everything that changes a number is called here.

Shape letters: B images per micro-batch, n local crops, S = 2 + n student crops, K prototypes.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from dinoscale.engine.micro_batch import LossWeights, MicroBatch, MicroBatchLoss
from dinoscale.engine.schedules import StepValues
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.losses.centering import entropy
from dinoscale.runtime import distributed


class StepMetrics:
    """Results of a step; means are over its images on all ranks, in nats.

    They are copied from the device in the background. Reading the first one waits for the copy, and
    so for the end of the step; until then the next step can be launched.
    """

    def __init__(self, sums: Tensor, outcome: Tensor, parts: Tensor, names: Sequence[str]) -> None:
        """Start the copy.

        Args:
            sums: of the columns of `parts` over micro-batches and ranks, then of `_rank_status`.
            outcome: whether the step was skipped; entropy and maximum of the mean target, of class
                tokens and, if there are any, of patches; (3,) or (5,).
            parts: numbers of this rank's micro-batches, (M, 2 + T): loss, teacher entropy, terms.
            names: of the T terms.
        """
        self._count = len(parts) * distributed.world_size()
        self._names = tuple(names)
        self._width = parts.shape[1]
        self._sizes = (self._width, len(sums) - self._width, len(outcome), parts.numel())
        results = torch.cat((sums, outcome, parts.flatten()))
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
    def _numbers(self) -> tuple[list[float], ...]:
        """Sums of the columns, of the status, the outcome, and the parts."""
        if self._copied is not None:
            self._copied.synchronize()
        return tuple(section.tolist() for section in self._on_host.split(self._sizes))

    def _means(self) -> list[float]:
        return [number / self._count for number in self._numbers[0]]

    @property
    def _status(self) -> list[float]:
        """Sums of `_rank_status`."""
        return self._numbers[1]

    @property
    def _outcome(self) -> list[float]:
        return self._numbers[2]

    @property
    def loss(self) -> float:
        """Mean loss; with DINO alone and weights of 1, the mean cross-entropy."""
        return self._means()[0]

    @property
    def teacher_entropy(self) -> float:
        """Mean entropy of the class targets."""
        return self._means()[1]

    @property
    def terms(self) -> dict[str, float]:
        """Means of the terms by name, see `MicroBatchLoss.terms`; empty with DINO alone."""
        return dict(zip(self._names, self._means()[2:], strict=True))

    @property
    def kl(self) -> float:
        """KL(teacher || student) of class tokens, mean over pairs: cross-entropy less entropy."""
        return self.terms.get("dino_loss", self.loss) - self.teacher_entropy

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return self._status[0] > 0

    @property
    def bad_images(self) -> int:
        """Unreadable images on all ranks since the ranks last exchanged them."""
        return round(self._status[1])

    @property
    def saving(self) -> bool:
        """Whether any rank was writing or deleting a checkpoint when it began the step."""
        return self._status[2] > 0

    @property
    def waited_s(self) -> float:
        """The longest time that any rank waited for its images, in seconds."""
        return max(self._status[3:])

    @property
    def skipped(self) -> str | None:
        """Why the step was skipped; None if it was applied."""
        if not self._outcome[0]:
            return None
        finite = math.isfinite(sum(self._means()))
        return "a gradient is not finite" if finite else "the loss is not finite"

    @property
    def mean_target_entropy(self) -> float:
        """Entropy of the mean class target of the last step that was applied."""
        return self._outcome[1]

    @property
    def max_prototype_prob(self) -> float:
        """Share of the strongest prototype in these targets, 0 to 1."""
        return self._outcome[2]

    @property
    def mean_patch_target_entropy(self) -> float:
        """Entropy of the mean patch target of the last step that was applied."""
        return self._outcome[3]

    @property
    def max_patch_prototype_prob(self) -> float:
        """Share of the strongest prototype in the patch targets, 0 to 1."""
        return self._outcome[4]

    @property
    def parts(self) -> list[dict[str, float]]:
        """Of each of this rank's micro-batches: loss, teacher entropy and terms, by name."""
        flat = self._numbers[3]
        rows = (flat[i : i + self._width] for i in range(0, len(flat), self._width))
        names = ("loss", "teacher_entropy", *self._names)
        return [dict(zip(names, row, strict=True)) for row in rows]


def train_step(
    micro_batches: Iterable[MicroBatch],
    student: Student,
    teacher: Teacher,
    now: StepValues,
    *,
    loss_weights: LossWeights,
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
        micro_batches: of this step and rank; made one by one when this function asks for them,
            twice with Sinkhorn-Knopp.
        student: updated by the optimizer.
        teacher: gives the targets, then averages the student.
        now: scheduled values of the step.
        loss_weights: of the objectives.
        stop_asked: whether this rank was asked to stop.
        bad_images: unreadable images on this rank since the ranks last exchanged them.
        saving: whether this rank is writing or deleting a checkpoint.
        waited_s: seconds that this rank has waited for images since the last log line.
    """
    student.set_hyperparameters(now)
    teacher.begin(micro_batches, temp=now.teacher_temp)
    losses = []
    remaining = iter(micro_batches)
    batch = next(remaining, None)
    while batch is not None:
        loss, numbers = _forward(batch, student, teacher, now, loss_weights)
        del batch
        batch = next(remaining, None)
        student.backward(loss)
        losses.append(numbers)
        if batch is not None:
            student.accumulate()
    parts = torch.stack(losses)  # (M, 2 + T)
    status = _rank_status(
        parts, stop_asked=stop_asked, bad_images=bad_images, saving=saving, waited_s=waited_s
    )
    sums = torch.cat((parts.sum(0), status))
    distributed.all_reduce_sum(sums)  # (5 + T + ranks,)
    skipped = student.step(non_finite=~sums.isfinite().all())  # the weights move here
    # averages the new weights
    teacher.update(student, step=now.step, momentum=now.momentum, skipped=skipped)
    outcome = [skipped.float()]
    for mean_target in (teacher.mean_target, teacher.mean_patch_target):
        if mean_target is not None:
            outcome += [entropy(mean_target), mean_target.max()]
    return StepMetrics(sums, torch.stack(outcome), parts, loss_weights.terms)


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
    batch: MicroBatch, student: Student, teacher: Teacher, now: StepValues, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Loss of a micro-batch; and (2 + T,): loss, entropy of the class targets, terms."""
    targets = teacher.targets(batch, temp=now.teacher_temp, gram_counts=now.gram_counts)
    objective = MicroBatchLoss(
        targets,
        weights,
        masks=batch.masks,
        local_weight=now.local_weight,
        gram_weight=now.gram_weight,
    )
    crops = [batch.global_crops.flatten(0, 1)]
    if batch.local_crops.shape[0]:
        crops.append(batch.local_crops.flatten(0, 1))
    # all crops in one engine call
    loss = student(crops, batch.keep, objective, batch.masks, batch.coordinates)
    teacher.count_patch_targets(objective.patch_target_sum)
    terms = [objective.terms[name] for name in weights.terms]
    return loss, torch.stack((loss.detach(), entropy(targets.class_probs), *terms))
