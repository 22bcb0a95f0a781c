"""Which phase of a run comes next.

Each is trained in processes of its own: a process that has ended one starts itself anew, since
DeepSpeed's engines hold their memory until it ends. Between two phases a run is therefore resumed
as after a crash.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from dinoscale.checkpoint.layout import checkpoints, phase_directories
from dinoscale.checkpoint.load import Checkpoint, newest_first
from dinoscale.config import RunConfig
from dinoscale.config.training import PhaseConfig
from dinoscale.errors import CheckpointError, ConfigError, UnreadableError
from dinoscale.runtime import distributed

log = logging.getLogger(__name__)


def require_own_directory(config: RunConfig, runs: Sequence[RunConfig]) -> None:
    """Refuse a run_dir with checkpoints that this run would pass over, and others would take.

    Args:
        config: of the run.
        runs: of its phases, from `phases_of`.

    Raises:
        ConfigError: a run of one part is there and this one has phases, or the other way round, or
            the folder of a phase that this run does not have.
    """
    run_dir = Path(config.run_dir)
    remedy = "choose another run_dir, or move that folder away"
    if config.phases and checkpoints(run_dir):
        raise ConfigError(
            f"run_dir: {run_dir}/checkpoints is of a run without phases, and this one has some; "
            f"{remedy}; train.continue_from goes on where another run stands"
        )
    own = {Path(run.run_dir).name for run in runs} if config.phases else set()
    for folder in phase_directories(run_dir):
        if folder.name not in own and checkpoints(folder):
            raise ConfigError(f"run_dir: {folder} is of a phase that this run has not; {remedy}")


def next_phase(config: RunConfig, runs: Sequence[RunConfig]) -> int:
    """Index of the first phase that is not finished, of the last if all are; collective.

    A phase before one that has a checkpoint is finished, whatever has been changed in it since. One
    that ended by the `train.stop_after_steps` of the whole run, not by its own, is not finished.

    Args:
        config: of the run.
        runs: of its phases, from `phases_of`.

    Raises:
        UnreadableError: on every rank, if checkpoints cannot be listed or read.
    """
    found = distributed.together(lambda: _next(config, runs) if distributed.rank() == 0 else None)
    return cast(int, distributed.broadcast_object(found))


def _next(config: RunConfig, runs: Sequence[RunConfig]) -> int:
    last = len(runs) - 1
    for index in range(last, -1, -1):
        if checkpoints(Path(runs[index].run_dir)):
            for phase, run in zip(config.phases[:index], runs, strict=False):
                if checkpoints(Path(run.run_dir)) and not _finished(phase, run):
                    log.warning(
                        "phase %s has not reached its end, but a later one has begun where it"
                        " stood: it is not taken up again",
                        phase.name,
                    )
            return min(index + 1, last) if _finished(config.phases[index], runs[index]) else index
    return 0


def _finished(phase: PhaseConfig, run: RunConfig) -> bool:
    """Whether the newest checkpoint of a phase is that of its last step."""
    try:
        state = Checkpoint(newest_first(Path(run.run_dir))[0]).state
        steps = run.train.epochs * state["plan"]["steps_per_epoch"]
    except UnreadableError:
        raise
    except (CheckpointError, KeyError, TypeError):
        return False  # the training finds an older one
    train = phase.change.get("train")
    stop = train.get("stop_after_steps") if isinstance(train, dict) else None
    return bool(state["step"] >= (steps if stop is None else min(steps, stop)))
