"""A whole run: build everything in the order the data flows, then loop."""

import itertools
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dinoscale import distributed, rundir
from dinoscale.checkpoint.load import EMA, MASTER, Checkpoint, newest
from dinoscale.checkpoint.save import save
from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan, resolve
from dinoscale.data.augment import MultiCrop
from dinoscale.data.bad_samples import BadSampleLog
from dinoscale.data.loader import Batch, train_batches
from dinoscale.data.sources import Source, open_source
from dinoscale.distributed import Process
from dinoscale.engine.build import build_pair, schedules_of
from dinoscale.engine.depth_noise import depth_uniforms
from dinoscale.engine.step import MicroBatch, StepMetrics, train_step
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import ConfigError, RunFailedError
from dinoscale.evaluate.features import normalize_images
from dinoscale.hooks.collapse import OBSERVE_EVERY, CollapseMonitor, Reading, read_targets
from dinoscale.hooks.events import Events
from dinoscale.hooks.metrics import Metrics, Stopwatch, peak_memory_bytes
from dinoscale.hooks.probe import Probe
from dinoscale.models.vit import stochastic_depth_keep
from dinoscale.schedules import StepValues

log = logging.getLogger(__name__)


def train(config: RunConfig, process: Process) -> dict[str, Any]:
    """Pre-train as `config` says; all ranks call it after `distributed.start`.

    Returns:
        JSON-able summary: run_dir, steps, last loss and k-NN.

    Raises:
        DinoscaleError: on every rank.
    """
    if config.data.train is None:
        raise ConfigError("data.train: give the images, for example data.train=/path/to/folder")
    source = distributed.together(lambda: open_source(str(config.data.train)))
    plan = resolve(config, world_size=process.world_size, num_images=len(source))
    checkpoint = distributed.together(lambda: _checkpoint_to_resume(config))
    student, teacher = build_pair(config, plan)
    if checkpoint is not None:
        restore(checkpoint, student, teacher)
    probe = distributed.together(lambda: Probe(config)) if config.eval.train else None
    run_dir = Path(config.run_dir)
    if process.rank == 0:
        _announce(config, plan, process, student, teacher, resumed_from=checkpoint)
    distributed.together(lambda: process.rank == 0 and rundir.prepare(config, student))
    run = _Run(config, plan, process, run_dir, source, student, teacher, probe)
    return run.loop(start_step=checkpoint.step if checkpoint is not None else 0)


def restore(checkpoint: Checkpoint, student: Student, teacher: Teacher) -> None:
    """Set student, optimizer, teacher and center to a checkpoint's, at any world size and stage.

    Raises:
        CheckpointError: on every rank: another model, or parts are missing.
    """
    distributed.together(lambda: checkpoint.require(student.shapes))
    student.restore_master(lambda *at: checkpoint.read(MASTER, *at))
    student.restore_optimizer(checkpoint.read, checkpoint.state["optimizer_steps"])
    teacher.restore(lambda *at: checkpoint.read(EMA, *at), checkpoint.shared["center"])
    for owner, buffers in (("student", student.buffers()), ("teacher", teacher.buffers())):
        for name, value in checkpoint.buffers(owner).items():
            buffers[name].copy_(value)


def _announce(
    config: RunConfig,
    plan: RunPlan,
    process: Process,
    student: Student,
    teacher: Teacher,
    *,
    resumed_from: Checkpoint | None,
) -> None:
    """Say in a few lines what is about to happen."""
    parameters = sum(math.prod(shape) for shape in student.shapes.values())
    log.info(
        "%s: %d images, %d epochs of %d steps; step = %d images = %d ranks x %d x %d micro-batches",
        config.data.train,
        plan.num_images,
        config.train.epochs,
        plan.steps_per_epoch,
        plan.batch_size,
        plan.world_size,
        plan.micro_batch_size,
        plan.accumulation_steps,
    )
    log.info(
        "%s, %.2f M parameters with head; ZeRO stage %d, %s; teacher %.1f MB per rank",
        config.model.backbone,
        parameters / 1e6,
        config.engine.zero_stage,
        config.engine.precision,
        teacher.num_bytes() / 1e6,
    )
    cores = os.cpu_count() or 1
    workers = config.data.num_workers * process.local_world_size
    if workers > cores:
        log.warning("%d data workers share %d cores; lower data.num_workers", workers, cores)
    if resumed_from is not None:
        left = plan.stop_step - resumed_from.step
        log.info("going on from %s, %d steps left", resumed_from.path, max(left, 0))


def _checkpoint_to_resume(config: RunConfig) -> Checkpoint | None:
    path = newest(Path(config.run_dir))
    if path is None:
        return None
    if not config.resume:
        raise ConfigError(
            f"run_dir: {config.run_dir} already holds a run and resume is false;"
            " choose another run_dir, or delete that one"
        )
    return Checkpoint(path)


class _Run:
    """The loop and what it carries."""

    def __init__(
        self,
        config: RunConfig,
        plan: RunPlan,
        process: Process,
        run_dir: Path,
        source: Source,
        student: Student,
        teacher: Teacher,
        probe: Probe | None,
    ) -> None:
        self.config, self.plan, self.process, self.run_dir = config, plan, process, run_dir
        self.source, self.student, self.teacher, self.probe = source, student, teacher, probe
        self.schedules = schedules_of(config, plan)
        self.bad = BadSampleLog(run_dir / "bad_samples.jsonl") if process.rank == 0 else None
        self.events = Events(run_dir, active=process.rank == 0)
        self.collapse = CollapseMonitor(
            num_prototypes=config.head.num_prototypes,
            student_temp=config.dino.student_temp,
            center_momentum=config.dino.center_momentum,
            warmup_steps=plan.warmup_steps,
            freeze_steps=plan.freeze_last_layer_steps,
        )
        self.pending_bad: list[Any] = []
        self.last: dict[str, float] = {}

    def loop(self, *, start_step: int) -> dict[str, Any]:
        config, plan = self.config, self.plan
        stop_step = plan.stop_step
        self.metrics = Metrics(
            self.run_dir,
            active=self.process.rank == 0,
            start_step=start_step,
            total_steps=plan.total_steps,
            wandb_project=config.log.wandb_project if config.log.wandb else None,
            config=config.model_dump(),
        )
        self.start_step = start_step
        if start_step == 0:
            self._probe(0)
        watch = Stopwatch()
        steps = self._steps(start_step, stop_step)
        for step in range(start_step, stop_step):
            begin = time.perf_counter()
            batches = next(steps)
            watch.waited(time.perf_counter() - begin)
            now = self.schedules.at(step)
            micro_batches = [self._prepare(step, m, batch) for m, batch in enumerate(batches)]
            result = train_step(
                micro_batches,
                self.student,
                self.teacher,
                now,
                student_temp=config.dino.student_temp,
            )
            watch.step_done(plan.batch_size)
            done = step + 1
            is_logged = done % config.log.every_steps == 0 or done == stop_step
            if is_logged or done % OBSERVE_EVERY == 0:
                reading = self._read(now, result)
                if is_logged:
                    self._record(done, now, result, reading, watch)
                self._watch(done, reading)
            self.metrics.advance(f"loss {result.loss:.3f}")
            self._after_step(done, is_last=done == stop_step)
        self.metrics.close()
        return {"run_dir": str(self.run_dir), "steps": stop_step, **self.last}

    def _steps(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """The micro-batches of this rank, step by step."""
        config, plan = self.config, self.plan
        batches = train_batches(
            self.source,
            MultiCrop(**config.crops.model_dump(), **config.augment.model_dump()),
            batch_size=plan.batch_size,
            micro_batch_size=plan.micro_batch_size,
            seed=config.seed,
            rank=self.process.rank,
            world_size=plan.world_size,
            start_step=start_step,
            stop_step=stop_step,
            num_workers=config.data.num_workers,
            pin_memory=self.process.device.type == "cuda",
        )
        for _ in range(start_step, stop_step):
            yield list(itertools.islice(batches, plan.accumulation_steps))

    def _prepare(self, step: int, micro_batch: int, batch: Batch) -> MicroBatch:
        """Move one micro-batch to the device, normalise it, draw its stochastic depth."""
        self.pending_bad += batch.bad
        global_crops = self._normalised(batch.global_crops)
        local_crops = self._normalised(batch.local_crops)
        return MicroBatch(global_crops, local_crops, self._keep(step, micro_batch))

    def _normalised(self, crops: Tensor) -> Tensor:
        """uint8 (V, B, C, H, W) -> float32 on the device, (x / 255 - mean) / std."""
        moved = crops.to(self.process.device, non_blocking=True)
        return normalize_images(moved, mean=self.config.data.mean, std=self.config.data.std)

    def _keep(self, step: int, micro_batch: int) -> Tensor | None:
        rate, plan = self.config.model.drop_path_rate, self.plan
        if not rate:
            return None
        slot = micro_batch * plan.world_size + self.process.rank
        uniforms = depth_uniforms(
            seed=self.config.seed,
            step=step,
            first_image=slot * plan.micro_batch_size,
            images=plan.micro_batch_size,
            crops=2 + self.config.crops.num_local,
            depth=self.student.network.backbone.depth,
        )
        return stochastic_depth_keep(uniforms, drop_path_rate=rate).to(self.process.device)

    def _read(self, now: StepValues, result: StepMetrics) -> Reading:
        return read_targets(
            self.teacher.mean_target,
            loss=result.loss,
            teacher_entropy=result.teacher_entropy,
            teacher_temp=now.teacher_temp,
        )

    def _watch(self, done: int, reading: Reading) -> None:
        """Warn of a collapse, or end the run; all ranks read the same numbers."""
        alarm = self.collapse.observe(done, reading)
        if alarm is None:
            return
        self.events.write(done, "collapse", kind=alarm.kind, text=alarm.text)
        if self.config.train.stop_on_collapse:
            raise RunFailedError(f"step {done}: {alarm.text} (train.stop_on_collapse)")
        if self.process.rank == 0:
            log.warning("step %d: %s", done, alarm.text)

    def _record(
        self, done: int, now: StepValues, result: StepMetrics, reading: Reading, watch: Stopwatch
    ) -> None:
        """Write a log line; collective, because bad samples of all ranks are counted."""
        bad = self._count_bad(done)
        self.last["loss"] = result.loss
        values = {
            "epoch": now.epoch,
            "images": done * self.plan.batch_size,
            "loss": result.loss,
            "teacher_entropy": result.teacher_entropy,
            "kl": result.kl,
            "target_information": reading.information,
            "target_share": reading.share,
            "lr": now.lr,
            "weight_decay": now.weight_decay,
            "momentum": now.momentum,
            "teacher_temp": now.teacher_temp,
            "grad_norm": float(self.student.grad_norm()),
            "center_norm": float(self.teacher.center.norm()),
            **watch.lap(),
            "bad_samples": bad,
            "peak_memory_bytes": peak_memory_bytes(),
            "teacher_bytes": self.teacher.num_bytes(),
        }
        self.metrics.write(done, values)

    def _count_bad(self, done: int) -> int:
        """Collect unreadable images of all ranks; stop the run when there are too many."""
        found = [sample for rank in distributed.gather_objects(self.pending_bad) for sample in rank]
        self.pending_bad.clear()

        def check() -> int:
            if self.bad is None:
                return 0
            self.bad.add(found)
            self.bad.check(
                max_fraction=self.config.data.max_bad_fraction,
                seen=(done - self.start_step) * self.plan.batch_size,
                num_images=self.plan.num_images,
            )
            return self.bad.num_occurrences

        return distributed.together(check)

    def _after_step(self, done: int, *, is_last: bool) -> None:
        """At the end of an epoch and of the run: k-NN, checkpoint."""
        epoch, remainder = divmod(done, self.plan.steps_per_epoch)
        if not is_last and remainder:
            return
        if is_last or epoch % self.config.eval.every_epochs == 0:
            self._probe(done)
        if is_last or epoch % self.config.checkpoint.every_epochs == 0:
            self._save(done)

    def _probe(self, done: int) -> None:
        if self.probe is None:
            return
        top1 = self.probe.measure(self.teacher.plain_network().backbone, self.process.device)
        self.last["knn_top1"] = top1
        self.metrics.write(done, {"images": done * self.plan.batch_size, "knn_top1": top1})
        self.metrics.say(f"step {done}: k-NN top-1 of the teacher {top1:.1f} %")

    def _save(self, done: int) -> None:
        save(
            self.run_dir,
            step=done,
            student=self.student,
            teacher=self.teacher,
            about={
                "config": self.config.model_dump(mode="json"),
                "plan": asdict(self.plan),
                "versions": rundir.versions(),
            },
            keep_last=self.config.checkpoint.keep_last,
        )
