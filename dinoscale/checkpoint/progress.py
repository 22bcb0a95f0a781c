"""Progress of a run beyond its weights, and a check of the first loss after a resume."""

import json
import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from dinoscale.checkpoint.layout import MEASURED_FILE
from dinoscale.checkpoint.read_errors import is_missing
from dinoscale.errors import CheckpointError

_WINDOW = 32  # losses remembered
_ENOUGH = 8  # losses from which a prediction is made


def write_measured(folder: Path, knn_top1: float) -> None:
    """Add a k-NN accuracy, in percent, to a checkpoint that was saved before.

    Raises:
        OSError: it cannot be written; the checkpoint is unchanged.
    """
    part = folder / f".{MEASURED_FILE}.part"
    with part.open("w") as file:
        file.write(json.dumps({"knn_top1": knn_top1}) + "\n")
        file.flush()
        os.fsync(file.fileno())  # else the name may reach the disk before the contents
    part.replace(folder / MEASURED_FILE)


def read_measured(folder: Path) -> float | None:
    """The k-NN accuracy that `write_measured` added, in percent; None if there is none.

    Raises:
        OSError: there may be one, but it cannot be read now.
    """
    path = folder / MEASURED_FILE
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        found = json.loads(path.read_text())["knn_top1"]
        number = float(found) if type(found) in (int, float) else math.nan
    except FileNotFoundError:
        if is_missing(path):
            return None
        raise
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None
    return number if math.isfinite(number) else None


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
    """

    step: int = 0
    data_offset: int = 0
    bad_in_a_row: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
    knn_top1: float | None = None
    best_knn_top1: float | None = None
    losses: list[float] = field(default_factory=list)

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
