"""Progress of a run beyond its weights, and a check of the first loss after a resume."""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from dinoscale.checkpoint.layout import MEASURED_FILE
from dinoscale.checkpoint.read_errors import is_missing
from dinoscale.errors import CheckpointError

_WINDOW = 32  # losses remembered
_ENOUGH = 8  # losses from which a prediction is made


@dataclass(frozen=True)
class Guarded:
    """What the guard has measured so far, as plain data.

    Values are by name: `rankme`, `lidar` and `knn_top1` (higher is better), `alpha_req`,
    `agreement`, and `lidar_views`, the views of an image that `lidar` compares.

    Attributes:
        images: which ones were measured, in words.
        measure: name of the value that decides which teacher is the best.
        step: of the last measurement.
        values: of the last measurement.
        start_step: of the first measurement.
        start: its values.
        best_step: of the measurement with the highest `measure` among those that were no fall.
        best: its values.
        fall: what is wrong with the last measurement, in words; empty if nothing is.
        identity: digest of the images and of how they are shown; numbers of others do not compare.
            Older versions stored none.
        start_in: folder of the phase whose steps `start_step` counts; empty for this one.
        best_in: folder of the phase whose steps `best_step` counts; empty for this one.
    """

    images: str
    measure: str
    step: int
    values: dict[str, float]
    start_step: int
    start: dict[str, float]
    best_step: int
    best: dict[str, float]
    fall: str = ""
    identity: str = ""
    start_in: str = ""
    best_in: str = ""

    def __post_init__(self) -> None:
        """Refuse what is not plain data of these types.

        Raises:
            TypeError: a field has another type.
        """
        texts = (self.images, self.measure, self.fall, self.identity, self.start_in, self.best_in)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("guarded: images, measure, fall, identity and places are texts")
        if not all(type(step) is int for step in (self.step, self.start_step, self.best_step)):
            raise TypeError("guarded: steps are whole numbers")
        for values in (self.values, self.start, self.best):
            if not all(type(value) in (int, float) for value in values.values()):
                raise TypeError("guarded: values are numbers")

    @property
    def start_text(self) -> str:
        """Step and phase of the first measurement."""
        return _place(self.start_step, self.start_in)

    @property
    def best_text(self) -> str:
        """Step and phase of the best one."""
        return _place(self.best_step, self.best_in)

    def compares(self, other: Guarded) -> bool:
        """Whether the numbers of both are of the same images."""
        return self.is_of(images=other.images, identity=other.identity)

    def is_of(self, *, images: str, identity: str) -> bool:
        """Whether the numbers are of these images; the words decide if either is of older versions.

        So it does not matter which of two is asked.
        """
        by_identity = self.identity and identity
        return self.identity == identity if by_identity else self.images == images

    def judged(self, step: int, measure: str) -> bool:
        """Whether the teacher after `step` has fallen, or was measured by `measure`."""
        return self.step >= step and (bool(self.fall) or measure in self.values)

    def passes(self, step: int, measure: str) -> bool:
        """Whether the teacher after `step` was measured by `measure` and has not fallen."""
        return self.judged(step, measure) and not self.fall

    def score_at(self, step: int, measure: str) -> float | None:
        """Value of a measure if it was measured at `step` and was no fall."""
        return self.values.get(measure) if self.step == step and not self.fall else None


def _place(step: int, folder: str) -> str:
    return f"step {step:,}{f' of {folder}' if folder else ''}"


def write_measured(folder: Path, knn_top1: float | None, guarded: Guarded | None = None) -> None:
    """Add a k-NN accuracy, in percent, and the guard's to a checkpoint that was saved before.

    What the guard found there on other images stays beside it.

    Raises:
        OSError: it cannot be written; the checkpoint is unchanged.
    """
    found: dict[str, Any] = {} if knn_top1 is None else {"knn_top1": knn_top1}
    if guarded is not None:
        former = [asdict(one) for one in read_verdicts(folder) if not one.compares(guarded)]
        found |= {"guarded": asdict(guarded)} | ({"former": former} if former else {})
    part = folder / f".{MEASURED_FILE}.part"
    with part.open("w") as file:
        file.write(json.dumps(found) + "\n")
        file.flush()
        os.fsync(file.fileno())  # else the name may reach the disk before the contents
    part.replace(folder / MEASURED_FILE)


def read_measured(folder: Path) -> float | None:
    """The k-NN accuracy that `write_measured` added, in percent; None if there is none.

    Raises:
        OSError: there may be one, but it cannot be read now.
    """
    number = _measured(folder).get("knn_top1")
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    try:
        value = float(number)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def read_guarded(folder: Path) -> Guarded | None:
    """What `write_measured` added last of the guard; None if there is nothing.

    Raises:
        OSError: there may be something, but it cannot be read now.
    """
    return _guarded(_measured(folder).get("guarded"))


def read_verdicts(folder: Path) -> list[Guarded]:
    """All that `write_measured` added of the guard, of different images; the newest first.

    Raises:
        OSError: there may be something, but it cannot be read now.
    """
    found = _measured(folder)
    former = found.get("former")
    plain = [found.get("guarded"), *(former if isinstance(former, list) else [])]
    return [one for one in map(_guarded, plain) if one is not None]


def _guarded(plain: object) -> Guarded | None:
    try:
        return Guarded(**plain) if isinstance(plain, dict) else None
    except (TypeError, AttributeError):
        return None


def _measured(folder: Path) -> dict[str, Any]:
    """Contents of a checkpoint's file of later measurements; empty without one.

    Raises:
        OSError: there may be one, but it cannot be read now.
    """
    path = folder / MEASURED_FILE
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return {}
        found = json.loads(path.read_text())
    except FileNotFoundError:
        if is_missing(path):
            return {}
        raise
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass
class Progress:
    """Saved with a checkpoint as plain data.

    Attributes:
        step: optimizer steps done, skipped ones included.
        data_offset: step s takes the images of step s + data_offset (after a rollback).
        bad_in_a_row: consecutive skipped steps up to now.
        skipped_steps: skipped steps in total.
        rollbacks: returns to a checkpoint so far.
        knn_top1: k-NN accuracy measured at this step, in percent.
        best_knn_top1: the highest so far.
        losses: of the last applied steps, oldest first.
        guarded: what the guard has measured; None without a guard.
    """

    step: int = 0
    data_offset: int = 0
    bad_in_a_row: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
    knn_top1: float | None = None
    best_knn_top1: float | None = None
    losses: list[float] = field(default_factory=list)
    guarded: Guarded | None = None

    def __post_init__(self) -> None:
        """Take plain data, as a checkpoint holds it.

        Raises:
            TypeError: it is of another version.
        """
        if isinstance(self.guarded, dict):
            self.guarded = Guarded(**self.guarded)

    def applied(self, loss: float) -> None:
        """Count an applied step."""
        self._next()
        self.bad_in_a_row = 0
        self.losses = [*self.losses, loss][-_WINDOW:]

    def skipped(self) -> None:
        """Count a skipped step."""
        self._next()
        self.bad_in_a_row += 1
        self.skipped_steps += 1

    def _next(self) -> None:
        self.step += 1
        self.knn_top1 = None

    def measured(self, knn_top1: float) -> None:
        """Remember a k-NN accuracy of this step."""
        self.knn_top1 = knn_top1
        self.best_knn_top1 = max(knn_top1, self.best_knn_top1 or 0.0)

    def require_near(self, loss: float) -> None:
        """Refuse a first loss after a resume that does not continue the losses before.

        A network that was not restored has another loss. The prediction is the median of the last
        eight losses; the tolerance is three times the range of all remembered losses plus a tenth
        of the prediction, which covers the teacher temperature of a new epoch.

        Raises:
            CheckpointError: the loss jumped.
        """
        if len(self.losses) < _ENOUGH:
            return
        predicted = median(self.losses[-_ENOUGH:])
        allowed = 3 * (max(self.losses) - min(self.losses)) + 0.1 * predicted
        if abs(loss - predicted) > allowed:
            raise CheckpointError(
                f"the first loss after the resume is {loss:.4f}; the checkpoint at step {self.step}"
                f" predicts {predicted:.4f} +- {allowed:.4f}. The weights do not belong to this"
                " run, or the images or settings have changed. Nothing was saved; compare data and"
                " configuration with those in the checkpoint's state.json, or move this checkpoint"
                " aside to resume from an earlier one"
            )
