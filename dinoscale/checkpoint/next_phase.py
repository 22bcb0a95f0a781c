"""Which phase of a run comes next, by the checkpoints in the folders of all.

Phases form a tree: each begins at the end of an earlier one, and several may begin at the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoscale.checkpoint.layout import checkpoints
from dinoscale.checkpoint.load import Checkpoint, newest_first
from dinoscale.config import RunConfig
from dinoscale.config.sections.training import PhaseConfig
from dinoscale.errors import CheckpointError, UnreadableError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NextPhase:
    """The first phase that is not finished, the last if all are.

    Attributes:
        index: of the phase.
        begins: whether it has no checkpoint.
    """

    index: int
    begins: bool


def phase_before(config: RunConfig, index: int) -> int | None:
    """Index of the phase at whose end a phase begins; None for the first."""
    after = config.phases[index].after
    if after is None:
        return index - 1 if index else None
    return [phase.name for phase in config.phases].index(after)


def find_next_phase(config: RunConfig, runs: Sequence[RunConfig]) -> NextPhase:
    """The first phase that is not finished; those at whose end it begins come before it.

    A phase is not taken up again either where all that begin at its end have begun, whatever has
    been changed in it since, or where one has and its own checkpoints are gone. One that ended by
    the `train.stop_after_steps` of the whole run, not by its own, is not finished.

    Args:
        config: of the run.
        runs: of its phases, from `phases_of`.

    Raises:
        UnreadableError: checkpoints cannot be listed or read.
    """
    begun = [bool(checkpoints(Path(run.run_dir))) for run in runs]
    before = [phase_before(config, index) for index in range(len(runs))]
    passed = list(begun)  # has begun, or one that begins there has
    for index in reversed(range(len(runs))):
        if passed[index] and (parent := before[index]) is not None:
            passed[parent] = True
    for index, (phase, run) in enumerate(zip(config.phases, runs, strict=True)):
        if not passed[index]:
            return NextPhase(index, begins=True)
        if not begun[index] or _finished(phase, run):
            continue
        following = [later for later, parent in enumerate(before) if parent == index]
        later = [config.phases[other].name for other in following if passed[other]]
        left_alone = bool(following) and len(later) == len(following)
        if later:
            log.warning(
                "phase %s has not reached its end, but %s began where it stood: it is %s",
                *(phase.name, " and ".join(later)),
                "not taken up again" if left_alone else "taken up again",
            )
        if not left_alone:
            return NextPhase(index, begins=False)
    return NextPhase(len(runs) - 1, begins=False)


def _finished(phase: PhaseConfig, run: RunConfig) -> bool:
    """Whether the newest checkpoint of a phase is of its last step, and the guard passes it."""
    try:
        checkpoint = Checkpoint(newest_first(Path(run.run_dir))[0])
        state, known = checkpoint.state, checkpoint.progress.guarded
        steps = run.train.epochs * state["plan"]["steps_per_epoch"]
    except UnreadableError:
        raise
    except (CheckpointError, KeyError, TypeError):
        return False  # the training finds an older one
    rule = run.guard
    if rule.ends_runs and known is not None and not known.passes(state["step"], rule.measure):
        return False  # the training measures what is missing, and judges again
    return bool(state["step"] >= end_of_phase(phase, steps))


def end_of_phase(phase: PhaseConfig, total_steps: int) -> int:
    """Steps after which a phase is finished: all, or its own `train.stop_after_steps`."""
    train = phase.change.get("train")
    stop: int | None = train.get("stop_after_steps") if isinstance(train, dict) else None
    return total_steps if stop is None else min(total_steps, stop)
