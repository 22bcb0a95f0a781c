"""What is measured of the teacher during a run: k-NN, the guard's images, else the rank."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from dinoscale.checkpoint.layout import is_checkpoint, run_with_checkpoints
from dinoscale.checkpoint.load import newest_first
from dinoscale.checkpoint.progress import Guarded, Progress
from dinoscale.checkpoint.retention import read_summary
from dinoscale.config import RunConfig
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import UnreadableError
from dinoscale.runtime import distributed
from dinoscale.runtime.outputs import is_phase
from dinoscale.training.due import Due
from dinoscale.training.hooks.events import Events
from dinoscale.training.hooks.guard import fall_text, judge, new_start_text, starts
from dinoscale.training.hooks.held_out import HeldOut
from dinoscale.training.hooks.measuring import Measuring
from dinoscale.training.hooks.metrics import Metrics
from dinoscale.training.hooks.online_knn import OnlineKnn
from dinoscale.training.hooks.online_rank import OnlineRank

log = logging.getLogger(__name__)


def _carried(config: RunConfig, held_out: HeldOut) -> Guarded | None:
    """What the run before knows of the guard, on rank 0; see `Measurements.carry_over`."""
    before = config.train.continue_from
    if before is None and is_phase(Path(config.train.init_from or "")):
        before = config.train.init_from
    if before is None or distributed.rank() != 0:
        return None
    path = Path(before)
    try:
        newest = [path] if is_checkpoint(path) else newest_first(run_with_checkpoints(path))
        known = read_summary(newest[0]).guarded if newest else None
    except OSError as error:  # a new start instead would be for good
        raise UnreadableError(
            f"{before} cannot be read, whose best the guard goes on from"
        ) from error
    if known is None or starts(known, held_out.images, held_out.identity):
        return None
    run_dir = newest[0].parent.parent
    held_out.take_start(run_dir)
    return replace(
        known,
        step=-1,  # the teacher is measured anew, before step 1
        fall="",
        start_in=known.start_in or run_dir.name,
        best_in=known.best_in or run_dir.name,
    )


class Measurements:
    """Takes the measurements that are due, and writes them down; all ranks call it together.

    Attributes:
        last: the last k-NN accuracy and the best, for the summary of a run.
    """

    def __init__(
        self,
        config: RunConfig,
        measuring: Measuring,
        online_knn: OnlineKnn | None,
        held_out: HeldOut | None,
        events: Events,
        metrics: Metrics,
        *,
        warns: bool,
        online_rank: OnlineRank | None = None,
    ) -> None:
        """Args: parts of the run; `warns` on the rank that logs warnings."""
        self._config, self._measuring, self._warns = config, measuring, warns
        self._online_knn, self._held_out, self._online_rank = online_knn, held_out, online_rank
        self._events, self._metrics = events, metrics
        self.last: dict[str, float] = {}

    @property
    def asked_to_stop(self) -> bool:
        """Whether a rank was asked to stop during a measurement."""
        return self._measuring.asked_to_stop

    def carry_over(self, progress: Progress) -> None:
        """Give a new run the start and the best of the one whose teacher it goes on with.

        That is the run of train.continue_from, and for a phase the one before. Nothing is carried
        where that run measured other images; all ranks call it.

        Raises:
            UnreadableError: on every rank, if that run cannot be read now.
        """
        held_out = self._held_out
        if held_out is not None:
            found = distributed.together(partial(_carried, self._config, held_out))
            progress.guarded = distributed.broadcast_object(found)

    def judge_again(self, progress: Progress, knn_top1: float | None = None) -> bool:
        """Judge what was measured at this step by the present rule; without a guard, forget it.

        Args:
            progress: gets the verdict.
            knn_top1: of this step, in percent, if it was measured after the guard's own numbers.

        Returns:
            Whether the verdict is another one; it belongs to the checkpoint of this step.
        """
        known, held_out = progress.guarded, self._held_out
        if held_out is None:
            progress.guarded = None
        if known is None or held_out is None or known.step != progress.step:
            return False
        images, identity = held_out.images, held_out.identity
        if starts(known, images, identity):
            return False  # is measured anew
        later = {} if knn_top1 is None else {"knn_top1": knn_top1}
        after = judge(
            *(known, self._config.guard),
            step=known.step,
            values=known.values | later,
            images=images,
            identity=identity,
        )
        progress.guarded = after
        if after.fall and not known.fall:
            self._say(progress.step, "fall", fall_text(after, self._config))
        return after != known

    def missing(self, progress: Progress, due: Due) -> Due:
        """What a start that ended at this step has left to do; a guard that is new begins.

        Where k-NN decides, a new guard forgets its accuracy, which is measured anew.
        """
        known, held_out, measure = progress.guarded, self._held_out, self._config.guard.measure
        knn = due.knn and progress.knn_top1 is None
        if due.knn and self._online_rank is not None:  # no checkpoint knows of it
            knn = not distributed.broadcast_object(self._metrics.has(progress.step, "rankme"))
        if held_out is None:
            guard = False
        elif known is None or starts(known, held_out.images, held_out.identity):
            guard = True
            if measure == "knn_top1":  # that of other sets or of another k is none of this start
                knn, progress.knn_top1 = True, None
        else:
            guard = due.guard and known.step < progress.step
            # Where k-NN failed, the guard's own numbers of this step wait for it.
            knn |= measure == "knn_top1" and due.guard and not known.judged(progress.step, measure)
        return due._replace(knn=knn, guard=guard)

    def take(self, progress: Progress, teacher: Teacher, due: Due) -> bool:
        """Measure what is due; `progress` gets what is found. Return whether anything was.

        The rank of a run that is measured no other way is due with k-NN, and `progress` does not
        get it.
        """
        found = False
        if due.knn and self._online_rank is not None:  # and neither of the others
            self._measure_rank(self._online_rank, progress, teacher)
        if due.knn and self._online_knn is not None:
            found = self._measure_knn(self._online_knn, progress, teacher)
        if due.guard and self._held_out is not None:  # after k-NN, which the guard may judge
            found |= self._measure_held_out(self._held_out, progress, teacher)
        elif found:
            self.judge_again(progress, progress.knn_top1)
        return found

    def _images(self, progress: Progress) -> dict[str, float]:
        return {"images": progress.step * self._config.train.batch_size}

    def _measure_knn(self, online_knn: OnlineKnn, progress: Progress, teacher: Teacher) -> bool:
        done = progress.step
        found = self._measuring.attempt("k-NN", online_knn.measure, teacher, done)
        if found is None:
            return False
        top1 = found.top1
        progress.measured(top1)
        self.last = {"knn_top1": top1, "best_knn_top1": progress.best_knn_top1 or top1}
        values = found.metrics()
        self._metrics.write(done, {**self._images(progress), **values})
        self._metrics.say(f"step {done}: k-NN top-1 of the teacher {top1:.1f} %")
        return True

    def _measure_rank(self, online_rank: OnlineRank, progress: Progress, teacher: Teacher) -> None:
        done = progress.step
        found = self._measuring.attempt("RankMe", online_rank.measure, teacher, done)
        if found is not None:
            self._metrics.write(done, {**self._images(progress), **found})

    def _measure_held_out(self, held_out: HeldOut, progress: Progress, teacher: Teacher) -> bool:
        """Measure the images of the guard, and judge; a fall is an event once until it ends."""
        done, before = progress.step, progress.guarded
        images, identity = held_out.images, held_out.identity
        is_start = starts(before, images, identity)
        measure = partial(held_out.measure, starts=is_start)
        values = self._measuring.attempt("held-out measurement", measure, teacher, done)
        if values is None:
            return False
        own = {f"guard_{name}": value for name, value in values.items()}
        self._metrics.write(done, {**self._images(progress), **own})
        if progress.knn_top1 is not None:
            values["knn_top1"] = progress.knn_top1
        if is_start and before is not None:
            self._say(done, "new start", new_start_text(before, step=done, images=images))
            before = None
        after = judge(
            before, self._config.guard, step=done, values=values, images=images, identity=identity
        )
        progress.guarded = after
        if after.fall and not (before and before.fall):
            self._say(done, "fall", fall_text(after, self._config))
        return True

    def _say(self, done: int, kind: str, text: str) -> None:
        """Write an event, and warn."""
        self._events.write(done, kind, text=text)
        if self._warns:
            log.warning("%s", text)
