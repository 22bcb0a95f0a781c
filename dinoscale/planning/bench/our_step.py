"""The real step of a run, from the loader to the EMA of the teacher, with a timeline."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.data.decoding.decode import Picture
from dinoscale.data.loader import Batch
from dinoscale.data.sources.source import Source
from dinoscale.engine.build import build_pair, loss_weights_of, schedules_of
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.engine.schedules import StepValues
from dinoscale.engine.step import train_step
from dinoscale.errors import ConfigError, RunFailedError
from dinoscale.planning.bench.timeline import (
    AUGMENTATION,
    DATA,
    OTHER,
    TO_DEVICE,
    Timeline,
    watch_pair,
)
from dinoscale.runtime.cores import cores_per_rank
from dinoscale.runtime.launcher_env import Process
from dinoscale.training.feed import Feed, MicroBatches

_NOISE_SIDE = 256  # pixels


@dataclass(frozen=True)
class RandomPictures:
    """A source of random pixels, for a run without data.train."""

    count: int
    channels: int
    labels: None = None
    class_names: None = None

    def __len__(self) -> int:
        return self.count

    def path(self, index: int) -> str:
        """The name of a picture in messages."""
        return f"random picture {index}"

    def picture(self, index: int) -> Picture:
        """Random pixels, (256, 256, C)."""
        shape = (_NOISE_SIDE, _NOISE_SIDE, self.channels)
        pixels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
        return Picture.of(pixels, self.path(index))


class OurStep:
    """Student, teacher and their input; every call takes one optimizer step.

    Attributes:
        now: the scheduled values, the same in every step.
        crops: the last micro-batch that was made, on the device, a tensor (B, C, H, W) per view.
    """

    def __init__(self, config: RunConfig, plan: RunPlan, process: Process, source: Source) -> None:
        """Build the pair as a run does; `RandomPictures` are cut once and used in every step.

        Raises:
            ConfigError: targets are stored, which are of other images.
        """
        if config.distill.targets is not None:
            raise ConfigError(
                "distill.targets: these are of the images of a run's steps, and others are "
                "measured here; give distill.teacher"
            )
        self._weights, self._device = loss_weights_of(config), process.device
        self.now = _typical_values(config, plan)
        self._timeline = Timeline(process.device)
        if config.engine.offload_optimizer and process.device.type == "cuda":
            torch.set_num_threads(cores_per_rank(process.local_world_size))  # as in a run
        student, teacher = build_pair(config, plan)
        if teacher.gram is not None:
            teacher.gram.refresh(teacher.ema)  # as late in the run
        backbone = student.network.backbone
        self._student, self._teacher = watch_pair(student, teacher, self._timeline)
        self._feed = Feed(config, plan, process, source, depth=backbone.depth)
        self._batches = _endless(self._feed, repeat_first=isinstance(source, RandomPictures))
        self.crops: list[Tensor] = []

    def __call__(self) -> dict[str, float]:
        """Load images, move and augment them, train; returns seconds by part.

        Raises:
            RunFailedError: the loss is not finite.
        """
        self._timeline.mark(DATA)
        batches = next(self._batches)
        self._timeline.mark(OTHER)
        result = train_step(
            MicroBatches(len(batches), lambda index: self._made(index, batches[index])),
            self._student,
            self._teacher,
            self.now,
            loss_weights=self._weights,
        )
        self._teacher.wait()  # a profiler that starts or stops during a collective crashes
        if result.skipped is not None:
            raise RunFailedError(f"a step was not taken: {result.skipped}")
        return self._timeline.take()

    def _made(self, index: int, batch: Batch) -> MicroBatch:
        """A micro-batch, made when the step asks for it, as in a run; its time is the input's."""
        with self._timeline.interrupted():  # by Sinkhorn-Knopp amid the teacher's part
            self.crops = []  # frees memory for this one
            micro_batch = self._feed.finish(0, index, self._sent(batch))
            self.crops = _views(micro_batch)
        return micro_batch

    def close(self) -> None:
        """Free the memory; do not use the object afterwards."""
        self._student.close()

    def _sent(self, batch: Batch) -> Batch:
        self._timeline.mark(TO_DEVICE)
        sent = Batch(
            batch.global_crops.to(self._device, non_blocking=True),
            batch.local_crops.to(self._device, non_blocking=True),
            batch.gram_crops.to(self._device, non_blocking=True),
            batch.params,
            batch.sample_ids,
            batch.bad,
        )
        self._timeline.mark(AUGMENTATION)
        return sent


def _typical_values(config: RunConfig, plan: RunPlan) -> StepValues:
    """The scheduled values in the middle of the run, where every part of the step is active."""
    return schedules_of(config, plan).at(plan.total_steps // 2).with_gram()


def _endless(feed: Feed, *, repeat_first: bool) -> Iterator[list[Batch]]:
    if repeat_first:
        yield from itertools.repeat(next(feed.steps(0, offset=0)))
    while True:
        yield from feed.steps(0, offset=0)


def _views(batch: MicroBatch) -> list[Tensor]:
    return [*batch.global_crops.unbind(), *batch.local_crops.unbind()]
