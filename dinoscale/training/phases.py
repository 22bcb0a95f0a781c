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

from dinoscale.checkpoint.layout import (
    checkpoints,
    directory,
    named_step,
    not_resumed,
    phase_directories,
)
from dinoscale.checkpoint.next_phase import NextPhase, end_of_phase, find_next_phase
from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.config.sections.training import PhaseConfig
from dinoscale.config.teachers import NamedTeacher, named_teachers
from dinoscale.errors import ConfigError, DinoscaleError
from dinoscale.runtime import distributed
from dinoscale.training.due import saves_amid
from dinoscale.training.targets.folder import require_settings


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
        raise ConfigError(f"run_dir: {not_resumed(run_dir)}")
    own = {Path(run.run_dir).name for run in runs} if config.phases else set()
    for folder in phase_directories(run_dir):
        if folder.name not in own and checkpoints(folder):
            raise ConfigError(f"run_dir: {folder} is of a phase that this run has not; {remedy}")


def require_teachers(config: RunConfig, runs: Sequence[RunConfig]) -> None:
    """Refuse weights of teachers that are not there, and stored targets that cannot be a phase's.

    So a mistake in the last phase does not wait for it. Whether targets are of the run's images and
    of enough steps is asked when their phase starts.

    A phase that has begun is not looked at: it has a Gram network in its checkpoints, and reads a
    frozen teacher when it goes on. Weights in the folder of an earlier phase may be missing if that
    phase will write them; no phase writes targets.

    Args:
        config: of the run.
        runs: of its phases, from `phases_of`.

    Raises:
        ConfigError: weights are missing, and no phase will write them; or targets are of other
            settings.
        DataError: targets are missing, unfinished or damaged.
        UnavailableError: they cannot be read now.
    """
    for index, run in enumerate(runs):
        if checkpoints(Path(run.run_dir)):
            continue
        key = f"phases.{config.phases[index].name}." if config.phases else ""
        for teacher in named_teachers(run):
            _require_teacher(f"{key}{teacher.key}", teacher, config, runs[:index])
        if run.distill.targets is not None:
            _require_targets(key, run)


def _require_teacher(
    key: str, teacher: NamedTeacher, config: RunConfig, earlier: Sequence[RunConfig]
) -> None:
    if (reason := _why_missing(teacher.path)) is None:
        return
    places = [number for number, run in enumerate(earlier) if teacher.lies_in(run.run_dir)]
    if not places:
        raise ConfigError(
            f"{key}: {teacher.path}: {reason}; give weights that are there when the run starts, or "
            "those of an earlier phase, {run_dir}/phases/NN_NAME"
        )
    _require_to_be_written(key, teacher, config.phases[places[0]], earlier[places[0]])


def _require_targets(phase: str, run: RunConfig) -> None:
    try:
        require_settings(run)
    except DinoscaleError as error:
        raise type(error)(f"{phase}{error}") from None


def _why_missing(path: str) -> str | None:
    try:
        os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # no name of a file
        return str(error)
    return None


def _require_to_be_written(
    key: str, teacher: NamedTeacher, phase: PhaseConfig, run: RunConfig
) -> None:
    """Refuse a path in the folder of an earlier phase at which that one will write nothing.

    How many steps an epoch has is known here only if the configuration says so; else
    `require_kept_steps` looks again when that phase starts.
    """
    if os.path.abspath(teacher.path) == os.path.abspath(run.run_dir):
        return  # its newest checkpoint
    step, folder = teacher.step_in(run.run_dir), Path(run.run_dir)
    if step is None:
        raise ConfigError(
            f"{key}: {teacher.path} is nothing that phase {phase.name} writes; give {folder} for "
            f"its last checkpoint, or a step in eight digits, such as {directory(folder, 200)}"
        )
    if any(path for path in checkpoints(folder) if (named_step(path) or 0) > step):
        raise ConfigError(
            f"{key}: {teacher.path} is gone, and phase {phase.name} is past that step; give one "
            "that `dinoscale checkpoint list` shows"
        )
    steps_per_epoch = _known_steps_per_epoch(run)
    if steps_per_epoch is not None:
        end = end_of_phase(phase, run.train.epochs * steps_per_epoch)
        _require_saved(f"{key}: {teacher.path}", step, run, steps_per_epoch, end=end)


def _known_steps_per_epoch(run: RunConfig) -> int | None:
    """Steps of an epoch if they do not depend on the number of images."""
    if run.train.steps_per_epoch is not None or run.data.images_per_epoch is None:
        return run.train.steps_per_epoch
    return run.data.images_per_epoch // run.train.batch_size or None


def require_kept_steps(config: RunConfig, plan: RunPlan) -> None:
    """Refuse a `checkpoint.keep_steps` of which the run will write no checkpoint, and has none.

    Args:
        config: of a run of one part, or of a phase, with the steps that later ones name.
        plan: of it.

    Raises:
        ConfigError: there is one.
    """
    for step in config.checkpoint.keep_steps:
        if step != plan.stop_step and not directory(Path(config.run_dir), step).exists():
            key, end = f"checkpoint.keep_steps: {step}", plan.total_steps
            _require_saved(key, step, config, plan.steps_per_epoch, end=end)


def _require_saved(key: str, step: int, run: RunConfig, steps_per_epoch: int, *, end: int) -> None:
    if step == end or (step < end and saves_amid(step, run, steps_per_epoch)):
        return
    rule = run.checkpoint
    when = f"every {rule.every_epochs * steps_per_epoch} (checkpoint.every_epochs)"
    if rule.every_steps is not None:
        when += f", every {rule.every_steps} (checkpoint.every_steps)"
    if run.guard.every_steps is not None:
        when += f", every {run.guard.every_steps} (guard.every_steps)"
    raise ConfigError(
        f"{key}: no checkpoint of this step is written; of {end} steps, they are written after "
        f"{when} and at the end, so name one of these"
    )


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
