"""Which phase of a run comes next.

Each is trained in processes of its own: a process that has ended one starts itself anew, since
DeepSpeed's engines hold their memory until it ends. Between two phases a run is therefore resumed
as after a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from dinoscale.checkpoint.layout import checkpoints
from dinoscale.checkpoint.load import Checkpoint, newest_first
from dinoscale.config import RunConfig
from dinoscale.errors import CheckpointError, UnreadableError
from dinoscale.runtime import distributed


def next_phase(runs: Sequence[RunConfig]) -> int:
    """Index of the first phase that is not finished, of the last if all are; collective.

    A phase before one that has a checkpoint is finished, whatever has been changed in it since.

    Args:
        runs: of `phases_of`.

    Raises:
        UnreadableError: on every rank, if checkpoints cannot be listed or read.
    """
    found = distributed.together(lambda: _next(runs) if distributed.rank() == 0 else None)
    return cast(int, distributed.broadcast_object(found))


def _next(runs: Sequence[RunConfig]) -> int:
    last = len(runs) - 1
    for index in range(last, -1, -1):
        if checkpoints(Path(runs[index].run_dir)):
            return min(index + 1, last) if _finished(runs[index]) else index
    return 0


def _finished(run: RunConfig) -> bool:
    """Whether the newest checkpoint of a phase is that of its last step."""
    try:
        state = Checkpoint(newest_first(Path(run.run_dir))[0]).state
        steps = run.train.epochs * state["plan"]["steps_per_epoch"]
    except UnreadableError:
        raise
    except (CheckpointError, KeyError, TypeError):
        return False  # the training finds an older one
    stop = run.train.stop_after_steps
    return bool(state["step"] >= (steps if stop is None else min(steps, stop)))
