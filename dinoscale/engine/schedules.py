"""Schedules as pure functions of the step, in float64.

`step` counts optimizer steps from 0; an epoch is `steps_per_epoch` of them. Nothing here holds
state, so a resumed run gets the values of the uninterrupted one.

Source: Caron et al. 2021 (arXiv:2104.14294), section 3.2 and appendix; off-by-one details (both
ends of a warm-up included, the final value never reached) are those of the authors' code. `Curve`
is the form of Simeoni et al. 2025 (arXiv:2508.10104), with the off-by-one details of their code.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple


def cosine(
    step: int,
    *,
    base: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    start: float = 0.0,
    extra: float = 0.0,
) -> float:
    """Linear warm-up from `start` to `base`, then half a cosine from `base` towards `final`.

    f(i) = start + i (base - start) / (w - 1)                       for i < w = warmup_steps
    f(i) = final + (base - final) (1 + cos(pi (i - w) / (n - w))) / 2   for w <= i < n = total_steps

    `base` is reached on the last warm-up step and again on the next one; `final` would be reached
    on step n, one after the last. A warm-up of a single step is `start`.

    With `extra` the cosine is that of a longer run, cut at step n and stretched so that its last
    step has `final` (schedule_trunc_extra in the code of DINOv2 and DINOv3): with m = n - w steps,
    l = floor((1 + extra) m) and c(j) = (1 + cos(pi j / (l - 1))) / 2,

    f(w + j) = final + (base - final) (c(j) - c(m - 1)) / (1 - c(m - 1))

    Args:
        step: i, 0 <= i < total_steps.
        base: value at the end of the warm-up, in the unit of the result.
        final: value the cosine tends to.
        total_steps: n, steps of the whole run, warm-up included.
        warmup_steps: w, 0 <= w <= n.
        start: value on step 0 if there is a warm-up.
        extra: fraction by which the cosine is longer than what the run has of it, >= 0.

    Raises:
        ValueError: the step lies outside the run, or the warm-up is longer than it.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"need 0 <= step < total_steps, got {step}, {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"need 0 <= warmup_steps <= {total_steps}, got {warmup_steps}")
    if step < warmup_steps:
        return start + step * (base - start) / max(warmup_steps - 1, 1)
    if extra:
        shape = _truncated(step - warmup_steps, steps=total_steps - warmup_steps, extra=extra)
        return final + (base - final) * shape
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def _truncated(step: int, *, steps: int, extra: float) -> float:
    """From 1 to 0: the first `steps` of half a cosine longer by `extra`, stretched."""
    if steps == 1:
        return 0.0
    whole = int((1 + extra) * steps) - 1
    value, last = (0.5 * (1 + math.cos(math.pi * i / whole)) for i in (step, steps - 1))
    return (value - last) / (1 - last)


def teacher_temp(time: int, *, warmup_temp: float, temp: float, warmup: int) -> float:
    """Teacher temperature, linear over the first `warmup` epochs (DINO) or steps (DINOv2).

    Both ends are included: time 0 has `warmup_temp`, time `warmup - 1` already has `temp`.

    Args:
        time: zero-based epoch or step.
        warmup_temp: temperature at time 0 if there is a warm-up, dimensionless.
        temp: temperature after the warm-up.
        warmup: length of the warm-up in the unit of `time`, 0 for none.

    Raises:
        ValueError: time or warmup is negative.
    """
    if time < 0 or warmup < 0:
        raise ValueError(f"need time, warmup >= 0, got {time}, {warmup}")
    if time >= warmup:
        return temp
    return warmup_temp + time * (temp - warmup_temp) / max(warmup - 1, 1)


class Curve(NamedTuple):
    """Linear warm-up from `start` to `peak`, half a cosine to `end`, then constant.

    With w = warmup_steps and c = cosine_steps:

    f(i) = start + i (peak - start) / w                             for i < w
    f(w + j) = end + (peak - end) (1 + cos(pi j / (c - 1))) / 2     for j < c
    f(i) = end                                                      for i >= w + c

    So the warm-up ends one step before `peak`, and the cosine includes both ends; a cosine of a
    single step is `peak`.
    """

    start: float
    peak: float
    end: float
    warmup_steps: int = 0
    cosine_steps: int = 0

    def at(self, step: int) -> float:
        """Return the value of `step`, which is at least 0."""
        if step < self.warmup_steps:
            return self.start + step * (self.peak - self.start) / self.warmup_steps
        step -= self.warmup_steps
        if step >= self.cosine_steps:
            return self.end
        progress = step / max(self.cosine_steps - 1, 1)
        return self.end + 0.5 * (self.peak - self.end) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepValues:
    """The scheduled numbers of one optimizer step.

    `local_weight` multiplies the class tokens' loss between local and global crops, `gram_weight`
    the Gram loss, each beside its constant weight.
    """

    step: int
    epoch: int
    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    prototypes_frozen: bool
    local_weight: float = 1.0
    gram_weight: float = 1.0

    @property
    def gram_counts(self) -> bool:
        """Whether a Gram loss has a weight: without one its network rests and has no crops."""
        return self.gram_weight != 0

    def with_gram(self) -> "StepValues":
        """The same in a step in which a Gram loss has a weight."""
        return replace(self, gram_weight=self.gram_weight or 1.0)


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run; `at(step)` reads them.

    A curve replaces the formula of DINO and DINOv2, whose numbers are then not read; the weights
    have no other, and are 1 without. `cosine_extra` is the `extra` of the formulas' cosines.

    `peak_lr` is the rate at the end of the warm-up (already scaled by the batch), `min_lr` the one
    that the cosine tends to (never scaled); `teacher_temp_per_step` moves the temperature with
    every step instead of once an epoch; the others are those of the paper.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float
    weight_decay: float
    weight_decay_end: float
    momentum: float
    momentum_end: float
    warmup_teacher_temp: float
    teacher_temp: float
    warmup_teacher_temp_epochs: int
    teacher_temp_per_step: bool
    freeze_last_layer_epochs: int
    cosine_extra: float = 0.0
    lr_curve: Curve | None = None
    weight_decay_curve: Curve | None = None
    momentum_curve: Curve | None = None
    teacher_temp_curve: Curve | None = None
    local_weight: Curve | None = None
    gram_weight: Curve | None = None

    def at(self, step: int) -> StepValues:
        """Return the values of `step`.

        Raises:
            ValueError: the step lies outside the run.
        """
        if not 0 <= step < self.total_steps:
            raise ValueError(f"need 0 <= step < total_steps, got {step}, {self.total_steps}")
        epoch = step // self.steps_per_epoch
        return StepValues(
            step=step,
            epoch=epoch,
            lr=self._lr(step),
            weight_decay=self._cosine(
                step, self.weight_decay_curve, self.weight_decay, self.weight_decay_end
            ),
            momentum=self._cosine(step, self.momentum_curve, self.momentum, self.momentum_end),
            teacher_temp=self._teacher_temp(step, epoch),
            prototypes_frozen=epoch < self.freeze_last_layer_epochs,
            local_weight=1.0 if self.local_weight is None else self.local_weight.at(step),
            gram_weight=1.0 if self.gram_weight is None else self.gram_weight.at(step),
        )

    def _lr(self, step: int) -> float:
        if self.lr_curve is not None:
            return self.lr_curve.at(step)
        return cosine(
            step,
            base=self.peak_lr,
            final=self.min_lr,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            extra=self.cosine_extra,
        )

    def _cosine(self, step: int, curve: Curve | None, base: float, final: float) -> float:
        """The curve, or without one a cosine over the whole run."""
        if curve is not None:
            return curve.at(step)
        n, extra = self.total_steps, self.cosine_extra
        return cosine(step, base=base, final=final, total_steps=n, extra=extra)

    def _teacher_temp(self, step: int, epoch: int) -> float:
        if self.teacher_temp_curve is not None:
            return self.teacher_temp_curve.at(step)
        time, warmup = epoch, self.warmup_teacher_temp_epochs
        if self.teacher_temp_per_step:
            time, warmup = step, warmup * self.steps_per_epoch
        return teacher_temp(
            time, warmup_temp=self.warmup_teacher_temp, temp=self.teacher_temp, warmup=warmup
        )
