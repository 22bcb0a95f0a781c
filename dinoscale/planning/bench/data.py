"""How fast this machine can feed a run, part by part, and which part limits it.

The parts are the run's own: its images, sizes, micro-batch and loader. Rates are images per second.
The work of a data worker is measured on one core while all others do the same, because cores share
caches, memory and clocks, and two logical cores are often one physical core.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dinoscale.config import RunConfig, split_batch
from dinoscale.data.augmentation.multi_crop import MultiCrop
from dinoscale.data.decoding.decode import BadSampleError, Picture
from dinoscale.data.loader import Batch, train_batches
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.features import find_device
from dinoscale.planning.bench.budget import largest_size, say
from dinoscale.planning.bench.busy import busy
from dinoscale.runtime.cores import available_cores
from dinoscale.training.feed import finish_batch, finish_gram_crops, multi_crop_of, open_images

_MAX_STEPS = 2**31  # the time limit ends the loader first
_PREFETCHED = 2  # batches that each worker has ready before the clock starts
_PARTS = 4  # measured besides the loader; five with a transfer
_CPU_BATCH = 16  # most images if the CPU trains: rates are per image, and time is short
_TRIES = 10  # images tried for each one needed
_GOOD_SHARE = 0.7  # of the cores' expected rate; below it, something slows the workers down
_HALF = 0.5


@dataclass(frozen=True)
class Rates:
    """Images per second of each part.

    Attributes:
        read_decode: one core, while all are busy, reads files and decodes them at full size.
        crops: one core, while all are busy, cuts and resizes the crops of decoded pictures.
        worker: one core, while all are busy, does both as in the loader, which decodes large JPEG
            files at a smaller size.
        transfer: from page-locked memory to the accelerator; None on a CPU.
        device: color jitter and normalization on the training device.
        loader: the real loader and the device part together, end to end.
    """

    read_decode: float
    crops: float
    worker: float
    transfer: float | None
    device: float
    loader: float


def bench_data(config: RunConfig, *, gpu_images_per_s: float, seconds: float) -> dict[str, Any]:
    """Measure the input of a run on one rank; sentences go to stderr.

    Args:
        config: of the run.
        gpu_images_per_s: images per second that one GPU trains, to compute the workers it needs.
        seconds: for each part.

    Returns:
        JSON-able: the rates, the slowest part, and the workers that such a GPU needs.

    Raises:
        ConfigError: data.train is not set, or a number is out of range.
        DataError: the images cannot be opened, or too few can be read.
    """
    if not (0 < gpu_images_per_s < math.inf and 0 < seconds <= 3600):
        raise ConfigError(
            "need --gpu-images-per-s > 0 and --seconds > 0, at most 3600; got"
            f" {gpu_images_per_s} and {seconds}"
        )
    config = largest_size(config)
    source = open_images(config)
    size = min(split_batch(config, world_size=1).micro_batch_size, len(source))
    device, cores = find_device(None), available_cores()
    if device.type == "cpu":  # which takes a batch one image after the other
        size = min(size, _CPU_BATCH)
    say(
        f"measuring batches of {size} images: about {_PARTS * seconds:.0f} s for the parts, with"
        f" all {cores} available cores busy for those of data workers, then {seconds:g} s for the"
        f" loader, once its {config.data.num_workers} workers have {_PREFETCHED} batches each"
    )
    rates = _measure(config, source, device, size=size, seconds=seconds, cores=cores)
    can_feed = rates.worker * cores
    result = {
        "device": str(device),
        "cores": cores,
        "num_workers": config.data.num_workers,
        "sizes": config.sizes_text,
        "micro_batch_size": size,
        "images_per_s": {name: _rounded(rate) for name, rate in asdict(rates).items()},
        "limit": limit(rates, num_workers=config.data.num_workers, cores=cores),
        "cores_can_feed_images_per_s": _rounded(can_feed),
        "gpu_images_per_s": gpu_images_per_s,
        "workers_for_one_gpu": math.ceil(gpu_images_per_s / rates.worker),
    }
    say(as_text(rates, result))
    return result


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else float(f"{rate:.4g}")


def _measure(
    config: RunConfig,
    source: Source,
    device: torch.device,
    *,
    size: int,
    seconds: float,
    cores: int,
) -> Rates:
    multi_crop = multi_crop_of(config)
    order = _order(source, seed=config.seed)
    some = _decoded(source, order, count=size)

    def as_worker(seed: int) -> Iterator[Batch]:
        again = config.model_copy(update={"seed": seed})
        return _batches(again, source, multi_crop, size=size, num_workers=0, pin=False)

    batches = as_worker(config.seed)
    batch = next(batches)
    of_workers: dict[str, Callable[[], object]] = {
        "read_decode": lambda: _decoded(source, order, count=size),
        "crops": lambda: _cut(multi_crop, some),
        "worker": lambda: next(batches),
    }
    with busy(as_worker, others=cores - 1), _threads(1):  # a worker has one thread
        spent = _in_turn(of_workers, seconds=seconds)
    of_device: dict[str, Callable[[], object]] = {}
    if device.type == "cuda":
        pinned = batch.pin_memory()
        of_device["transfer"] = lambda: _sent(pinned, device)
        batch = _sent(pinned, device)
    of_device["device"] = lambda: _finish(batch, config, device)
    spent |= _in_turn(of_device, seconds=seconds)
    for name, time_s in spent.items():
        say(f"{name}: {size / time_s:.4g} images/s")
    loader = _loader_rate(config, source, multi_crop, device, size=size, seconds=seconds)
    rates = {name: size / time_s for name, time_s in spent.items()}
    return Rates(transfer=rates.pop("transfer", None), loader=loader, **rates)


def _order(source: Source, *, seed: int) -> Iterator[int]:
    """Endless indices of images: random ones, or those of a stream in order."""
    rng = np.random.default_rng(seed)
    while True:
        if isinstance(source, StreamSource):
            yield from range(len(source))
        else:
            yield int(rng.integers(len(source)))


def _decoded(source: Source, order: Iterator[int], *, count: int) -> list[Picture]:
    """The next readable pictures, decoded.

    Raises:
        DataError: ten times `count` were tried, and too few can be read.
    """
    pictures: list[Picture] = []
    for _ in range(_TRIES * count):
        with contextlib.suppress(BadSampleError):
            picture = source.picture(next(order))
            pictures.append(Picture.of(picture.pixels(), picture.path))
        if len(pictures) == count:
            return pictures
    raise DataError(f"only {len(pictures)} of {_TRIES * count} images can be read")


def _cut(multi_crop: MultiCrop, pictures: list[Picture]) -> None:
    crops = multi_crop.arrays(count=len(pictures))
    for place, picture in enumerate(pictures):
        multi_crop(picture, crops, place, seed=0, epoch=0, sample=place)


def _batches(
    config: RunConfig,
    source: Source,
    multi_crop: MultiCrop,
    *,
    size: int,
    num_workers: int,
    pin: bool,
) -> Iterator[Batch]:
    """The run's loader on one rank, a micro-batch a step."""
    return train_batches(
        source,
        multi_crop,
        batch_size=size,
        micro_batch_size=size,
        seed=config.seed,
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=_MAX_STEPS,
        num_workers=num_workers,
        stream_readers=config.data.stream_readers,
        pin_memory=pin,
    )


def _sent(batch: Batch, device: torch.device) -> Batch:
    sent = Batch(
        batch.global_crops.to(device, non_blocking=True),
        batch.local_crops.to(device, non_blocking=True),
        batch.gram_crops.to(device, non_blocking=True),
        batch.params,
        batch.sample_ids,
        batch.bad,
    )
    torch.cuda.synchronize(device)
    return sent


def _finish(batch: Batch, config: RunConfig, device: torch.device) -> None:
    compiled = config.engine.compile is not False
    finish_batch(batch, config.data, device, compiled=compiled)
    finish_gram_crops(batch, config, device, compiled=compiled)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_turn(parts: Mapping[str, Callable[[], object]], *, seconds: float) -> dict[str, float]:
    """Median seconds of each part; they take turns, so that other programs slow all alike."""
    for work in parts.values():
        work()  # buffers, lazy imports
    spent: dict[str, list[float]] = {name: [] for name in parts}
    end = time.perf_counter() + seconds * len(parts)
    while time.perf_counter() < end or not all(spent.values()):
        for name, work in parts.items():
            begin = time.perf_counter()
            work()
            spent[name].append(max(time.perf_counter() - begin, 1e-9))
    return {name: statistics.median(times) for name, times in spent.items()}


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    own = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(own)


def _loader_rate(
    config: RunConfig,
    source: Source,
    multi_crop: MultiCrop,
    device: torch.device,
    *,
    size: int,
    seconds: float,
) -> float:
    """Images per second from the workers to the network, after the prefetched batches."""
    workers = config.data.num_workers
    batches = _batches(
        config, source, multi_crop, size=size, num_workers=workers, pin=device.type == "cuda"
    )
    for _ in range(_PREFETCHED * workers + 1):
        _finish(next(batches), config, device)
    begin, images = time.perf_counter(), 0
    while not images or time.perf_counter() - begin < seconds:
        _finish(next(batches), config, device)
        images += size
    return images / (time.perf_counter() - begin)


def limit(rates: Rates, *, num_workers: int, cores: int) -> str:
    """The slowest part: "workers", "transfer" or "device".

    It is called the limit also without workers, when the parts run one after another.

    Args:
        rates: of the parts.
        num_workers: of one rank.
        cores: available to it.
    """
    parts = {"workers": rates.worker * min(max(num_workers, 1), cores), "device": rates.device}
    if rates.transfer is not None:
        parts["transfer"] = rates.transfer
    return min(parts, key=lambda part: parts[part])


def as_text(rates: Rates, result: dict[str, Any]) -> str:
    """The result of `bench_data` as a table and sentences."""
    cores, workers = result["cores"], result["num_workers"]
    lines = [f"{'images/s':<44}{'one core':>12}{f'all {cores}':>12}"]
    for text, rate in (
        ("reading and decoding at full size", rates.read_decode),
        ("cutting crops", rates.crops),
        ("both, as a data worker does them", rates.worker),
    ):
        lines.append(f"  {text:<42}{rate:>12.4g}{rate * cores:>12.4g}")
    for text, whole in (
        ("transfer to the device", rates.transfer),
        (f"device part ({result['device']})", rates.device),
        (f"real loader, {workers} workers, and device part", rates.loader),
    ):
        if whole is not None:
            lines.append(f"  {text:<42}{'':>12}{whole:>12.4g}")
    lines.append(f"limit: {_LIMITS[result['limit']]}")
    if result["limit"] == "workers":
        lines.append(_within_worker(rates))
        share = rates.loader / (rates.worker * min(max(workers, 1), cores))
        if share < _GOOD_SHARE:
            lines.append(
                f"the workers together reach {share:.0%} of the rate of their cores: they wait for"
                " the disk, or other programs use the cores"
            )
    gpu, feed = result["gpu_images_per_s"], rates.worker * cores
    lines.append(
        f"a GPU that trains {gpu:.4g} images/s needs {result['workers_for_one_gpu']} data workers,"
        f" one core each; the {cores} available cores can feed {feed:.4g} images/s,"
        f" {feed / gpu:.2g} such GPUs"
    )
    if rates.transfer is not None:
        share = gpu / rates.device + gpu / rates.transfer
        lines.append(f"transfer and device part take {share:.1%} of the time of such a GPU")
    return "\n".join(lines)


_LIMITS = {
    "workers": "the data workers; raise data.num_workers, up to one per core",
    "transfer": "the transfer to the device",
    "device": "the device part; more data workers would not help",
}


def _within_worker(rates: Rates) -> str:
    share = (1 / rates.read_decode) / (1 / rates.read_decode + 1 / rates.crops)
    if share < _HALF:
        return f"{1 - share:.0%} of a worker's time is cutting crops: use fewer or smaller ones"
    return (
        f"{share:.0%} of a worker's time is reading and decoding: use shards instead of single"
        " files, and pictures whose shorter side is not much longer than the crops need"
    )
