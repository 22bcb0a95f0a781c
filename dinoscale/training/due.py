"""What is due after a step; a function of the number of steps."""

from typing import NamedTuple

from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan


class Due(NamedTuple):
    """What is due after a step; each item needs the step's result and weights."""

    log: bool
    knn: bool
    guard: bool
    save: bool


def due_after(done: int, config: RunConfig, plan: RunPlan) -> Due:
    """What is due after `done` steps, skipped ones included."""
    is_last = done >= plan.stop_step  # beyond it after a run has been shortened
    epoch, remainder = divmod(done, plan.steps_per_epoch)
    ends_epoch = remainder == 0
    guard_every = config.guard.every_steps
    guard = guard_every is not None and (is_last or done % guard_every == 0)
    return Due(
        log=is_last or done % config.log.every_steps == 0,
        knn=is_last or guard or (ends_epoch and epoch % config.eval.every_epochs == 0),
        guard=guard,
        save=is_last or saves_amid(done, config, plan.steps_per_epoch),
    )


def saves_amid(done: int, config: RunConfig, steps_per_epoch: int) -> bool:
    """Whether a checkpoint is written after `done` steps, though more of them follow."""
    epoch, remainder = divmod(done, steps_per_epoch)
    every = (config.checkpoint.every_steps, config.guard.every_steps)
    return (remainder == 0 and epoch % config.checkpoint.every_epochs == 0) or any(
        steps is not None and done % steps == 0 for steps in every
    )
