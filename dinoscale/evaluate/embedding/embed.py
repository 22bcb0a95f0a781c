"""`dinoscale embed`: features of any set of images, written by all ranks of a job.

The set is cut into shards of neighbours, and a rank takes shards that are neighbours, so that tars
and streams are read from front to back. What a shard holds depends neither on the ranks nor on
interruptions: its batches are cut from its own start.

Shape letters: N readable images of the set, n of a shard, D width, P patches.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dinoscale.config.secrets import require_no_secrets
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.shards.remote import shown
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.mixture import left_out_counts, open_sources
from dinoscale.data.sources.source import StoredSource
from dinoscale.data.transfer import to_device
from dinoscale.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    OutputError,
    RunFailedError,
)
from dinoscale.evaluate.across_ranks import until_a_rank_fails
from dinoscale.evaluate.embedding.array_file import ArrayFile
from dinoscale.evaluate.embedding.folder import FORMAT, MANIFEST, FeatureFolder, Record
from dinoscale.evaluate.embedding.pictures import Pictures, pictures
from dinoscale.evaluate.embedding.tokens import chosen_features, compute, row_shape
from dinoscale.evaluate.feature_cache import weights_digest
from dinoscale.evaluate.features import eval_mode, require_finite
from dinoscale.evaluate.frozen_backbone import ExtractionOptions, FeatureExtractor, load_extractor
from dinoscale.evaluate.progress import bar_options
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import code_fingerprint
from dinoscale.runtime.opening import on_all_ranks, on_first_rank, open_once_per_node
from dinoscale.runtime.outputs import sha256, writing_into
from dinoscale.runtime.versions import package_version

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
Stored = Literal["float32", "float16"]

SHARD = 4096  # images; their class tokens of a ViT-L are 16 MiB
_NETWORK = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED = {"float32": torch.float32, "float16": torch.float16}
_STREAM_BUFFER = 64  # files of a streamed shard in memory


@dataclass(frozen=True)
class EmbedOptions(ExtractionOptions):
    """Which features are written, and how.

    Attributes:
        features: names (`tokens.OF_VIT`); empty takes the class token and the mean patch token.
        precision: of the network's weights and products.
        dtype: of the arrays.
        shard_size: images of the set in one array.
        manifest: where the counts of streamed shards are, if not beside them.
    """

    features: tuple[str, ...] = ()
    precision: Precision = "fp32"
    dtype: Stored = "float32"
    shard_size: int = SHARD
    manifest: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        if self.shard_size < 1:
            raise ConfigError(f"shard_size: need at least one image, got {self.shard_size}")


@dataclass(frozen=True)
class _Job:
    """A backbone, a set, and the folder for its features."""

    extractor: FeatureExtractor
    options: EmbedOptions
    source: StoredSource
    folder: FeatureFolder
    row_shapes: dict[str, tuple[int, ...]]  # by feature
    labels: NDArray[np.int64] | None  # of all images, -1 where unknown

    def images_of(self, shard: int) -> range:
        """The numbers of the images of a shard."""
        first = shard * self.options.shard_size
        return range(first, min(first + self.options.shard_size, len(self.source)))


def embed(
    weights_path: str | Path, spec: str, out: str | Path, options: EmbedOptions
) -> dict[str, object]:
    """Write the features of a set of images into a folder, or those that it still lacks.

    All ranks of a job call it; each does its share, and all get the summary.

    Args:
        weights_path: as `load_backbone` takes it.
        spec: the images, as `data.train` of a config names one source.
        out: the folder, which all ranks must see.
        options: which features, and how.

    Returns:
        What the folder holds, ready for JSON.

    Raises:
        CheckpointError: the weights cannot be used.
        ConfigError: a setting is out of range, or the backbone has no such feature.
        DataError: the set cannot be read, or none of its images.
        OutputError: the folder holds something else, or the features of other settings.
        UnavailableError: the file of an image cannot be read at all.
    """
    started = time.monotonic()
    distributed.together(partial(_require_apart, spec, Path(out)))
    extractor = load_extractor(weights_path, options)
    shapes = distributed.together(partial(_row_shapes, extractor, options.features))
    source = open_once_per_node(partial(_open, extractor, spec, options.manifest))
    folder = FeatureFolder(Path(out), num_shards=-(-len(source) // options.shard_size))
    job = _Job(extractor, options, source, folder, shapes, source.labels)
    try:
        missing = distributed.broadcast_object(on_first_rank(partial(_begin, job)))
        assert missing is not None
        write = until_a_rank_fails(partial(_write_share, job, missing))
        on_all_ranks(lambda _: write(), heartbeat=lambda: None)
        done = distributed.broadcast_object(on_first_rank(lambda _: _finish(job, spec)))
    finally:
        folder.release()
    seconds = round(time.monotonic() - started, 1)
    return {**(done or {}), "new_shards": len(missing), "seconds": seconds}


def _require_apart(spec: str, out: Path) -> None:
    """Refuse a folder inside the set, which would then hold the arrays as images; and passwords."""
    try:
        require_no_secrets(spec)
    except ValueError as error:
        raise ConfigError(f"the images: {shown(spec)} {error}") from None
    place = Path(os.path.expanduser(spec))
    if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
        raise OutputError(f"{out} is inside the images {spec}: choose another folder")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: name a folder to write to")


def _row_shapes(extractor: FeatureExtractor, asked: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shape of each feature of one image."""
    backbone = extractor.backbone
    names = chosen_features(backbone, asked)
    return {name: row_shape(backbone, name, crop=extractor.card.crop) for name in names}


def _open(
    extractor: FeatureExtractor, spec: str, manifest: str | None, heartbeat: Callable[[], None]
) -> StoredSource:
    return open_sources(
        [spec],
        extractor.decoder,
        manifest=manifest,
        shuffle_buffer=_STREAM_BUFFER,
        heartbeat=heartbeat,
    )


def _begin(job: _Job, heartbeat: Callable[[], None]) -> list[int]:
    """Take the folder, and return the shards that it lacks."""
    settings = _settings(job, heartbeat)
    with writing_into(job.folder.path):
        return job.folder.begin(settings)


def _settings(job: _Job, heartbeat: Callable[[], None]) -> dict[str, Any]:
    """All that the arrays depend on, in the form that JSON gives back."""
    card, options = job.extractor.card, job.options
    settings = {
        "weights": {
            "network": options.network,
            "tensors_sha256": weights_digest(job.extractor.backbone),
        },
        # Heads, epsilons and rotary positions are in no tensor.
        "backbone": asdict(card.backbone),
        "data": {"identity": job.source.identity(heartbeat), "images": len(job.source)},
        "preprocessing": {
            **job.extractor.preparation,
            "max_pixel_value": card.max_pixel_value,
        },
        "features": [*job.row_shapes],
        "dtype": options.dtype,
        "precision": options.precision,
        "batch_size": options.batch_size,
        "shard_size": options.shard_size,
        "device": job.extractor.device.type,
        "version": package_version("dinoscale"),
        "code": code_fingerprint("dinoscale.evaluate.embedding.embed"),
    }
    loaded: dict[str, Any] = json.loads(json.dumps(settings))
    return loaded


def _write_share(job: _Job, missing: list[int], check: Callable[[], None]) -> None:
    """Write the shards of this rank."""
    shards = np.array_split(missing, distributed.world_size())[distributed.rank()].tolist()
    if not shards:
        return
    job.extractor.backbone.to(_NETWORK[job.options.precision])
    try:
        with writing_into(job.folder.path), eval_mode(job.extractor.backbone), torch.no_grad():
            _write_shards(job, shards, check)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunFailedError(
            f"features of {job.options.batch_size} images at once need more memory than available"
            f" ({str(error).split('. ')[0]}); lower --batch-size"
        ) from error


def _write_shards(job: _Job, shards: list[int], check: Callable[[], None]) -> None:
    extractor, options = job.extractor, job.options
    # Each worker would read a stream from its front to its own batches.
    most = 1 if isinstance(job.source, StreamSource) else options.num_workers
    batches = pictures(
        job.source,
        (batch for _, batch in _batches(job, shards)),
        resize=extractor.card.resize,
        crop=extractor.card.crop,
        num_workers=min(options.num_workers, most),
        pin_memory=extractor.device.type == "cuda",
    )
    shown_here = options.progress and distributed.rank() == 0
    bar = tqdm(
        total=sum(len(job.images_of(shard)) for shard in shards),
        unit="img",
        **bar_options(shown=shown_here),
    )
    with bar:
        for shard, of_shard in groupby(
            zip(_batches(job, shards), batches, strict=True), key=_shard_of
        ):
            _write_shard(job, shard, _counted((batch for _, batch in of_shard), bar, check))


def _batches(job: _Job, shards: list[int]) -> Iterator[tuple[int, range]]:
    """Shard and images of every batch."""
    size = job.options.batch_size
    for shard in shards:
        images = job.images_of(shard)
        for first in range(0, len(images), size):
            yield shard, images[first : first + size]


def _shard_of(pair: tuple[tuple[int, range], Pictures]) -> int:
    return pair[0][0]


def _counted(
    batches: Iterable[Pictures], bar: tqdm[NoReturn], check: Callable[[], None]
) -> Iterator[Pictures]:
    """Batches, each counted by the bar when it is done."""
    for batch in batches:
        check()
        yield batch
        bar.update(len(batch.numbers) + len(batch.unreadable))


def _write_shard(job: _Job, shard: int, batches: Iterable[Pictures]) -> None:
    """Write the arrays of a shard, a batch at a time, then its record."""
    record = _new_record(job, shard)
    paths = {name: job.folder.array(name, shard) for name in job.row_shapes}
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(
                ArrayFile(paths[name], dtype=job.options.dtype, row_shape=shape)
            )
            for name, shape in job.row_shapes.items()
        }
        for batch in batches:
            _note(record, batch, job)
            if batch.numbers:
                for name, rows in _features(job, batch.images).items():
                    files[name].append(rows.numpy())
    record["arrays"] = {
        name: {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
        for name, path in paths.items()
    }
    job.folder.add(shard, record)


def _features(job: _Job, images: Tensor) -> dict[str, Tensor]:
    """The features of a batch as they are written, on the CPU."""
    extractor, stored = job.extractor, _STORED[job.options.dtype]
    moved = to_device(images, extractor.device)
    pixels = normalize_images(moved, mean=extractor.card.mean, std=extractor.card.std)
    network = _NETWORK[job.options.precision]
    found = compute(extractor.backbone, pixels.to(network), tuple(job.row_shapes))
    rows = {name: require_finite(values).to(stored).cpu() for name, values in found.items()}
    if stored is torch.float16 and not all(values.isfinite().all() for values in rows.values()):
        raise NonFiniteError("a feature is too large for float16; take --dtype float32")
    return rows


def _new_record(job: _Job, shard: int) -> Record:
    images = job.images_of(shard)
    return {
        "first": images.start,
        "stop": images.stop,
        "images": [],
        "sizes": [],
        **({} if job.labels is None else {"labels": []}),
        "unreadable": [],
    }


def _note(record: Record, batch: Pictures, job: _Job) -> None:
    """Add what a batch holds to the record of its shard."""
    # Paths below the folder of a set, so that they hold wherever it lies.
    source = job.source
    above = os.path.join(source.root, "") if isinstance(source, FolderSource) else ""
    record["images"] += [name.removeprefix(above) for name in batch.names]
    record["sizes"] += batch.sizes
    if job.labels is not None:
        record["labels"] += job.labels[batch.numbers].tolist()
    for lost in batch.unreadable:
        log.warning("left out an unreadable image: %s: %s", lost.name, lost.reason)
        name = lost.name.removeprefix(above)
        record["unreadable"].append({**asdict(lost), "name": name})


def _finish(job: _Job, spec: str) -> dict[str, object]:
    """Write the manifest, unless it is there, and say what the folder holds."""
    about = job.folder.manifest()
    if about is None:
        about = _about(job, spec)
        with writing_into(job.folder.path):
            job.folder.finish(about)
    return {
        "out": str(job.folder.path),
        "manifest": str(job.folder.path / MANIFEST),
        "images": about["images"],
        "unreadable": len(about["unreadable"]),
        "features": about["features"],
        "shards": job.folder.num_shards,
    }


def _about(job: _Job, spec: str) -> dict[str, Any]:
    """The manifest without its shards."""
    images, unreadable = 0, []
    for record in job.folder.records():
        images += len(record["images"])
        unreadable += record["unreadable"]
    if not images:
        raise DataError(
            f"none of the {len(job.source)} images can be read; the first: {unreadable[0]['name']}:"
            f" {unreadable[0]['reason']}"
        )
    card, path = job.extractor.card, Path(job.extractor.path)
    of_file = {"file_sha256": sha256(path)} if path.is_file() else {}
    # The names are below it, and the specification may be relative to today's working directory.
    root = {"root": job.source.root} if isinstance(job.source, FolderSource) else {}
    return {
        "format": FORMAT,
        "weights": {"path": job.extractor.path, "source": card.source, **of_file},
        "backbone": asdict(card.backbone),
        "data": {"spec": shown(spec), **root, "left_out": left_out_counts(job.source)},
        "images": images,
        "features": {
            name: {"dtype": job.options.dtype, "shape": [images, *shape]}
            for name, shape in job.row_shapes.items()
        },
        "classes": job.source.class_names,
        "unreadable": unreadable,
        "settings": job.folder.settings,
    }
