"""`python -m tests.benchmarks.input --images DIR_OR_TARS`: our input pipeline and the reference's.

Everything runs on one thread and on the same images in memory, part after part in turn, so that
what else the machine does weighs on all alike: trust the ratios within a turn, not the rates.
Pictures with fewer pixels than ImageNet's are enlarged first unless --as-is; their files are then
smaller than those of photographs of that size, and faster to decode.
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinoscale.data.augmentation.color_jitter import finish_crops
from dinoscale.data.augmentation.multi_crop import NUM_GLOBAL, MultiCrop
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.decoding.decode import RGB, Decoder, Picture
from dinoscale.data.loader import Batch, train_batches
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError
from dinoscale.planning.bench.budget import in_turns, say
from tests.reference_input import ReferenceCrops, load

_PIXELS, _QUALITY = 500 * 375, 90  # of an ordinary ImageNet picture
_MICRO_BATCH = 32  # images that our parts take at once
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GPU_BATCH, _GPU_LOCAL = 64, 10  # the published batch of one GPU
_GPU_RUNS = 20
LIMIT_S = 330.0  # of all turns
_RATIOS = {  # name -> (faster part, slower part)
    "decode: ours / Pillow": ("decode, ours", "decode, Pillow"),
    "worker part / reference": ("worker part", "reference"),
    "worker + device part / reference": ("worker + device part", "reference"),
    "plain path / reference": ("plain path", "reference"),
}


@dataclass(frozen=True)
class InMemory:
    """Files of images as a source."""

    files: Sequence[bytes]
    labels: None = None
    class_names: None = None

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return f"image {index}"

    def picture(self, index: int) -> Picture:
        return RGB.open(self.files[index], self.path(index))


@dataclass(frozen=True)
class _Keep(Decoder):
    """Keeps the bytes of every file that is opened."""

    files: list[bytes] = field(default_factory=list)

    def open(self, data: bytes, path: str) -> Picture:
        self.files.append(data)
        return super().open(data, path)


def read_images(spec: str, *, num_images: int, as_is: bool) -> InMemory:
    """Some images of a folder or of tar shards, spread over it; small ones enlarged."""
    keep = _Keep()
    source = open_source(spec, keep)
    for index in np.linspace(0, len(source) - 1, num_images).astype(int).tolist():
        source.picture(index)
    if not keep.files:
        raise DataError(f"{spec}: need image files; name a folder or tar shards")
    return InMemory(keep.files if as_is else [_enlarged(data) for data in keep.files])


def _enlarged(data: bytes) -> bytes:
    image = load(data)
    if image.width * image.height >= _PIXELS:
        return data
    scale = (_PIXELS / (image.width * image.height)) ** 0.5
    size = (round(image.width * scale), round(image.height * scale))
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def measure(source: InMemory, *, repeats: int, num_local: int) -> dict[str, Any]:
    """Images per second of CPU time of every part, and ratios within each turn.

    Args:
        source: the images; whole micro-batches of them are taken.
        repeats: turns.
        num_local: local crops of each image.

    Returns:
        JSON-able: parts and ratios, by name the median, least and largest of the turns.
    """
    count = len(source) // _MICRO_BATCH * _MICRO_BATCH or len(source)
    source = InMemory(source.files[:count])
    size = min(_MICRO_BATCH, count)
    ours, plain = MultiCrop(num_local=num_local), MultiCrop(num_local=num_local, plain=True)
    reference = ReferenceCrops(num_local=num_local)
    cut = _batches(source, ours, size=size, epoch=0)  # of one turn; the device part goes on

    def cut_again(turn: int) -> None:
        cut[:] = _batches(source, ours, size=size, epoch=turn)

    parts: dict[str, Callable[[int], object]] = {
        "decode, Pillow": lambda _: [load(data) for data in source.files],
        "decode, ours": lambda _: [source.picture(i).pixels() for i in range(count)],
        "reference": lambda _: _referenced(source, reference, size=size),
        "worker part": cut_again,
        "device part": lambda _: [_finish(batch) for batch in cut],
        "plain path": lambda turn: _plain(_batches(source, plain, size=size, epoch=turn)),
    }
    for part in parts.values():
        part(0)  # buffers, lazy imports
    turns: list[dict[str, float]] = []
    for turn in in_turns(repeats, limit_s=LIMIT_S):
        spent = {name: _cpu_s(part, turn) for name, part in parts.items()}
        spent["worker + device part"] = spent["worker part"] + spent["device part"]
        turns.append({name: count / seconds for name, seconds in spent.items()})
        say(", ".join(f"{name} {rate:.3g}/s" for name, rate in turns[-1].items()))
    return {
        "images": count,
        "local_crops": num_local,
        "images_per_s": {name: _spread([turn[name] for turn in turns]) for name in turns[0]},
        "ratios": {
            name: _spread([turn[a] / turn[b] for turn in turns]) for name, (a, b) in _RATIOS.items()
        },
    }


def _batches(source: InMemory, crops: MultiCrop, *, size: int, epoch: int) -> list[Batch]:
    """What a data worker sends in one pass over the images: read, decoded, drawn, cut, packed."""
    steps = len(source) // size
    batches = train_batches(
        source,
        crops,
        batch_size=size,
        micro_batch_size=size,
        seed=0,
        rank=0,
        world_size=1,
        start_step=epoch * steps,
        stop_step=(epoch + 1) * steps,
        num_workers=0,
    )
    return list(batches)


def _referenced(source: InMemory, reference: ReferenceCrops, *, size: int) -> None:
    """One pass as the workers of the reference make it, crops stacked into batches."""
    for first in range(0, len(source), size):
        crops = [reference(load(data)) for data in source.files[first : first + size]]
        for view in zip(*crops, strict=True):
            torch.stack(view)


def _finish(batch: Batch) -> None:
    large, small = batch.params[:NUM_GLOBAL], batch.params[NUM_GLOBAL:]
    for crops, params in ((batch.global_crops, large), (batch.local_crops, small)):
        finish_crops(crops.flatten(0, 1), params.reshape(-1), mean=_MEAN, std=_STD)


def _plain(batches: Sequence[Batch]) -> None:
    for batch in batches:
        for crops in (batch.global_crops, batch.local_crops):
            normalize_images(crops.movedim(-1, 2), mean=_MEAN, std=_STD)


def _cpu_s(part: Callable[[int], object], turn: int) -> float:
    """Seconds of a core; what other processes take from it does not count."""
    begin = time.process_time()
    part(turn)
    return time.process_time() - begin


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"median": round(middle, 3), "min": round(low, 3), "max": round(high, 3)}


def measure_gpu(source: InMemory) -> dict[str, Any]:
    """The device part of a batch of 64 with 10 local crops on the GPU, without the transfer."""
    files = [source.files[i % len(source)] for i in range(_GPU_BATCH)]
    crops = MultiCrop(num_local=_GPU_LOCAL)
    (batch,) = _batches(InMemory(files), crops, size=_GPU_BATCH, epoch=0)
    on_gpu = Batch(
        batch.global_crops.cuda(),
        batch.local_crops.cuda(),
        batch.gram_crops,
        batch.params,
        batch.sample_ids,
        [],
    )
    _finish(on_gpu)
    milliseconds = []
    for _ in range(_GPU_RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        _finish(on_gpu)
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    rates = [_GPU_BATCH / (ms / 1000) for ms in milliseconds]
    return {
        "device": torch.cuda.get_device_name(),
        "batch": _GPU_BATCH,
        "local_crops": _GPU_LOCAL,
        "ms": _spread(milliseconds),
        "images_per_s": _spread(rates),
    }


def as_table(result: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{result['images']} images, {result['local_crops']} local crops, {result['note']}"]
    for title, rows in (("images/s per core", "images_per_s"), ("ratio", "ratios")):
        lines.append(f"{title:<36}{'median':>9}{'min':>9}{'max':>9}")
        lines += [
            f"  {name:<34}{row['median']:>9.2f}{row['min']:>9.2f}{row['max']:>9.2f}"
            for name, row in result[rows].items()
        ]
    gpu = result.get("gpu")
    if gpu:
        lines.append(
            f"device part on {gpu['device']}: {gpu['ms']['median']:.2f} ms for {gpu['batch']}"
            f" images with {gpu['local_crops']} local crops,"
            f" {gpu['images_per_s']['median']:.0f} images/s"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.input", description=__doc__)
    parser.add_argument("--images", required=True, metavar="DIR_OR_TARS")
    parser.add_argument("--num-images", type=int, default=64, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="R")
    parser.add_argument("--local-crops", type=int, default=8, metavar="n")
    parser.add_argument("--as-is", action="store_true", help="do not enlarge small pictures")
    options = parser.parse_args(arguments)
    if min(options.num_images, options.repeats) < 1 or options.local_crops < 0:
        parser.error("need --num-images and --repeats >= 1, --local-crops >= 0")
    torch.set_num_threads(1)
    source = read_images(options.images, num_images=options.num_images, as_is=options.as_is)
    result = measure(source, repeats=options.repeats, num_local=options.local_crops)
    result["note"] = (
        "as they are"
        if options.as_is
        else f"smaller ones enlarged to the pixels of 500 x 375, JPEG quality {_QUALITY}"
    )
    if torch.cuda.is_available():
        result["gpu"] = measure_gpu(source)
    print(as_table(result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
