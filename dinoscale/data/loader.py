"""Micro-batches of crops for one rank, decoded and augmented in worker processes.

Shape letters: B images per micro-batch, n local crops, C channels.
"""

import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinoscale.data.augmentation.crop_params import Params
from dinoscale.data.augmentation.mixed_sizes import MixedSizes
from dinoscale.data.augmentation.multi_crop import CropArrays, MultiCrop, eval_transform
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.order.sampler import Draws, StepSampler
from dinoscale.data.seeding import Stream, generator
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.shards.stream_readers import StreamSampler
from dinoscale.data.sources.bad_samples import BadSample
from dinoscale.data.sources.left_out import LeftOut
from dinoscale.data.sources.mixture import drawn_sizes, replacement_candidates
from dinoscale.data.sources.source import Source
from dinoscale.data.worker_process import leave_signals_to_parent
from dinoscale.errors import DataError, DinoscaleError, UnavailableError

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 10  # images tried for one place in a batch before the source counts as broken
_PREFETCH = 2  # batches that each worker prepares ahead

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Batch:
    """Crops of the images that one rank takes in one forward.

    Attributes:
        global_crops: uint8 (2, B, H, H, C).
        local_crops: uint8 (n, B, h, h, C).
        gram_crops: of the boxes of the global crops, uint8 (2, B, G, G, C), or none, (0, ...).
        params: what was drawn for each global and local crop, records of `crop_params.PARAMS`
            (2 + n, B).
        sample_ids: int64 (B,), the images as ordered by the sampler.
        bad: unreadable images, each replaced by another one.
        left_out: for a stream: shard -> what was left out, for the shards read to their end.
    """

    global_crops: Tensor
    local_crops: Tensor
    gram_crops: Tensor
    params: Params
    sample_ids: Tensor
    bad: list[BadSample]
    left_out: dict[int, LeftOut] = field(default_factory=dict)

    def pin_memory(self) -> "Batch":
        """Copy the batch to page-locked memory (called by the DataLoader)."""
        return Batch(
            self.global_crops.pin_memory(),
            self.local_crops.pin_memory(),
            self.gram_crops.pin_memory(),
            self.params,
            self.sample_ids.pin_memory(),
            self.bad,
            self.left_out,
        )


def train_batches(
    source: Source,
    multi_crop: MultiCrop | MixedSizes,
    *,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
    num_workers: int,
    quotas: Sequence[int] | None = None,
    stream_readers: int = 8,
    gram_counts: Callable[[int], bool] = lambda _step: True,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield the micro-batches of one rank from step `start_step` to `stop_step`, exclusive.

    A step takes batch_size / (micro_batch_size * world_size) of them. The images of a step and
    their crops are a function of (source, batch_size, seed, step), whatever the number of workers
    and ranks, the accumulation and the first step. An unreadable image is replaced by another one
    of the same source, drawn from (seed, repeat, image, attempt) and cropped as the image itself
    would have been. The workers start at the call, not at the first batch, and serve the whole run.

    Args:
        source: the images.
        multi_crop: the augmentation, or one for each of several sizes, drawn for each step.
        batch_size: images of one optimizer step over all ranks.
        micro_batch_size: B, images of this rank in one forward.
        seed: seeds order and augmentation, >= 0.
        rank: rank of this process.
        world_size: number of ranks.
        start_step: first optimizer step, >= 0.
        stop_step: end of the run, exclusive.
        num_workers: worker processes; 0 decodes in this process.
        quotas: draws from each source of a mixture in an epoch; None draws every image once.
        stream_readers: for a stream: lanes for each micro-batch of a step; see `StreamSampler`.
        gram_counts: whether a step needs the Gram crops of an augmentation that cuts some. Its
            other crops are those of a run without: a large JPEG file may be decoded smaller.
        pin_memory: hand out page-locked memory.

    Raises:
        DataError: ten images in a row are unreadable, or a worker failed.
        UnavailableError: storage or the network failed for minutes.
        ValueError: the numbers are inconsistent (see `StepSampler`).
    """
    sizes = {
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "world_size": world_size,
        "seed": seed,
    }
    quotas = quotas or drawn_sizes(source)
    if isinstance(source, StreamSource):
        sampler: StepSampler = StreamSampler(
            source.blocks, quota=quotas[0], lanes=stream_readers, **sizes
        )
        of_rank = stream_readers * sampler.accumulation_steps
        num_workers = _num_sharing_workers(of_rank, num_workers)
        source = source.serving(lanes=of_rank // max(num_workers, 1))
    else:
        sampler = StepSampler(sizes=drawn_sizes(source), quotas=quotas, **sizes)
    if isinstance(multi_crop, MultiCrop):
        multi_crop = MixedSizes([multi_crop], [1.0])
    crops = _TrainCrops(source, multi_crop, seed=seed)
    if not 0 <= start_step <= stop_step:
        raise ValueError(f"need 0 <= start_step <= stop_step, got {start_step}, {stop_step}")
    requests = _Requests(sampler, range(start_step, stop_step), gram_counts, rank=rank)
    return map_in_workers(crops, requests, num_workers=num_workers, pin_memory=pin_memory)


def _num_sharing_workers(lanes: int, num_workers: int) -> int:
    """The most workers that share the lanes of a rank equally: each lane stays with one worker."""
    most = min(lanes, num_workers)
    workers = next((count for count in range(most, 0, -1) if lanes % count == 0), 0)
    if workers < num_workers:
        log.warning(
            "%d stream readers of a rank (data.stream_readers x micro-batches) cannot be shared by"
            " %d workers; %d are used. Set data.stream_readers to a multiple of data.num_workers",
            *(lanes, num_workers, workers),
        )
    return workers


@dataclass(frozen=True)
class Failure:
    """A worker's error, returned as a value: torch would wrap an exception in a traceback."""

    message: str
    kind: type[DataError] = DataError


class _Request(NamedTuple):
    """The images of a micro-batch, the step that it belongs to, and whether Gram crops are cut."""

    step: int
    draws: Draws
    with_gram: bool


class _Requests:
    """One rank's micro-batches, in order."""

    def __init__(
        self, sampler: StepSampler, steps: range, gram_counts: Callable[[int], bool], *, rank: int
    ):
        self._sampler, self._rank = sampler, rank
        self._steps, self._gram_counts = steps, gram_counts

    def __iter__(self) -> Iterator[_Request]:
        sampler = self._sampler
        for step in self._steps:
            with_gram = self._gram_counts(step)
            for micro_batch in range(sampler.accumulation_steps):
                draws = sampler.micro_batch(step, micro_batch=micro_batch, rank=self._rank)
                yield _Request(step, draws, with_gram)


class _TrainCrops(Dataset[Batch | Failure]):
    """_Request -> Batch; runs in the workers."""

    def __init__(self, source: Source, sizes: MixedSizes, *, seed: int):
        self._source = source
        self._sizes = sizes
        self._seed = seed

    def __getitem__(self, request: _Request) -> Batch | Failure:
        try:
            return self._batch(request)
        except Exception as error:
            return failure(error)

    def _batch(self, request: _Request) -> Batch:
        draws, multi_crop = request.draws, self._sizes.of_step(request.step, seed=self._seed)
        crops = multi_crop.arrays(count=len(draws.ids), with_gram=request.with_gram)
        bad: list[BadSample] = []
        pairs = zip(draws.ids.tolist(), draws.repeats.tolist(), strict=True)
        for place, (sample, repeat) in enumerate(pairs):
            bad += self._crop_image(multi_crop, crops, place, sample=sample, repeat=repeat)
        return Batch(
            torch.from_numpy(crops.global_crops),
            torch.from_numpy(crops.local_crops),
            torch.from_numpy(crops.gram_crops),
            crops.params,
            torch.from_numpy(draws.ids),
            bad,
            self._source.take_left_out() if isinstance(self._source, StreamSource) else {},
        )

    def _crop_image(
        self, multi_crop: MultiCrop, into: CropArrays, place: int, *, sample: int, repeat: int
    ) -> list[BadSample]:
        """Crop an image or its first readable replacement; return the unreadable ones."""
        failed: list[tuple[int, BadSampleError]] = []
        others = replacement_candidates(self._source, sample)
        for attempt in range(_MAX_ATTEMPTS):
            candidate = sample
            if attempt:
                rng = generator(self._seed, Stream.REPLACEMENT, repeat, sample, attempt)
                candidate = int(rng.integers(others.start, others.stop))
            try:
                picture = self._source.picture(candidate)
                multi_crop(picture, into, place, seed=self._seed, epoch=repeat, sample=sample)
            except BadSampleError as error:
                failed.append((candidate, error))
            else:
                return [
                    BadSample(e.path, e.reason, i, candidate, repeat, e.unavailable)
                    for i, e in failed
                ]
        examples = "".join(f"\n  {error.path}: {error.reason}" for _, error in failed[:3])
        kind = UnavailableError if all(error.unavailable for _, error in failed) else DataError
        raise kind(
            f"{_MAX_ATTEMPTS} images in a row are unreadable:{examples}\n"
            "Check the folder or shards and their disk."
        )


def failure(error: Exception) -> Failure:
    """What a worker returns in place of its result."""
    log.debug("the input pipeline failed", exc_info=error)
    if isinstance(error, DinoscaleError):
        unavailable = isinstance(error, UnavailableError)
        return Failure(str(error), UnavailableError if unavailable else DataError)
    return Failure(f"the input pipeline failed: {type(error).__name__}: {error}")


def eval_batches(
    source: Source,
    *,
    resize: int,
    crop: int,
    batch_size: int,
    num_workers: int,
    ids: NDArray[np.int64] | None = None,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield all readable images of a source in order, prepared for evaluation.

    Args:
        source: the images.
        resize: short side after resizing, in pixels.
        crop: side of the centre crop, in pixels.
        batch_size: images of one batch, >= 1; unreadable images make batches smaller.
        num_workers: worker processes; 0 decodes in this process.
        ids: numbers of the images to take, e.g. the share of a rank; None takes all.
        pin_memory: hand out page-locked memory.

    Yields:
        Images uint8 (N, C, crop, crop), labels int64 (N,) (-1 where unknown), numbers int64 (N,).

    Raises:
        DataError: a worker failed.
        UnavailableError: a file cannot be read, which says nothing about its content.
    """
    ids = np.arange(len(source), dtype=np.int64) if ids is None else ids
    if batch_size < 1:
        raise ValueError(f"need batch_size >= 1, got {batch_size}")
    requests = [ids[first : first + batch_size] for first in range(0, len(ids), batch_size)]
    images = _EvalImages(source, resize=resize, crop=crop)
    labels = source.labels
    num_bad = 0
    for batch in map_in_workers(images, requests, num_workers=num_workers, pin_memory=pin_memory):
        for error in batch.bad:
            log.warning("left out an unreadable image: %s", error)
        num_bad += len(batch.bad)
        if len(batch.ids):
            numbers = batch.ids.numpy()
            known = np.full(len(numbers), -1) if labels is None else labels[numbers]
            yield batch.images, torch.from_numpy(known.astype(np.int64)), batch.ids
    if num_bad:
        log.warning("left out %d of %d images as unreadable", num_bad, len(ids))


@dataclass(frozen=True, eq=False)
class _EvalBatch:
    """Readable images (N, C, crop, crop), their numbers (N,), and the errors of the others."""

    images: Tensor
    ids: Tensor
    bad: list[str]

    def pin_memory(self) -> "_EvalBatch":
        return _EvalBatch(self.images.pin_memory(), self.ids, self.bad)


class _EvalImages(Dataset[_EvalBatch | Failure]):
    """Numbers of images -> _EvalBatch; runs in the workers."""

    def __init__(self, source: Source, *, resize: int, crop: int):
        self._source = source
        self._resize = resize
        self._crop = crop

    def __getitem__(self, ids: NDArray[np.int64]) -> _EvalBatch | Failure:
        try:
            return self._batch(ids)
        except Exception as error:
            return failure(error)

    def _batch(self, ids: NDArray[np.int64]) -> _EvalBatch:
        images: list[NDArray[np.uint8]] = []
        readable: list[int] = []
        bad: list[str] = []
        for number in ids.tolist():
            try:
                pixels = self._source.picture(number).pixels()
            except UnavailableError:  # without it, another set would be measured
                raise
            except BadSampleError as error:
                bad.append(str(error))
                continue
            images.append(eval_transform(pixels, resize=self._resize, crop=self._crop))
            readable.append(number)
        kept = torch.from_numpy(np.stack(images)) if images else torch.empty(0, dtype=torch.uint8)
        return _EvalBatch(kept, torch.tensor(readable, dtype=torch.int64), bad)


def map_in_workers(
    dataset: Dataset[T | Failure],
    requests: Iterable[object],
    *,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[T]:
    """Map requests to results in their order, with one set of workers for all of them.

    Args:
        dataset: maps a request to its result, or to the failure that ends the iteration.
        requests: each is a whole batch.
        num_workers: worker processes, which start now; 0 works in this process.
        pin_memory: hand out page-locked memory.

    Yields:
        The result of each request.

    Raises:
        DataError: a worker failed or died.
        UnavailableError: a worker failed because storage or the network did, for minutes.
    """
    with warnings.catch_warnings():  # more workers than cores: the caller knows both numbers
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[T | Failure] = DataLoader(
            dataset,
            sampler=requests,
            batch_size=None,  # a request is a whole batch
            collate_fn=_unchanged,
            num_workers=num_workers,
            prefetch_factor=_PREFETCH if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # otherwise it draws from the run's own generator
        )
        return _results(iter(loader))


def _results(loaded: Iterator[T | Failure]) -> Iterator[T]:
    workers = getattr(loaded, "_workers", ())  # private to torch's iterator; absent with 0 workers
    try:
        while True:
            try:
                result = next(loaded)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                raise DataError(_worker_died(error)) from error
            if isinstance(result, Failure):
                raise result.kind(result.message)
            yield result
    finally:
        del loaded  # ends the workers now, even while a traceback holds this frame
        for worker in workers:  # a worker that waits for storage ignores torch's SIGTERM
            worker.kill()


def _worker_died(error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"a data loading worker ended unexpectedly ({first}). Usually memory ran out: lower "
        "data.num_workers, or give a container more shared memory (docker: --shm-size)."
    )


def _unchanged(batch: T) -> T:
    return batch


def _start_worker(worker: int) -> None:
    """Use one thread, and ignore signals: the current step still needs its images."""
    torch.set_num_threads(1)
    leave_signals_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log.debug("data worker %d is process %d", worker, os.getpid())


def _end_with_parent() -> None:
    """Exit with the parent. Torch checks too late for a worker whose batches nobody takes."""
    parent, parent_pid = multiprocessing.parent_process(), os.getppid()
    while os.getppid() == parent_pid and (parent is None or parent.is_alive()):
        time.sleep(1.0)
    os._exit(1)
