"""Which checkpoints to keep: the newest, one every N steps, the best by k-NN or the guard.

And those of the steps that the run itself names, which is read from the checkpoints: a later phase
may begin its Gram network with one.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dinoscale.checkpoint.layout import (
    STATE_FILE,
    checkpoints,
    leftovers,
    named_step,
    removed_of,
)
from dinoscale.checkpoint.progress import Guarded, read_measured, read_verdicts
from dinoscale.errors import UnreadableError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """The rules for keeping checkpoints.

    Attributes:
        last: number of the newest to keep, at least 1.
        every_steps: keep those at multiples of this many steps; None for no such rule.
        best: whether to keep the one that `best_of` names, and those of the guard's former images.
    """

    last: int
    every_steps: int | None = None
    best: bool = False


@dataclass(frozen=True)
class Summary:
    """What a checkpoint's state.json says; only path and step are set if it cannot be read.

    Attributes:
        guarded: what the guard knew at its end, the newest if it was measured again.
        former: what it knew before that of other images, the newest first.
    """

    path: Path
    step: int
    num_bytes: int | None
    saved_at: str | None
    knn_top1: float | None
    world_size: int | None
    zero_stage: int | None
    guarded: Guarded | None = None
    former: tuple[Guarded, ...] = ()
    keep_steps: tuple[int, ...] = ()  # checkpoint.keep_steps of the run when it was saved

    @property
    def verdicts(self) -> tuple[Guarded, ...]:
        """All that the guard knew here, the newest first."""
        return (() if self.guarded is None else (self.guarded,)) + self.former

    @property
    def guard_text(self) -> str:
        """What the guard measured at this step, and whether it is a fall; empty if nothing."""
        known = self.guarded
        value = known.values.get(known.measure) if known and known.step == self.step else None
        if known is None or value is None:
            return ""
        return f"{known.measure} {value:.4g}{' fallen' if known.fall else ''}"


def summary(path: Path) -> Summary:
    """Read a checkpoint's state.json and the sizes of its files, without verification."""
    try:
        return read_summary(path)
    except OSError:
        return _unknown(path)


def read_summary(path: Path) -> Summary:
    """Like `summary`, for decisions that must not be made without a checkpoint.

    Raises:
        OSError: another attempt may succeed.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text())
        top1 = read_measured(path)
        verdicts = read_verdicts(path)
        if state["progress"].get("guarded") is not None:
            saved = Guarded(**state["progress"]["guarded"])
            verdicts += [] if any(one.compares(saved) for one in verdicts) else [saved]
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
        return Summary(
            path,
            int(state.get("step", named_step(path))),
            num_bytes,
            state["saved_at"],
            state["progress"]["knn_top1"] if top1 is None else top1,
            state["plan"]["world_size"],
            state["config"]["engine"]["zero_stage"],
            verdicts[0] if verdicts else None,
            tuple(verdicts[1:]),
            tuple(map(int, state["config"].get("checkpoint", {}).get("keep_steps", ()))),
        )
    except (FileNotFoundError, NotADirectoryError):
        return _unknown(path)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return _unknown(path)


def _unknown(path: Path) -> Summary:
    return Summary(path, named_step(path) or 0, None, None, None, None, None)


def best_of(found: Sequence[Summary], known: Guarded | None = None) -> Summary | None:
    """The best one, the newest of ties; None if none was measured.

    By the measure of the guard, falls left out, where a guard is known; else, also after a guard
    has been switched off, by k-NN accuracy.

    Args:
        found: oldest first; of several phases, in their order.
        known: of the guard whose images and measure decide; None for what the newest one knows.
    """
    if known is None:
        readable = [s for s in found if s.num_bytes is not None]
        known = readable[-1].guarded if readable else None
    scores = [(score, s) for s in found if (score := _score(s, known)) is not None]
    best = max((score for score, _ in scores), default=None)
    return next((s for score, s in reversed(scores) if score == best), None)


def _score(one: Summary, known: Guarded | None) -> float | None:
    if known is None:
        return one.knn_top1
    here = next((verdict for verdict in one.verdicts if verdict.compares(known)), None)
    return None if here is None else here.score_at(one.step, known.measure)


def superfluous(found: Sequence[Summary], keep: Keep) -> list[Summary]:
    """Those that no rule keeps, in the order given (oldest first).

    A checkpoint whose step differs from its name is a user's copy, and one without a summary is
    damaged: both stay and count for no rule.
    """
    found = [s for s in found if s.num_bytes is not None and s.step == named_step(s.path)]
    kept = {s.step for s in found[-keep.last :]}
    kept.update(*(s.keep_steps for s in found))
    if keep.every_steps:
        kept |= {s.step for s in found if s.step % keep.every_steps == 0}
    best = _bests(found) if keep.best else []
    return [s for s in found if s.step not in kept and s not in best]


def _bests(found: Sequence[Summary]) -> list[Summary]:
    """The best one, and that of each set of images that a guard has measured."""
    of_sets: list[Guarded] = []  # the newest verdict of each set
    for verdict in (verdict for one in reversed(found) for verdict in one.verdicts):
        if not any(verdict.compares(newer) for newer in of_sets):
            of_sets.append(verdict)
    bests = [best_of(found), *(best_of(found, known) for known in of_sets)]
    return [best for best in bests if best is not None]


def prune(
    run_dir: Path, keep: Keep, *, written: Path, heartbeat: Callable[[], None] = lambda: None
) -> list[Path]:
    """Delete checkpoints that no rule keeps; one that cannot be deleted does not end the run.

    One that cannot be read now may be the best, so it stays. So does `written`, the one just saved,
    even if others have later steps. `heartbeat` is called after every file.
    """
    try:
        paths = checkpoints(run_dir)
    except UnreadableError as error:
        log.warning("nothing is deleted: %s", error)
        return []
    if len(paths) <= keep.last:
        return []
    found = []
    for path in paths:
        try:
            found.append(read_summary(path))
        except OSError as error:  # noqa: PERF203  # a few paths, once a save
            log.warning("cannot read %s (%s): it stays", path, error)
    unneeded = [s.path for s in superfluous(found, keep) if s.path != written]
    return [path for path in unneeded if delete(path, heartbeat)]


def clear_leftovers(run_dir: Path, heartbeat: Callable[[], None] = lambda: None) -> None:
    """Delete what interrupted saves and deletions have left behind.

    `heartbeat` is called after every file.

    Raises:
        UnreadableError: their folder cannot be listed.
    """
    for path in leftovers(run_dir):
        log.warning("%s is incomplete; deleting it", path)
        with suppress(OSError):
            _remove(path, heartbeat)
        shutil.rmtree(path, ignore_errors=True)


def delete(path: Path, heartbeat: Callable[[], None] = lambda: None) -> bool:
    """Delete a checkpoint; it is renamed first, so that no partial one looks complete."""
    try:
        _remove(path.rename(removed_of(path)), heartbeat)
    except OSError as error:
        log.warning("cannot delete the old checkpoint %s: %s", path, error)
        return False
    return True


def _remove(folder: Path, heartbeat: Callable[[], None]) -> None:
    """Delete a folder; with a file for each rank, this may take minutes."""
    for path in [] if folder.is_symlink() else folder.iterdir():
        if not path.is_dir():
            path.unlink()
            heartbeat()
    shutil.rmtree(folder)  # refuses a link
