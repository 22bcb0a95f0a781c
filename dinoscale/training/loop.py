"""The training loop: steps, log lines, k-NN, checkpoints and interruptions."""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.contrib.logging import logging_redirect_tqdm

from dinoscale.checkpoint.load import Checkpoint
from dinoscale.checkpoint.progress import Progress
from dinoscale.checkpoint.retention import Keep
from dinoscale.checkpoint.save import Saver, SaveResult
from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.data.loader import Batch
from dinoscale.data.sources.bad_samples import BadSampleLog
from dinoscale.data.sources.left_out import LeftOut
from dinoscale.data.sources.mixture import left_out_counts
from dinoscale.data.sources.source import Source
from dinoscale.engine.build import loss_weights_of, schedules_of
from dinoscale.engine.schedules import StepValues
from dinoscale.engine.step import StepMetrics, train_step
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import (
    LostPeerError,
    NonFiniteError,
    PreemptedError,
    RunFailedError,
)
from dinoscale.runtime import distributed
from dinoscale.runtime.cores import available_cores
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.opening import on_all_ranks, on_first_rank
from dinoscale.runtime.preemption import StopRequest
from dinoscale.runtime.versions import versions
from dinoscale.runtime.watchdog import Watchdog
from dinoscale.training.best import end_at_fall, finish, has_verdict, warn_of_old_weights
from dinoscale.training.due import Due, due_after
from dinoscale.training.feed import Feed, run_of_step
from dinoscale.training.hooks.bad_steps import dump_bad_step
from dinoscale.training.hooks.collapse import OBSERVE_EVERY, Reading
from dinoscale.training.hooks.collapse_watch import CollapseWatch
from dinoscale.training.hooks.data_wait import DataWait
from dinoscale.training.hooks.events import Events
from dinoscale.training.hooks.held_out import HeldOut
from dinoscale.training.hooks.measurements import Measurements
from dinoscale.training.hooks.measuring import Measuring
from dinoscale.training.hooks.metrics import Metrics, Stopwatch, peak_memory_bytes
from dinoscale.training.hooks.online_knn import OnlineKnn
from dinoscale.training.hooks.online_rank import OnlineRank
from dinoscale.training.hooks.setting_names import as_set_here
from dinoscale.training.resume import find_checkpoint, restore
from dinoscale.training.targets.folder import TargetFolder
from dinoscale.training.targets.read import TargetReader

log = logging.getLogger(__name__)


class _LaunchedStep(NamedTuple):
    """A launched step; the device may still be computing its result."""

    now: StepValues
    result: StepMetrics
    batches: Sequence[Batch]


class Run:
    """One start of a run, from its first step to its end.

    The result of a step is read once the next step has been launched, so that the device always has
    work; if something is due after the step, its result is read at once.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: RunPlan,
        process: Process,
        source: Source,
        images: str,
        licence: str | None,
        student: Student,
        teacher: Teacher,
        online_knn: OnlineKnn | None,
        held_out: HeldOut | None,
        online_rank: OnlineRank | None,
        stop: StopRequest,
        watchdog: Watchdog,
        checkpoint: Checkpoint | None,
        targets: TargetFolder | None = None,
    ) -> None:
        self.config, self.plan, self.process, self.source = config, plan, process, source
        self.images = images  # identity of the image set, on rank 0
        self.licence = licence  # of the weights that the run began with, on rank 0
        self.feed = Feed(
            *(config, plan, process, source),
            depth=student.network.backbone.depth,
            targets=None if targets is None else TargetReader(targets, config, plan, process),
        )
        self.student, self.teacher = student, teacher
        self.stop, self.watchdog = stop, watchdog
        self.run_dir = Path(config.run_dir)
        self.progress = _progress_of(checkpoint)
        self.resumed_at = None if checkpoint is None else checkpoint.step
        self.first_loss_unchecked = checkpoint is not None
        self.saver = Saver(self.run_dir, _keep(config, plan))
        self.saved: SaveResult | None = None  # of the last finished save
        self.saved_step = self.resumed_at  # of the last save begun
        is_first = process.rank == 0
        self.versions = versions() if is_first else {}
        self.schedules, self.loss_weights = schedules_of(config, plan), loss_weights_of(config)
        self.events = Events(self.run_dir, active=is_first)
        self.metrics = distributed.together(lambda: self._open_metrics(active=is_first))
        self.collapse = CollapseWatch(config, plan, self.events, warns=is_first)
        self.measurements = Measurements(
            *(config, Measuring(process, watchdog, stop, self.events), online_knn, held_out),
            *(self.events, self.metrics),
            warns=is_first,
            online_rank=online_rank,
        )
        self.bad = BadSampleLog(self.run_dir / "bad_samples.jsonl", writes=is_first)
        self.pending_bad: list[Any] = []
        self.left_out: dict[int, LeftOut] = {}  # of shards of a stream that this rank has read
        self.steps_taken = 0  # since this start
        self.stopping = False  # a rank was asked to stop, and all ranks know
        self.data_wait = DataWait(
            num_workers=config.data.num_workers,
            cores=available_cores(),
            ranks_here=process.local_world_size,
            on_cpu=process.device.type == "cpu",
        )
        self.bar_suffix = ""  # data wait of the last log line
        self.last: dict[str, float] = {}

    def _open_metrics(self, *, active: bool) -> Metrics:
        config = self.config
        return Metrics(
            self.run_dir,
            active=active,
            start_step=self.progress.step,
            total_steps=self.plan.total_steps,
            wandb_project=config.log.wandb_project if config.log.wandb else None,
            config=config.model_dump(),
        )

    def train(self) -> dict[str, Any]:
        """Train to the last step and save; return the summary of `trainer.train`.

        Raises:
            DinoscaleError: on every rank.
        """
        # Log lines appear above the progress bar; other ranks have no bar and log only warnings.
        bar = logging_redirect_tqdm() if self.process.rank == 0 else nullcontext()
        with bar, closing(self.feed), self._finishing_saves():
            self._begin()
            while self.progress.step < self.plan.stop_step:
                self._take_steps()  # to the end, or to a rollback
            self._save_and_wait()
            if self.stopping and not has_verdict(self.progress, self.config.guard):
                self._preempt()
            best = finish(self.progress, self.config, self.watchdog.heartbeat)
        self.metrics.close()
        left_out = left_out_counts(self.source, distributed.gather_objects(self.left_out))
        done = {"run_dir": str(self.run_dir), "steps": self.plan.stop_step}
        return {**done, **self.last, **self.measurements.last, **best, "left_out": left_out}

    def _begin(self) -> None:
        """Measure what is due before the next step, which may have ended a start before this one.

        Raises:
            PreemptedError: on every rank, if one was asked to stop meanwhile.
            RunFailedError: the teacher has fallen, and the guard ends the run.
        """
        progress, due = self.progress, self._due(self.progress.step)
        if self.resumed_at is None:
            self.measurements.carry_over(progress)
            if due.guard:
                self._save()
            self._measure(due._replace(knn=True))
        else:
            self.events.write(progress.step, "resumed", ranks=self.plan.world_size)
            if self.measurements.judge_again(progress):
                self.saver.measured(progress.step, progress.knn_top1, progress.guarded)
            self._measure(self.measurements.missing(progress, due))
        if self.stopping:
            self._preempt()

    @contextmanager
    def _finishing_saves(self) -> Iterator[None]:
        """If an error ends the run, first wait for a checkpoint that is being written.

        The threads of the other ranks still write while those ranks wait for this one. Do not wait
        if a rank is lost, which writes nothing more, or for a second Ctrl-C, which ends at once.
        """
        try:
            yield
        except LostPeerError:
            raise
        except Exception:
            self.watchdog.heartbeat()
            self._report(self.saver.wait(self.watchdog.heartbeat))
            warn_of_old_weights(self.config)
            raise

    def _take_steps(self) -> None:
        """Take steps until the run ends or rolls back to a checkpoint."""
        watch = Stopwatch()
        self.data_wait.restarted()
        steps = self.feed.steps(
            self.progress.step,
            offset=self.progress.data_offset,
            gram_counts=lambda step: self.schedules.at(step).gram_counts,
        )
        pending: deque[_LaunchedStep] = deque()
        for step in range(self.progress.step, self.plan.stop_step):
            self.watchdog.progress(f"waiting for the images of step {step + 1}")
            begin = time.perf_counter()
            batches = next(steps)
            waited = time.perf_counter() - begin
            watch.waited(waited, idle_s=pending[-1].result.idle_s() if pending else math.inf)
            self.watchdog.progress(f"in step {step + 1}")
            for batch in batches:
                self.pending_bad += batch.bad
                self.left_out |= batch.left_out
            now = self.schedules.at(step)
            result = train_step(
                self.feed.prepare(step, batches),
                self.student,
                self.teacher,
                now,
                loss_weights=self.loss_weights,
                stop_asked=self.stop.asked,
                bad_images=len(self.pending_bad),
                saving=self.saver.busy(),
                waited_s=watch.waited_s,
            )
            self.steps_taken += 1
            watch.step_done(self.plan.batch_size)
            pending.append(_LaunchedStep(now, result, batches))
            read_now = self.first_loss_unchecked or any(self._due(step + 1))
            while len(pending) > (0 if read_now or self.stopping else 1):
                launched = pending.popleft()
                if not self._count(launched.result, launched.batches):
                    return
                self._after_step(launched.now, launched.result, watch)
            if self.stopping and step + 1 < self.plan.stop_step:
                self._preempt()

    def _count(self, result: StepMetrics, batches: Sequence[Batch]) -> bool:
        """Count a step, applied or skipped; return false after a rollback to a checkpoint.

        Raises:
            CheckpointError: it is the first after a resume, and its loss jumped.
            NonFiniteError: too many steps in a row were skipped.
        """
        progress, limits = self.progress, self.config.train
        if result.skipped is None:
            if self.first_loss_unchecked:
                progress.require_near(result.loss)
            self.first_loss_unchecked = False
            progress.applied(result.loss)
            return True
        progress.skipped()
        path = dump_bad_step(self.run_dir, progress.step, result, batches, self.source)
        self.events.write(progress.step, "skipped", reason=result.skipped, dump=str(path))
        if self.process.rank == 0:
            log.warning("step %d skipped: %s; see %s", progress.step, result.skipped, path)
        if progress.bad_in_a_row < limits.max_bad_steps:
            return True
        return self._roll_back(result)

    def _roll_back(self, result: StepMetrics) -> bool:
        """Restore the last checkpoint and skip the images of the steps since, if that is allowed.

        Raises:
            NonFiniteError: no rollback is left, or there is no checkpoint.
        """
        old = self.progress
        self._wait_for_save()
        checkpoint = find_checkpoint(self.run_dir, self.watchdog.heartbeat)
        if old.rollbacks >= self.config.train.max_rollbacks or checkpoint is None:
            source = "from the start" if checkpoint is None else f"from {checkpoint.path}"
            self.events.write(old.step, "stopped", reason=result.skipped)
            # Stored targets are of the images of each step, so that none can be skipped.
            skips = self.config.distill.targets is None
            text = (
                f"{old.bad_in_a_row} steps in a row were skipped, the last one step {old.step}:"
                f" {result.skipped}. Their images and losses are in {self.run_dir}/bad_steps. Start"
                f" again to continue {source}, with a lower optim.lr, a smaller optim.clip_grad or"
                " engine.precision=fp32"
                f"{', or with train.max_rollbacks=1 to skip these images' if skips else ''}"
            )
            raise NonFiniteError(as_set_here(text, self.config))
        restore(checkpoint, self.student, self.teacher, self.watchdog.heartbeat)
        self.progress = _progress_of(checkpoint)
        self.progress.data_offset = old.data_offset + old.step - checkpoint.step
        self.progress.rollbacks = old.rollbacks + 1
        self.progress.bad_in_a_row = 0
        self.saved_step = checkpoint.step
        self.metrics.rewind(checkpoint.step)
        self.events.write(old.step, "rolled back", to_step=checkpoint.step)
        if self.process.rank == 0:
            log.warning("rolling back to %s and skipping the images since", checkpoint.path)
        return False

    def _due(self, done: int) -> Due:
        return due_after(done, self.config, self.plan)

    def _after_step(self, now: StepValues, result: StepMetrics, watch: Stopwatch) -> None:
        """Log, watch for a collapse, save and measure k-NN as due; note a request to stop."""
        done = self.progress.step
        due = self._due(done)
        if due.log or done % OBSERVE_EVERY == 0:
            readings = self.collapse.read(now, result)
            if due.log:
                self._record(done, now, result, readings, watch)
            self.collapse.observe(done, readings)
        self.metrics.advance(f"loss {result.loss:.3f}{self.bar_suffix}")
        self._report(self.saver.finished())
        if due.save:
            # Before k-NN, which takes minutes, during which a job may end.
            self._save(save_in_progress=result.saving)
        self._measure(due)
        self.stopping |= result.stop

    def _preempt(self) -> None:
        """Save the last launched step, and end.

        Raises:
            PreemptedError: always, on every rank.
        """
        done = self.progress.step
        self._save_and_wait()
        reason = self.stop.reason or "on another rank"
        self.events.write(done, "preempted", reason=reason)
        self.metrics.close()
        raise PreemptedError(
            f"asked to stop ({reason}): step {done} is saved in {self.run_dir};"
            " the same command goes on from there"
        )

    def _record(
        self,
        done: int,
        now: StepValues,
        result: StepMetrics,
        readings: dict[str, Reading],
        watch: Stopwatch,
    ) -> None:
        """Write a log line, from values that need no further collective."""
        bad = self._count_bad(result.bad_images)
        rates = self._rates(done, watch.lap(result.waited_s))
        self.last["loss"] = result.loss
        values = {
            "epoch": now.epoch,
            "images": done * self.plan.batch_size,
            "loss": result.loss,
            **self._of_targets(result, readings),
            **result.terms,
            "lr": now.lr,
            "weight_decay": now.weight_decay,
            "momentum": now.momentum,
            "teacher_temp": now.teacher_temp,
            **({"local_weight": now.local_weight} if self.loss_weights.local_is_scheduled else {}),
            "grad_norm": float(self.student.grad_norm()),
            **rates,
            "bad_samples": bad,
            "skipped_steps": self.progress.skipped_steps,
            "peak_memory_bytes": peak_memory_bytes(),
            "teacher_bytes": self.teacher.num_bytes(),
        }
        if self.config.crops.mixture:
            crops = run_of_step(self.config, done - 1 + self.progress.data_offset).crops
            values |= {"global_size": crops.global_size, "local_size": crops.local_size}
        if self.config.optim.clip_mode == "per_network":
            norms = self.student.network_grad_norms()
            values |= {f"grad_norm_{network}": norm for network, norm in norms.items()}
        self.metrics.write(done, values)

    def _of_targets(self, result: StepMetrics, readings: dict[str, Reading]) -> dict[str, float]:
        """What the targets of heads were like; nothing without heads."""
        if "class" not in readings:
            return {}
        values = {
            "teacher_entropy": result.teacher_entropy,
            "kl": result.kl,
            "target_mutual_information": readings["class"].information,
            "max_prototype_prob": readings["class"].share,
            "center_norm": float(self.teacher.center.norm()),
        }
        if "patch" in readings:
            values["patch_mutual_information"] = readings["patch"].information
            values["max_patch_prototype_prob"] = readings["patch"].share
        return values

    def _rates(self, done: int, rates: dict[str, float]) -> dict[str, float]:
        """Show the longest wait for data of any rank, and warn if it is too long."""
        self.bar_suffix = f", data wait {rates['data_wait']:.0%}"
        warning = self.data_wait.observe(rates["data_wait"])
        if warning is not None and self.process.rank == 0:
            log.warning("step %d: %s", done, warning)
        return rates

    def _count_bad(self, num_new: int) -> int:
        """Collect unreadable images if any rank found some; return how many there are so far.

        Raises:
            DataError: on every rank, if there are too many.
        """
        if num_new:
            for of_rank in distributed.gather_objects(self.pending_bad):
                self.bad.add(of_rank)
            self.pending_bad.clear()
        self.bad.check(
            max_fraction=self.config.data.max_bad_fraction,
            seen=self.steps_taken * self.plan.batch_size,
            num_images=self.plan.num_images,
        )
        return self.bad.num_occurrences

    def _measure(self, due: Due) -> None:
        """Measure the teacher as due; the numbers reach the checkpoint of this step.

        Raises:
            RunFailedError: on every rank, if the teacher has fallen and the guard ends the run.
        """
        done, progress = self.progress.step, self.progress
        found = self.measurements.take(progress, self.teacher, due)
        self.stopping |= self.measurements.asked_to_stop
        if found and self.saved_step == done:
            self.saver.measured(done, progress.knn_top1, progress.guarded)
        known, ends = progress.guarded, self.config.guard.ends_runs
        if ends and known is not None and known.fall and known.step == done:
            self._wait_for_save()
            self.metrics.close()
            end_at_fall(known, self.config, self.events, self.watchdog.heartbeat)

    def _save(self, *, save_in_progress: bool = False) -> None:
        """Begin to save this step, unless its save has begun already.

        If any rank still works on the save before, all ranks wait for it. `save_in_progress` is
        whether one did when the step began; if none did, the ranks need not ask each other.
        """
        if self.saved_step == self.progress.step:
            return
        since = time.perf_counter()
        if save_in_progress and any(distributed.gather_objects(self.saver.busy())):
            self._wait_for_save()
        self.watchdog.progress(f"copying the checkpoint of step {self.progress.step}")
        about = {
            "config": self.config.model_dump(mode="json"),
            "plan": asdict(self.plan),
            "versions": self.versions,
            "images": self.images,
            "licence": self.licence,
            "progress": asdict(self.progress),
        }
        step = self.progress.step
        self._report(self.saver.begin(step, self.student, self.teacher, about, since=since))
        self.saved_step = self.progress.step

    def _save_and_wait(self) -> None:
        """Save this step and wait until it is on disk and no rank waits for this one.

        Raises:
            RunFailedError: on every rank, if it could not be written.
        """
        if self._wait_for_save() is not None:
            self.saved_step = None  # the save failed: if it was of this step, retry it
        self._save()
        failed = self._wait_for_save()
        self.teacher.wait()
        if failed is not None:
            raise RunFailedError(
                f"step {failed.step} could not be saved: {failed.error}. Earlier checkpoints are"
                f" unchanged; free some space in {self.run_dir} and start again to resume from the"
                " newest"
            )

    def _wait_for_save(self) -> SaveResult | None:
        """Wait until no rank writes or uses rank 0's store; return a failed save of any rank."""
        if self.saved_step is None:
            return None
        step, heartbeat = self.saved_step, self.watchdog.heartbeat
        self.watchdog.progress(f"writing the checkpoint of step {step}")
        wait_for_others = partial(
            self.watchdog.progress, f"waiting for the checkpoint of step {step}"
        )
        on_all_ranks(self.saver.wait_for_own_files, heartbeat, wait_for_others)
        on_first = on_first_rank(self.saver.wait, heartbeat)  # rank 0 completes the checkpoint
        self._report(on_first or self.saver.wait())
        results = distributed.gather_objects(self.saved)  # a single rank may have lost contact
        return next((result for result in results if result and result.error), None)

    def _report(self, result: SaveResult | None) -> None:
        """Log how a save ended; a failed save does not end the run."""
        if result is None:
            return
        self.saved = result
        if self.process.rank != 0:
            return
        if result.error is None:
            log.info("saved %s; training paused for %.2f s", result.path, result.stall_s)
            seconds = {"save_stall_s": result.stall_s, "save_write_s": result.write_s}
            values = {"saved_step": result.step, **seconds, "save_bytes": result.num_bytes}
            self.metrics.write(self.progress.step, values)
        else:
            log.warning("step %d was not saved: %s; training continues", result.step, result.error)
            self.events.write(result.step, "save failed", reason=result.error)


def _progress_of(checkpoint: Checkpoint | None) -> Progress:
    return Progress() if checkpoint is None else checkpoint.progress


def _keep(config: RunConfig, plan: RunPlan) -> Keep:
    rule = config.checkpoint
    every = None if rule.keep_every is None else rule.keep_every * plan.steps_per_epoch
    return Keep(last=rule.keep_last, every_steps=every, best=rule.keep_best)
