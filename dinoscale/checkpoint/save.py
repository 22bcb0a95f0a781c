"""Write a checkpoint: every rank its fragments, rank 0 the rest, renamed when complete."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinoscale import distributed
from dinoscale.checkpoint.layout import (
    EMA,
    FORMAT,
    MASTER,
    SHARED_FILE,
    STATE_FILE,
    checkpoints,
    directory,
    shard_file,
)
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import CheckpointError

log = logging.getLogger(__name__)


def save(
    run_dir: Path,
    *,
    step: int,
    student: Student,
    teacher: Teacher,
    about: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Save everything a run needs to go on after `step` optimizer steps; all ranks call it.

    Args:
        run_dir: of the run, on a file system that all ranks share.
        step: optimizer steps done.
        student: weights and moments.
        teacher: average and center.
        about: JSON-able facts to store: config, world size, versions.
        keep_last: older checkpoints beyond this many are deleted after the new one is complete.

    Raises:
        CheckpointError: on every rank, if any could not write; earlier checkpoints stay.
    """
    target = directory(run_dir, step)
    if distributed.broadcast_object(target.exists()):
        return target
    part = target.with_name(f".{target.name}.part")

    def begin() -> None:
        try:
            if distributed.rank() == 0 and part.exists():  # a crash, maybe of a run on more ranks
                shutil.rmtree(part)
        except OSError as error:
            raise CheckpointError(f"cannot clear {part}: {error}") from error

    def write() -> None:
        try:
            part.mkdir(parents=True, exist_ok=True)
            _write_shard(part / shard_file(distributed.rank()), student, teacher)
            if distributed.rank() == 0:
                _write_shared(part, step, student, teacher, about)
        except (OSError, SafetensorError) as error:  # the latter for a full disk, among others
            raise CheckpointError(f"cannot write checkpoint {target}: {error}") from error

    def finish() -> None:
        if distributed.rank() != 0:
            return
        try:
            part.rename(target)
        except OSError as error:
            raise CheckpointError(f"cannot rename {part} to {target}: {error}") from error
        log.info("saved %s", target)
        _delete(checkpoints(run_dir)[:-keep_last])

    for act in (begin, write, finish):
        distributed.together(act)
    return target


def _delete(old: list[Path]) -> None:
    """Remove checkpoints; one that stays costs space, not the run."""
    for path in old:
        try:
            shutil.rmtree(path)
        except OSError as error:  # noqa: PERF203  # a few paths, once an epoch
            log.warning("cannot delete the old checkpoint %s: %s", path, error)


def _write_shard(path: Path, student: Student, teacher: Teacher) -> None:
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    kinds: dict[str, list[Tensor | None]] = {
        MASTER: list(student.master),
        EMA: list(teacher.ema),
        **student.optimizer_state(),
    }
    for kind, views in kinds.items():
        for fragment, view in zip(student.layout.fragments, views, strict=True):
            starts[fragment.name] = fragment.start
            if view is not None:
                tensors[f"{kind}/{fragment.name}"] = view.detach().cpu().clone()
    save_file(tensors, path, metadata={"starts": json.dumps(starts)})


def _write_shared(
    part: Path, step: int, student: Student, teacher: Teacher, about: Mapping[str, Any]
) -> None:
    tensors = {"center": teacher.center.cpu()}
    for owner, buffers in (("student", student.buffers()), ("teacher", teacher.buffers())):
        tensors |= {f"{owner}/{name}": value.cpu().clone() for name, value in buffers.items()}
    save_file(tensors, part / SHARED_FILE)
    state = {
        "format": FORMAT,
        "step": step,
        "shapes": student.shapes,
        "optimizer_steps": student.optimizer_steps(),
        **about,
    }
    (part / STATE_FILE).write_text(json.dumps(state, indent=1))
