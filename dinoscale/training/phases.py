"""Which phase of a run comes next.

Each is trained in processes of its own: a process that has ended one starts itself anew, since
DeepSpeed's engines hold their memory until it ends. Between two phases a run is therefore resumed
as after a crash.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from dinoscale.checkpoint.layout import checkpoints, phase_directories
from dinoscale.checkpoint.next_phase import NextPhase, find_next_phase
from dinoscale.config import RunConfig
from dinoscale.errors import ConfigError
from dinoscale.runtime import distributed


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
    if config.phases and not config.resume and any(checkpoints(Path(run.run_dir)) for run in runs):
        raise ConfigError(
            f"run_dir: {run_dir} already holds a run and resume is false; choose another run_dir,"
            " or delete that one"
        )
    own = {Path(run.run_dir).name for run in runs} if config.phases else set()
    for folder in phase_directories(run_dir):
        if folder.name not in own and checkpoints(folder):
            raise ConfigError(f"run_dir: {folder} is of a phase that this run has not; {remedy}")


def require_gram_teachers(config: RunConfig, runs: Sequence[RunConfig]) -> None:
    """Refuse weights for a Gram network that are not there, also those of a phase to come.

    A phase that has begun has them in its checkpoints, and an earlier phase of the run will write
    those in its folder.

    Args:
        config: of the run.
        runs: of its phases, from `phases_of`.

    Raises:
        ConfigError: some are missing.
    """
    for index, run in enumerate(runs):
        teacher = run.gram.teacher if run.gram.loss_weight else None
        if teacher is None or checkpoints(Path(run.run_dir)):
            continue
        if any(run.gram.teacher_lies_in(other.run_dir) for other in runs[:index]):
            continue
        try:
            os.stat(teacher)
        except (OSError, ValueError) as error:
            of_phase = f"phases.{config.phases[index].name}." if config.phases else ""
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"{of_phase}gram.teacher: {teacher}: {reason}; give weights that are there when the"
                " run starts, or those of an earlier phase, {run_dir}/phases/NN_NAME"
            ) from error


def next_phase(config: RunConfig, runs: Sequence[RunConfig]) -> NextPhase:
    """The phase to be trained next, as `find_next_phase` says; collective.

    Args:
        config: of the run.
        runs: of its phases, from `phases_of`.

    Raises:
        UnreadableError: on every rank, if checkpoints cannot be listed or read.
    """
    is_first = distributed.rank() == 0
    found = distributed.together(lambda: find_next_phase(config, runs) if is_first else None)
    return cast(NextPhase, distributed.broadcast_object(found))
