"""The real step of a run, from the loader to the teacher's average, with a timeline."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.data.decoding.decode import Picture
from dinoscale.data.loader import Batch
from dinoscale.data.sources.source import Source
from dinoscale.engine.build import build_pair, schedules_of
from dinoscale.engine.schedules import StepValues
from dinoscale.engine.step import MicroBatch, train_step
from dinoscale.errors import RunFailedError
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
from dinoscale.training.feed import Feed

_NOISE_SIDE = 256  # pixels


@dataclass(frozen=True)
class Noise:
    """Pictures of random pixels, for a run that names no images."""

    count: int
    channels: int
    labels: None = None
    class_names: None = None

    def __len__(self) -> int:
        return self.count

    def path(self, index: int) -> str:
        """A name for messages."""
        return f"random picture {index}"

    def picture(self, index: int) -> Picture:
        """Some pixels, (256, 256, C)."""
        shape = (_NOISE_SIDE, _NOISE_SIDE, self.channels)
        pixels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
        return Picture.of(pixels, self.path(index))


class OurStep:
    """Student, teacher and their input; every call takes one optimizer step.

    Attributes:
        now: the scheduled numbers of every step.
        crops: the last micro-batch of the last step, on the device, one tensor (B, C, H, W) a view.
    """

    def __init__(self, config: RunConfig, plan: RunPlan, process: Process, source: Source) -> None:
        """Build the pair as a run does; with `Noise`, one batch is cut now and used again."""
        self._temp, self._device = config.dino.student_temp, process.device
        self.now = _typical_values(config, plan)
        self._timeline = Timeline(process.device)
        if config.engine.offload_optimizer and process.device.type == "cuda":
            torch.set_num_threads(cores_per_rank(process.local_world_size))  # as in a run
        student, teacher = build_pair(config, plan)
        backbone = student.network.backbone
        self._student, self._teacher = watch_pair(student, teacher, self._timeline)
        self._feed = Feed(config, plan, process, source, depth=backbone.depth)
        self._batches = _without_end(self._feed, drawn_once=isinstance(source, Noise))
        self.crops: list[Tensor] = []

    def __call__(self) -> dict[str, float]:
        """Wait for images, move and finish them, train; seconds by part.

        Raises:
            RunFailedError: the loss is not finite.
        """
        self._timeline.mark(DATA)
        batches = next(self._batches)
        self._timeline.mark(OTHER)
        self.crops = []  # which the first micro-batch needs the memory of
        result = train_step(
            self._made(batches), self._student, self._teacher, self.now, student_temp=self._temp
        )
        self._teacher.wait()  # a profiler that begins or ends amid a collective crashes
        if result.skipped is not None:
            raise RunFailedError(f"a step was not taken: {result.skipped}")
        return self._timeline.take()

    def _made(self, batches: Sequence[Batch]) -> Iterator[MicroBatch]:
        """The micro-batches, each when the step asks for it, as in a run."""
        micro_batches = self._feed.prepare(0, map(self._sent, batches))
        for _ in batches[:-1]:
            yield self._next(micro_batches)
        last = self._next(micro_batches)
        self.crops = _views(last)
        yield last

    def _next(self, micro_batches: Iterator[MicroBatch]) -> MicroBatch:
        """Make one; what it takes is marked as the input's."""
        micro_batch = next(micro_batches)
        self._timeline.mark(OTHER)
        return micro_batch

    def close(self) -> None:
        """Free the memory; the object is not to be used afterwards."""
        self._student.close()

    def _sent(self, batch: Batch) -> Batch:
        self._timeline.mark(TO_DEVICE)
        sent = Batch(
            batch.global_crops.to(self._device, non_blocking=True),
            batch.local_crops.to(self._device, non_blocking=True),
            batch.params,
            batch.sample_ids,
            batch.bad,
        )
        self._timeline.mark(AUGMENTATION)
        return sent


def _typical_values(config: RunConfig, plan: RunPlan) -> StepValues:
    """The scheduled numbers in the middle of the run: every part of the step at work."""
    return schedules_of(config, plan).at(plan.total_steps // 2)


def _without_end(feed: Feed, *, drawn_once: bool) -> Iterator[list[Batch]]:
    if drawn_once:
        yield from itertools.repeat(next(feed.steps(0, offset=0)))
    while True:
        yield from feed.steps(0, offset=0)


def _views(batch: MicroBatch) -> list[Tensor]:
    return [*batch.global_crops.unbind(), *batch.local_crops.unbind()]
