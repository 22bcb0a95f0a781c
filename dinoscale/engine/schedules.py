"""Schedules as pure functions of the step, in float64.

`step` counts optimizer steps from 0; an epoch is `steps_per_epoch` of them. Nothing here holds
state, so a resumed run gets the values of the uninterrupted one.

Source: Caron et al. 2021 (arXiv:2104.14294), section 3.2 and appendix; off-by-one details (both
ends of a warm-up included, the final value never reached) are those of the authors' code.
"""

import math
from dataclasses import dataclass


def cosine(
    step: int,
    *,
    base: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    start: float = 0.0,
) -> float:
    """Linear warm-up from `start` to `base`, then half a cosine from `base` towards `final`.

    f(i) = start + i (base - start) / (w - 1)                       for i < w = warmup_steps
    f(i) = final + (base - final) (1 + cos(pi (i - w) / (n - w))) / 2   for w <= i < n = total_steps

    `base` is reached on the last warm-up step and again on the next one; `final` would be reached
    on step n, one after the last. A warm-up of a single step is `start`.

    Args:
        step: i, 0 <= i < total_steps.
        base: value at the end of the warm-up, in the unit of the result.
        final: value the cosine tends to.
        total_steps: n, steps of the whole run, warm-up included.
        warmup_steps: w, 0 <= w <= n.
        start: value on step 0 if there is a warm-up.

    Raises:
        ValueError: the step lies outside the run, or the warm-up is longer than it.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"need 0 <= step < total_steps, got {step}, {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"need 0 <= warmup_steps <= {total_steps}, got {warmup_steps}")
    if step < warmup_steps:
        return start + step * (base - start) / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


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


@dataclass(frozen=True)
class StepValues:
    """The scheduled numbers of one optimizer step."""

    step: int
    epoch: int
    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    prototypes_frozen: bool


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run; `at(step)` reads them.

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

    def at(self, step: int) -> StepValues:
        """Return the values of `step`.

        Raises:
            ValueError: the step lies outside the run.
        """
        epoch = step // self.steps_per_epoch
        n = self.total_steps
        warmup = self.warmup_teacher_temp_epochs
        time = epoch
        if self.teacher_temp_per_step:
            warmup, time = warmup * self.steps_per_epoch, step
        return StepValues(
            step=step,
            epoch=epoch,
            lr=cosine(
                step,
                base=self.peak_lr,
                final=self.min_lr,
                total_steps=n,
                warmup_steps=self.warmup_steps,
            ),
            weight_decay=cosine(
                step, base=self.weight_decay, final=self.weight_decay_end, total_steps=n
            ),
            momentum=cosine(step, base=self.momentum, final=self.momentum_end, total_steps=n),
            teacher_temp=teacher_temp(
                time,
                warmup_temp=self.warmup_teacher_temp,
                temp=self.teacher_temp,
                warmup=warmup,
            ),
            prototypes_frozen=epoch < self.freeze_last_layer_epochs,
        )
