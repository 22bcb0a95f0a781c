"""The best checkpoint of a run: its teacher as weights, and the way back to it after a fall."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from dinoscale.checkpoint.layout import checkpoints, phase_directories
from dinoscale.checkpoint.load import held_step, open_verified
from dinoscale.checkpoint.progress import Guarded, Progress
from dinoscale.checkpoint.retention import Summary, best_of, read_summary
from dinoscale.config import RunConfig
from dinoscale.config.sections.guard import GuardConfig
from dinoscale.convert.conversion import convert
from dinoscale.errors import CheckpointError, DinoscaleError, RunFailedError, UnreadableError
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import on_first_rank
from dinoscale.runtime.outputs import BEST_WEIGHTS, is_phase
from dinoscale.training.hooks.events import Events
from dinoscale.training.hooks.guard import end_text, fall_text

log = logging.getLogger(__name__)

_FALLEN = "fallen_"  # name prefix of checkpoints set aside


def best_checkpoint(*run_dirs: Path, known: Guarded | None = None) -> Summary | None:
    """The best checkpoint on disk by `best_of`; None if none was measured.

    Args:
        run_dirs: of a run, or of its phases, in their order.
        known: of the guard whose images and measure decide; None for that of the newest one.

    Raises:
        UnreadableError: the checkpoints cannot be listed, or one cannot be read, which may be it.
    """
    found = []
    for path in (path for run_dir in run_dirs for path in checkpoints(run_dir)):
        try:
            found.append(read_summary(path))
        except OSError as error:  # noqa: PERF203  # a few paths
            raise UnreadableError(f"{path} cannot be read, and may be the best: {error}") from error
    return best_of(found, known)


def has_verdict(progress: Progress, rule: GuardConfig) -> bool:
    """Whether the last step needs no further verdict of a guard that ends runs."""
    known = progress.guarded
    judged = known is not None and known.judged(progress.step, rule.measure)
    return judged or not rule.ends_runs


def finish(
    progress: Progress, config: RunConfig, heartbeat: Callable[[], None]
) -> dict[str, str | None]:
    """Export the best teacher of a run at its last step; all ranks call it.

    Args:
        progress: after the last step, which is saved.
        config: of the run; nothing is done without a guard.
        heartbeat: called while rank 0 works.

    Returns:
        For the summary of the run: with a guard, `best_checkpoint`, the path of the exported one;
        None if none was exported.

    Raises:
        RunFailedError: on every rank, if a fall ends the run and this step could not be measured.
    """
    if not has_verdict(progress, config.guard):
        raise RunFailedError(
            f"step {progress.step}, the last, is saved, but the guard could not measure it (see"
            f" events.jsonl in {config.run_dir}): the same command tries again;"
            " guard.on_fall=warn does without"
        )
    if config.guard.every_steps is None:
        return {}
    export = partial(export_best, Path(config.run_dir), known=progress.guarded)
    exported = distributed.broadcast_object(on_first_rank(export, heartbeat))
    if exported is None:
        warn_of_old_weights(config)
    return {"best_checkpoint": None if exported is None else str(exported)}


def warn_of_old_weights(config: RunConfig) -> None:
    """Say that `BEST_WEIGHTS` are of an earlier end, if a run ends without new ones; on rank 0."""
    run_dir = Path(config.run_dir)
    weights = _whole_run(run_dir) / BEST_WEIGHTS
    if config.guard.every_steps is None or distributed.rank() != 0:
        return
    try:
        written = weights.stat().st_mtime
        newest = max((path.stat().st_mtime for path in checkpoints(run_dir)), default=0.0)
    except (OSError, UnreadableError):  # mostly that there are no such weights
        return
    if newest > written:
        log.warning(
            "%s is of an earlier end of this run, and may not be the best; `dinoscale checkpoint"
            " list %s` names the best checkpoint, which `dinoscale convert` exports",
            *(weights, run_dir),
        )


def _whole_run(run_dir: Path) -> Path:
    """Directory of the run that a phase is of; of another run, its own."""
    return run_dir.parent.parent if is_phase(run_dir) else run_dir


def export_best(
    run_dir: Path, heartbeat: Callable[[], None] = lambda: None, *, known: Guarded | None = None
) -> Path | None:
    """Write the teacher of the best checkpoint to `BEST_WEIGHTS`, in place of an earlier best.

    Of a phase, the file is that of the whole run: the best of all its phases so far.

    Args:
        run_dir: of a run or a phase.
        heartbeat: called regularly.
        known: of the guard of that run or phase; None for that of the newest checkpoint.

    Returns:
        The checkpoint; None with a warning if there is none, or it cannot be exported.
    """
    whole = _whole_run(run_dir)
    target = whole / BEST_WEIGHTS
    try:
        best = best_checkpoint(*(phase_directories(whole) or [whole]), known=known)
        if best is None:
            log.warning("no checkpoint was measured by the guard: there are no best weights")
            return None
        convert(best.path, target, to="dino", overwrite=True, heartbeat=heartbeat)
    except (DinoscaleError, MemoryError, RuntimeError) as error:  # the last of torch
        log.warning("the best weights are not exported: %s", error)
        return None
    log.info("the best weights are those of %s: %s", best.path, target)
    return best.path


def set_back(
    run_dir: Path, *, step: int, heartbeat: Callable[[], None] = lambda: None
) -> list[Path]:
    """Rename the checkpoints after `step`, so that a resume begins there; earlier ones go.

    Returns:
        Their new paths.

    Raises:
        UnreadableError: they cannot be listed, or the state of one cannot be read.
        OSError: one cannot be renamed.
    """
    of_earlier = list((run_dir / "checkpoints").glob(f"{_FALLEN}step_*"))
    moved = []
    # The newest first: an interruption then leaves no gap.
    for path in sorted(checkpoints(run_dir), key=held_step, reverse=True):
        if held_step(path) > step:
            aside = path.with_name(_FALLEN + path.name)
            if aside.exists():
                shutil.rmtree(aside)
            moved.append(path.rename(aside))
    for path in of_earlier:
        if path not in moved:
            shutil.rmtree(path, ignore_errors=True)
            heartbeat()
    return moved


def end_at_fall(
    fall: Guarded, config: RunConfig, events: Events, heartbeat: Callable[[], None]
) -> NoReturn:
    """End a run whose teacher has fallen, as `guard.on_fall` says; all ranks call it.

    The best teacher is exported. Its checkpoint becomes the newest one if the run is to roll back.

    Args:
        fall: the verdict.
        config: of the run.
        events: get how it ended.
        heartbeat: called while rank 0 works.

    Raises:
        UnreadableError: on every rank, if a checkpoint cannot be read now; nothing is set aside.
        RunFailedError: else, on every rank.
    """
    run_dir, roll_back = Path(config.run_dir), config.guard.on_fall == "roll_back"
    export = partial(_export_and_set_back, run_dir, fall, roll_back=roll_back)
    step = on_first_rank(lambda beat: export(heartbeat=beat), heartbeat)
    step = distributed.broadcast_object(step)
    if roll_back and step is not None:
        events.write(fall.step, "rolled back", to_step=step, reason=fall.fall)
    else:
        events.write(fall.step, "stopped", reason=fall.fall)
    raise RunFailedError(
        f"{fall_text(fall, config)}. {end_text(fall, config.guard, best_step=step)}"
    )


def _export_and_set_back(
    run_dir: Path, fall: Guarded, *, roll_back: bool, heartbeat: Callable[[], None]
) -> int | None:
    """Do what is to be done on the disk; return the step of the best checkpoint, if any.

    Raises:
        UnreadableError: the checkpoints cannot be listed, or one cannot be read.
        RunFailedError: the best is damaged, and nothing is set aside; or one cannot be renamed.
    """
    best = best_checkpoint(run_dir, known=fall)
    if best is None:
        return None
    if roll_back:
        _require_intact(best.path, heartbeat)
    export_best(run_dir, heartbeat, known=fall)
    try:
        if roll_back:
            set_back(run_dir, step=best.step, heartbeat=heartbeat)
    except OSError as error:
        raise RunFailedError(
            f"cannot go back to the best checkpoint, {best.path}: {error}; rename the later ones by"
            " hand"
        ) from error
    return best.step


def _require_intact(best: Path, heartbeat: Callable[[], None]) -> None:
    try:
        open_verified(best, heartbeat)
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise RunFailedError(
            f"the teacher has fallen, and the best checkpoint is damaged: {error}. Nothing was set"
            f" aside; move {best} away, and the same command goes back to the best of the others"
        ) from error
