"""`dinoscale embed --targets`: the outputs of a frozen teacher for every step of a run, stored.

It walks the steps of the run: the same images, crops and chosen patches, which are functions of
(seed, step, image), in the same micro-batches, so that the same shapes are multiplied. Ranks share
the micro-batches of each step. Neither a student nor its average is built. What a shard, some
consecutive steps, holds depends neither on the ranks nor on interruptions.

Shape letters: B images of a micro-batch, M chosen patches, P patches of a crop, D width.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from dinoscale.cluster.agreement import gather_members, require_alike, require_shared
from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan, require_groups_within_nodes, resolve
from dinoscale.convert.initial_weights import read_frozen_teacher
from dinoscale.data.augmentation.masks import Masks
from dinoscale.data.augmentation.multi_crop import NUM_GLOBAL
from dinoscale.data.loader import Batch
from dinoscale.data.shards.remote import shown
from dinoscale.data.sources.mixture import source_sizes
from dinoscale.data.sources.source import StoredSource
from dinoscale.data.transfer import to_device
from dinoscale.engine.build import InitialWeights, build_frozen_teacher
from dinoscale.engine.frozen.features import FeatureTeacher
from dinoscale.engine.frozen.seen import Seen
from dinoscale.engine.frozen.stored import LAST_LAYER
from dinoscale.engine.frozen.teacher import FrozenTeacher
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.errors import OutputError, RunFailedError
from dinoscale.evaluate.embedding.folder import MANIFEST, FeatureFolder
from dinoscale.evaluate.features import require_finite
from dinoscale.evaluate.progress import bar_options
from dinoscale.runtime import distributed
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.opening import on_first_rank, open_once_per_node
from dinoscale.runtime.outputs import sha256, write_tensors, writing_into
from dinoscale.runtime.versions import package_version
from dinoscale.training.feed import Feed, finish_batch, masks_of, open_images
from dinoscale.training.targets.replaced import KEY as UNREADABLE
from dinoscale.training.targets.replaced import Replaced, of_records, warning
from dinoscale.training.targets.settings import (
    crop_sums,
    deciding_settings,
    learned_of,
    learns_patches,
    require_storable,
    teacher_settings,
)
from dinoscale.training.targets.stripes import FORMAT, PROTOTYPES, Stored, stripe_name
from dinoscale.training.trainer import require_same_images

log = logging.getLogger(__name__)

_STRIPE_BYTES = 32 * 2**20  # of a file, about; those of a rank's slots are in memory
_OF_IMAGE = 8 + 8  # bytes: its number, and the checksum of its crops
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Job:
    """A run, the teacher's outputs for whose steps are stored in a folder."""

    config: RunConfig
    plan: RunPlan
    process: Process
    hosts: list[str]  # of all ranks
    source: StoredSource
    weights: InitialWeights | None  # of the teacher, on rank 0
    folder: FeatureFolder
    shard_steps: int

    def steps_of(self, shard: int) -> range:
        """The steps of a shard."""
        first = shard * self.shard_steps
        return range(first, min(first + self.shard_steps, self.plan.stop_step))

    def slot(self, index: int) -> int:
        """The slot of this rank's micro-batch `index` of a step."""
        return index * self.plan.world_size + self.process.rank

    def begun(self) -> "_Job":
        """The same, of the weights only whose they are; they take 4 bytes each."""
        if self.weights is None:
            return self
        known = InitialWeights({}, licence=self.weights.licence, identity=self.weights.identity)
        return replace(self, weights=known)


def write_targets(
    config: RunConfig, process: Process, out: str | Path, *, shard_steps: int | None = None
) -> dict[str, Any]:
    """Store the outputs of `distill.teacher` for a run's steps, or those that a folder lacks.

    All ranks call it after `distributed.start`; each does its share, and all get the summary.

    Args:
        config: of the run.
        process: this one.
        out: the folder, which all ranks must see.
        shard_steps: steps of one shard; None: as many as make files of some megabytes.

    Returns:
        What the folder holds, ready for JSON.

    Raises:
        CheckpointError: the weights cannot be used.
        ConfigError: the run has no frozen teacher, or settings that do not go with stored targets.
        DataError: the images cannot be read.
        LaunchError: ranks have other software or settings, or do not see one folder.
        OutputError: the folder holds something else, or targets of other settings; or the disk has
            too little space.
    """
    started = time.monotonic()
    job = _job(config, process, Path(out), shard_steps)
    try:
        missing = distributed.broadcast_object(on_first_rank(partial(_begin, job)))
        assert missing is not None
        if missing:
            require_shared(job.folder.path, job.hosts, name="OUT")
            teacher = build_frozen_teacher(config, job.plan)
            teacher.load(None if job.weights is None else job.weights.by_name(), identity=None)
            job = job.begun()
            _write_missing(job, teacher, missing)
        done = distributed.broadcast_object(on_first_rank(lambda _: _finish(job)))
    finally:
        job.folder.release()
    seconds = round(time.monotonic() - started, 1)
    return {**(done or {}), "new_shards": len(missing), "seconds": seconds}


def _job(config: RunConfig, process: Process, out: Path, shard_steps: int | None) -> _Job:
    """What a run, its images and its teacher ask for; nothing is written yet."""
    members = gather_members(config, process)
    require_alike(config, process, members)
    hosts = [member.host for member in members]
    distributed.together(lambda: require_storable(config))
    source = open_once_per_node(partial(open_images, config), hosts)
    require_same_images(source)
    require_groups_within_nodes(config, ranks_of_node=process.local_world_size)
    plan = resolve(config, world_size=process.world_size, num_images=source_sizes(source))
    weights = on_first_rank(partial(read_frozen_teacher, config))
    if shard_steps is None:
        fitting = int(_STRIPE_BYTES / (plan.micro_batch_size * bytes_of_image(config, plan)))
        shard_steps = max(1, min(fitting, plan.stop_step))
    folder = FeatureFolder(
        out,
        num_shards=-(-plan.stop_step // shard_steps),
        form=FORMAT,
        holds="targets",
        repairs=True,
        beside="prototypes",
    )
    return _Job(config, plan, process, hosts, source, weights, folder, shard_steps)


def bytes_of_image(config: RunConfig, plan: RunPlan) -> float:
    """Bytes that are stored of an image of a step; an estimate, where masks vary."""
    teacher, of_class = config.of_teacher, 4 * NUM_GLOBAL
    if config.distill.by_features:
        size = _DTYPES[config.engine.precision].itemsize
        width, patches = teacher.model.width or 0, 0.0
        if config.distill.patch_feature_weight:
            own, theirs = (c.model.effective_patch_size for c in (config, teacher))
            size_of_patch = size if own == theirs else 4  # resized in float32
            patches = _mean_patches(config) * size_of_patch
        return _OF_IMAGE + NUM_GLOBAL * width * (size + patches)
    found: float = _OF_IMAGE + of_class * teacher.head.bottleneck_dim
    if learns_patches(config):
        head = teacher.patch_head or teacher.head
        found += of_class + _mean_chosen(config, plan) * 4 * (head.bottleneck_dim + 1)
    return found


def _mean_patches(config: RunConfig) -> float:
    """Patches of a global crop, a mean over the sizes of a mixture."""
    patch = config.model.effective_patch_size
    assert patch is not None  # a student that learns features of patches has some
    sizes = zip(config.size_weights, config.of_sizes, strict=True)
    return sum(share * (run.crops.global_size // patch) ** 2 for share, run in sizes)


def _mean_chosen(config: RunConfig, plan: RunPlan) -> float:
    """Chosen patches of an image, by those of the first micro-batch in each size."""
    images, chosen = plan.micro_batch_size, 0.0
    for share, run in zip(config.size_weights, config.of_sizes, strict=True):
        masks = masks_of(run, step=0, first_image=0, images=images)
        assert masks is not None
        chosen += share * len(masks.rows) / images
    return chosen


def _begin(job: _Job, _heartbeat: Callable[[], None]) -> list[int]:
    """Take the folder, say what it takes, and return the shards that it lacks."""
    config, plan, weights = job.config, job.plan, job.weights
    assert weights is not None
    settings = {
        "run": deciding_settings(config, plan, job.source.identity(_heartbeat)),
        "teacher": weights.identity,
        **teacher_settings(config),
        "outputs": {
            "of": learned_of(config),
            "patches": learns_patches(config),
            "width": config.of_teacher.model.width if config.distill.by_features else None,
        },
        "steps": plan.stop_step,
        "shard_steps": job.shard_steps,
        "train": {"micro_batch_size": plan.micro_batch_size},
        "device": job.process.device.type,
        "version": package_version("dinoscale"),
        "torch": package_version("torch"),
    }
    loaded: dict[str, Any] = json.loads(json.dumps(settings))
    with writing_into(job.folder.path):
        missing = job.folder.begin(loaded)
        _require_space(job, missing)
        if config.distill.by_heads and job.folder.manifest() is None:
            dtype = _DTYPES[config.engine.precision]
            _save(
                {
                    name: value.float().to(dtype)
                    for name, value in weights.by_name().items()
                    if LAST_LAYER in name
                },
                job.folder.path / PROTOTYPES,
            )
    return missing


def _require_space(job: _Job, missing: list[int]) -> None:
    """Say how many bytes will be written, and refuse a disk that has not as many."""
    of_image = bytes_of_image(job.config, job.plan)
    images = sum(len(job.steps_of(shard)) for shard in missing) * job.plan.batch_size
    needed, free = images * of_image, shutil.disk_usage(job.folder.path).free
    log.info(
        "targets: about %.1f kB an image, %.2f GB for %d images of %d steps; %.2f GB are free in"
        " %s",
        of_image / 1e3,
        needed / 1e9,
        images,
        images // job.plan.batch_size,
        free / 1e9,
        job.folder.path,
    )
    if needed > free:
        raise OutputError(
            f"{job.folder.path}: the targets take about {needed / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free there; choose another disk, or fewer steps "
            "(train.stop_after_steps)"
        )


def _write_missing(job: _Job, teacher: FrozenTeacher[Any], missing: list[int]) -> None:
    """Write shards; a run of neighbours shares one set of data workers."""
    shown_here = job.process.rank == 0
    replaced = Replaced(job.config, job.plan, job.folder.path)
    images = sum(len(job.steps_of(shard)) for shard in missing) * job.plan.batch_size
    with tqdm(total=images, unit="img", **bar_options(shown=shown_here)) as bar:
        for shards in _neighbours(missing):
            first, stop = job.steps_of(shards[0]).start, job.steps_of(shards[-1]).stop
            plan = replace(job.plan, stop_step=stop)
            feed = Feed(job.config, plan, job.process, job.source, depth=0)
            batches = feed.steps(first, offset=0)
            for shard in shards:
                _write_shard(job, teacher, shard, batches, replaced, bar)


def _neighbours(shards: list[int]) -> Iterator[list[int]]:
    """Runs of consecutive numbers."""
    run: list[int] = []
    for shard in shards:
        if run and shard != run[-1] + 1:
            yield run
            run = []
        run.append(shard)
    yield run


def _write_shard(
    job: _Job,
    teacher: FrozenTeacher[Any],
    shard: int,
    batches: Iterator[list[Batch]],
    replaced: Replaced,
    bar: "tqdm[NoReturn]",
) -> None:
    """Write this rank's stripes of a shard, then on rank 0 its record."""
    # A forward at stage 3 is collective. An error in one leaves this function on its rank alone,
    # and ends the others through the watchdog; to agree on it here would wait for them for ever.
    found = _found(job, teacher, job.steps_of(shard), batches, replaced, bar)
    own = distributed.together(lambda: _saved(job, shard, found))
    of_ranks = distributed.gather_objects(own)
    merged = {slot: entry for entries in of_ranks for slot, entry in entries.items()}
    record = {
        "first": job.steps_of(shard).start,
        "stop": job.steps_of(shard).stop,
        "arrays": dict(sorted(merged.items(), key=lambda pair: int(pair[0]))),
        UNREADABLE: replaced.of_shard(),
    }
    distributed.together(lambda: _add(job, shard, record))


def _found(
    job: _Job,
    teacher: FrozenTeacher[Any],
    steps: range,
    batches: Iterator[list[Batch]],
    replaced: Replaced,
    bar: "tqdm[NoReturn]",
) -> list[dict[str, Tensor]]:
    """What the teacher finds in this rank's micro-batches of some steps, by their index in a step.

    Raises:
        DataError: on every rank, if too many images are unreadable.
        RunFailedError: on this rank, if a forward needs more memory than there is.
    """
    plan = job.plan
    found: list[dict[str, Tensor]] = [{} for _ in range(plan.accumulation_steps)]
    try:
        for step in steps:
            for index, batch in enumerate(next(batches)):
                found[index] |= _stored(job, teacher, step, index, batch).named(step)
                replaced.add(batch.bad)
                bar.update(plan.micro_batch_size * plan.world_size)
            replaced.step_done(step + 1, ends_shard=step == steps[-1])
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunFailedError(
            f"a forward of the teacher over {plan.micro_batch_size} images needs more memory than "
            f"available ({str(error).split('. ')[0]}); lower train.micro_batch_size"
        ) from error
    return found


def _saved(job: _Job, shard: int, found: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Write this rank's stripes of a shard; their entries by slot."""
    entries = {}
    with writing_into(job.folder.path):
        for index, tensors in enumerate(found):
            slot = job.slot(index)
            entries[str(slot)] = _save(tensors, job.folder.path / stripe_name(shard, slot))
    return entries


def _add(job: _Job, shard: int, record: dict[str, Any]) -> None:
    """Declare a shard finished, on rank 0."""
    if job.process.rank == 0:
        with writing_into(job.folder.path):
            job.folder.add(shard, record)


@torch.no_grad()
def _stored(job: _Job, teacher: FrozenTeacher[Any], step: int, index: int, batch: Batch) -> Stored:
    """What the teacher finds in a micro-batch."""
    config, plan, device = job.config, job.plan, job.process.device
    of_globals = replace(batch, local_crops=batch.local_crops[:0], params=batch.params[:NUM_GLOBAL])
    compiled = config.engine.compile is not False
    crops = finish_batch(of_globals, config.data, device, compiled=compiled)
    about = {"images": batch.sample_ids, "crops": crop_sums(batch.global_crops, batch.params)}
    if isinstance(teacher, FeatureTeacher):
        features = teacher.targets(MicroBatch(*crops, None))
        patches = features.patches
        return Stored(
            **about,
            classes=_by_view(features.classes),
            patches=None if patches is None else _by_view(patches),
        )
    masks = masks_of(
        config,
        step=step,
        first_image=job.slot(index) * plan.micro_batch_size,
        images=plan.micro_batch_size,
        size=batch.global_crops.shape[2],
    )
    moved = None if masks is None else Masks(*(to_device(tensor, device) for tensor in masks))
    seen = Seen(copies=False)
    teacher.look(MicroBatch(*crops, None, moved), seen)
    classes = _by_view(seen.classes.units)
    if masks is None or seen.patches is None:
        return Stored(**about, classes=classes)
    crops_of_step, num_patches = masks.masks.shape
    counts = torch.bincount(masks.rows // num_patches, minlength=crops_of_step)
    return Stored(
        **about,
        classes=classes,
        patches=require_finite(seen.patches.units).cpu(),
        counts=counts.view(NUM_GLOBAL, -1).int(),
        places=(masks.rows % num_patches).int(),
    )


def _by_view(rows: Tensor) -> Tensor:
    """(2 * B, ...) -> (2, B, ...) on the CPU."""
    values = require_finite(rows).cpu()
    return values.view(NUM_GLOBAL, -1, *values.shape[1:])


def _save(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Write a file whole or not at all, flushed to the disk; what the manifest says of it."""
    beside = path.with_name(f".{path.name}.part")
    try:
        write_tensors({name: value.contiguous() for name, value in tensors.items()}, beside)
    except SafetensorError as error:  # of a full disk, among others
        raise OutputError(f"cannot write to {path}: {error}") from error
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    entry = {"file": path.name, "bytes": beside.stat().st_size, "sha256": sha256(beside)}
    os.replace(beside, path)
    return entry


def _finish(job: _Job) -> dict[str, Any]:
    """Write the manifest, unless it is there, and say what the folder holds."""
    about = job.folder.manifest()
    if about is None:
        about = _about(job)
        with writing_into(job.folder.path):
            job.folder.finish(about)
    if about[UNREADABLE]:
        log.warning("%s", warning(about[UNREADABLE], job.folder.path / MANIFEST))
    return {
        "out": str(job.folder.path),
        "manifest": str(job.folder.path / MANIFEST),
        **{key: about[key] for key in ("steps", "images", "bytes", "bytes_per_image")},
        UNREADABLE: len(about[UNREADABLE]),
        "shards": job.folder.num_shards,
    }


def _about(job: _Job) -> dict[str, Any]:
    """The manifest without its shards."""
    config, weights = job.config, job.weights
    assert weights is not None
    records = [*job.folder.records()]
    arrays = [entry for record in records for entry in record["arrays"].values()]
    stored = sum(entry["bytes"] for entry in arrays)
    images = job.plan.stop_step * job.plan.batch_size
    path = job.folder.path / PROTOTYPES
    prototypes = None
    if config.distill.by_heads:
        prototypes = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    return {
        "format": FORMAT,
        "teacher": {
            "path": shown(config.distill.teacher or ""),
            "identity": weights.identity,
            "licence": weights.licence,
        },
        "steps": job.plan.stop_step,
        "images": images,
        "bytes": stored,
        "bytes_per_image": round(stored / images, 1),
        "prototypes": prototypes,
        UNREADABLE: of_records(records),
        "settings": job.folder.settings,
    }
