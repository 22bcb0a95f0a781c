"""Resume a run: find its newest undamaged checkpoint, check that it fits, load it."""

import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from dinoscale.checkpoint.checksums import difference, first_difference, matches, read_sums
from dinoscale.checkpoint.layout import (
    ANCHOR,
    EMA,
    GRAM,
    MASTER,
    checkpoints,
    directory,
    is_checkpoint,
    run_with_checkpoints,
)
from dinoscale.checkpoint.load import Checkpoint, first_usable, held_step, newest_first
from dinoscale.checkpoint.retention import clear_leftovers
from dinoscale.checkpoint.save import shared_tensors
from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan, micro_batch_sizes, with_micro_batch
from dinoscale.config.secrets import hide_secrets
from dinoscale.config.sections.backbones import RESNET50
from dinoscale.data.shards.remote import is_remote
from dinoscale.engine.build import shapes_only
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import CheckpointError, ConfigError, MissingFileError, UnreadableError
from dinoscale.models.vit import VisionTransformer
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import on_all_ranks, on_first_rank
from dinoscale.runtime.versions import versions

log = logging.getLogger(__name__)
T = TypeVar("T")

_POSITIONS = "backbone.pos_embed"  # of another grid where another run's crops had another size
_DAMAGED, _MISNAMED = "damaged_", "misnamed_"  # name prefixes of checkpoints set aside
# Settings that may change between two starts without a warning: none changes a number beyond
# rounding, except micro-batches with batch norm or KoLeo, of which `batch_norm_caution` and
# `koleo_caution` warn.
_PRECISION = "engine.precision"
_FREE: tuple[str, ...] = ("run_dir", "resume", "engine.", "eval.", "guard.", "log.", "checkpoint.")
_FREE += (
    "data.num_workers",
    "train.micro_batch_size",
    "train.init_",  # read at step 0 only, as is
    "train.continue_from",
    "train.stop_after_steps",
    "train.max_",
    "train.hang_timeout_s",
)


def find_checkpoint(
    run_dir: Path, heartbeat: Callable[[], None] = lambda: None
) -> Checkpoint | None:
    """The newest undamaged checkpoint of a run, None if it has none; collective.

    All ranks share the work of the checksums; rank 0 opens the checkpoint and sends it to the
    others. Damaged checkpoints are set aside under another name; incomplete ones are deleted; one
    that merely cannot be read is left alone. One that holds another step than its name says gets
    the right name, or is set aside if that name is taken. `heartbeat` is called regularly, also
    while other ranks read.

    Raises:
        UnreadableError: on every rank, if the checkpoints cannot be listed, the newest or the state
            of any cannot be read, or ranks see different files.
        CheckpointError: all checkpoints are damaged.
    """
    is_first = distributed.rank() == 0
    found = _of_first(lambda: _rightly_named(run_dir))
    checkpoint, errors = first_usable(found, lambda path: _open_together(path, heartbeat))
    if is_first:
        for path, error in zip(found, errors, strict=False):
            _set_aside(path, error)
    on_first_rank(lambda heartbeat: clear_leftovers(run_dir, heartbeat), heartbeat)
    return checkpoint


def open_other_run(config: RunConfig, heartbeat: Callable[[], None] = lambda: None) -> Checkpoint:
    """The checkpoint that `train.continue_from` names, whose files are not changed; collective.

    Of a run it is the newest one, and no older one takes its place if it is damaged.

    Raises:
        UnreadableError: it cannot be read.
        CheckpointError: it is damaged.
        ConfigError: there is none, or it is of another network, optimizer or scale of adapters.
    """
    path = Path(cast(str, config.train.continue_from))

    def newest() -> Path | None:
        if is_checkpoint(path):
            return path
        return next(iter(newest_first(run_with_checkpoints(path))), None)

    found = _of_first(newest)
    if found is None:
        raise ConfigError(
            f"train.continue_from: no checkpoint in {path}; give the directory of a run or one of "
            "its step_*, or null to begin anew"
        )
    checkpoint = _open_together(found, heartbeat)
    other = checkpoint.state["config"]["optim"]["name"]
    if other != config.optim.name:
        raise ConfigError(
            f"train.continue_from: {found} has the state of {other}, and optim.name is "
            f"{config.optim.name}; set optim.name={other}, or take the weights alone with "
            "train.init_from"
        )
    config.lora.require_scale_of(found, checkpoint.state["config"])
    here = {name: tuple(value.shape) for name, value in shapes_only(config).named_parameters()}
    differing = [
        f"{name} is {checkpoint.shapes.get(name, 'absent')} there and {here.get(name, 'absent')} "
        "here"
        for name in sorted(checkpoint.shapes.keys() | here.keys())
        if checkpoint.shapes.get(name) != here.get(name)
        and not (name == _POSITIONS and name in checkpoint.shapes and name in here)  # are resized
    ]
    if differing:
        raise ConfigError(
            f"train.continue_from: {found} is of another network ({len(differing)} tensors "
            f"differ): {'; '.join(differing[:3])}; change model.* and head.*, or take what fits "
            "with train.init_from"
        )
    return checkpoint


def _rightly_named(run_dir: Path) -> list[Path]:
    """Rename checkpoints to the steps they hold where that name is free; return newest first."""
    found = checkpoints(run_dir)
    taken = set(found)
    for path, step in [(path, held_step(path)) for path in found]:
        right = directory(run_dir, step)
        if path == right:
            continue
        if right in taken:
            if held_step(right) != step:
                continue
            right = path.with_name(_MISNAMED + path.name)
        log.warning("%s holds step %d by its state.json: renaming it to %s", path, step, right)
        _rename(path, right)
        taken.add(right)
    return newest_first(run_dir)


def _open_together(path: Path, heartbeat: Callable[[], None]) -> Checkpoint:
    """Verify and open a checkpoint; it counts as damaged only if all ranks see the same.

    Raises:
        UnreadableError: it cannot be read, or ranks see different files or bytes.
        CheckpointError: it is damaged.
    """
    try:
        sums = _of_first(lambda: read_sums(path))
        _require_sums(path, sums, heartbeat)
        return _of_first(lambda: Checkpoint(path))
    except MissingFileError:
        views = distributed.gather_objects(_listed(path))
        other = next((rank for rank, view in enumerate(views) if view != views[0]), None)
        if other is None:
            raise
        raise UnreadableError(
            f"rank {other} sees other files in {path} than rank 0 ({views[other]} and {views[0]})."
            " The checkpoint may be intact and was not changed: repair the file system or leave out"
            " that machine, then start again"
        ) from None


def _of_first(read: Callable[[], T]) -> T:
    """Return what rank 0 reads on every rank; it reads a damaged file twice to be sure."""

    def read_twice() -> T:
        try:
            return read()
        except (MissingFileError, UnreadableError):
            raise
        except CheckpointError:
            return read()

    value = distributed.together(lambda: read_twice() if distributed.rank() == 0 else None)
    return cast(T, distributed.broadcast_object(value))


def _require_sums(path: Path, sums: dict[str, str], heartbeat: Callable[[], None]) -> None:
    """Compare all files with their checksums, each rank its share; rank 0 confirms a mismatch.

    Raises:
        UnreadableError: a file cannot be read, or rank 0 reads other bytes of it.
        CheckpointError: a file is damaged.
    """
    rank, world_size = distributed.rank(), distributed.world_size()

    def differs(sign: Callable[[], None]) -> str | None:
        return first_difference(path, sums, share=rank, num_shares=world_size, heartbeat=sign)

    own = on_all_ranks(differs, heartbeat)
    found = distributed.gather_objects(own)
    finder = next((number for number, name in enumerate(found) if name is not None), None)
    if finder is None:
        return
    name = cast(str, found[finder])
    intact = on_first_rank(lambda heartbeat: matches(path / name, sums[name], heartbeat), heartbeat)
    if not distributed.broadcast_object(intact):
        raise difference(path, name)
    raise UnreadableError(
        f"rank {finder} twice read other bytes of {path / name} than rank 0, which found it intact;"
        " nothing was changed: leave out the machine of that rank, then start again"
    )


def _listed(path: Path) -> str:
    """A rank's view of a checkpoint's folder, short enough to compare and to show."""
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return str(error.strerror)
    return f"{len(names)} files, CRC {zlib.crc32(json.dumps(names).encode()):08x}"


def _set_aside(path: Path, error: CheckpointError) -> None:
    log.warning("%s; resuming from an older checkpoint", error)
    _rename(path, path.with_name(_DAMAGED + path.name))


def _rename(path: Path, target: Path) -> None:
    try:
        path.rename(target)
    except OSError as reason:
        log.warning("cannot rename %s: %s", path, reason)


def keep_micro_batch(checkpoint: Checkpoint, config: RunConfig, *, world_size: int) -> RunConfig:
    """Replace `auto` by the run's micro-batch, if that still divides a rank's images per step.

    Raises:
        ConfigError: it does not, and the order of streamed shards depends on it.
    """
    if config.train.micro_batch_size != "auto":
        return config
    plan = checkpoint.state["plan"]
    saved, path = plan["micro_batch_size"], checkpoint.path
    if saved in micro_batch_sizes(config, world_size=world_size):
        return with_micro_batch(config, saved)
    share = config.train.batch_size // world_size
    if order_of_stream(checkpoint.state["config"], plan):
        raise ConfigError(
            f"train.micro_batch_size: it was {saved} when {path} was saved, and the order of"
            f" streamed shards depends on it, but it does not divide the {share} images per step of"
            f" each of {world_size} ranks; resume with {plan['world_size']} ranks"
        )
    if distributed.rank() == 0:
        log.warning(
            "the micro-batch of %s, %d, does not divide the %d images per step of each of %d"
            " ranks: finding another",
            *(path.name, saved, share, world_size),
        )
    return config


def require_same_run(checkpoint: Checkpoint, config: RunConfig, plan: RunPlan) -> None:
    """Refuse changes that would shift the position in data and schedules; log other changes.

    Raises:
        ConfigError: the seed, the mixture of sizes, the images per step, the number of images
            drawn or the scale of adapters differ, or there is an anchor now and was none.
    """
    saved_config, saved_plan = checkpoint.state["config"], checkpoint.state["plan"]
    config.lora.require_scale_of(checkpoint.path, saved_config)
    pairs = {
        "seed": (saved_config.get("seed"), config.seed),
        "crops.mixture": (
            saved_config.get("crops", {}).get("mixture", []),
            config.model_dump(mode="json")["crops"]["mixture"],
        ),
        "train.batch_size": (saved_plan.get("batch_size"), plan.batch_size),
        "the number of images trained on": (saved_plan.get("num_images"), plan.num_images),
        "the number of images of each source": (saved_plan.get("source_sizes"), plan.source_sizes),
        "the number drawn from each source an epoch": (saved_plan.get("quotas"), plan.quotas),
    }
    streamed = order_of_stream(saved_config, saved_plan)
    streamed_now = order_of_stream(config.model_dump(mode="json"), asdict(plan))
    for name in {**streamed, **streamed_now}:
        pairs[name] = streamed.get(name), streamed_now.get(name)
    for name, (then, now) in pairs.items():
        now = list(now) if isinstance(now, tuple) else now  # as JSON has it
        if then != now:
            raise ConfigError(
                f"{name} was {then} when {checkpoint.path} was saved and is {now} now; images,"
                " crops or schedules of the steps depend on it, so this run cannot resume with it."
                " Restore the old value, or start a new run with another run_dir"
            )
    if config.anchor.counts and not checkpoint.has_anchor:
        raise ConfigError(
            f"{next(iter(config.anchor.weights))}: {checkpoint.path} has no anchor, which is the"
            " network as the run began; set it to 0.0, or start a new run with another run_dir and"
            f" train.continue_from={checkpoint.path}"
        )
    if distributed.rank() != 0:
        return
    defaults = RunConfig().model_dump(mode="json")  # of settings newer than the checkpoint
    changes = [
        f"{key} {hide_secrets(then)} -> {now}"
        for key, (then, now) in _differences(
            saved_config, config.model_dump(mode="json"), defaults
        ).items()
        if key == _PRECISION or not key.startswith(_FREE)
    ]
    of_libraries = _differences(checkpoint.state.get("versions", {}), versions())
    changes += [f"{name} {then} -> {now}" for name, (then, now) in of_libraries.items()]
    if changes:
        log.warning("changed since %s: %s", checkpoint.path.name, ", ".join(changes))


def require_same_set(checkpoint: Checkpoint, images: str) -> None:
    """Refuse other images of the same number: positions in the run would mean other images.

    Args:
        checkpoint: of the run; accepted if an older version saved it without the identity.
        images: `identity` of the current source.

    Raises:
        ConfigError: names, sizes or order of the images differ from the checkpoint's.
    """
    if checkpoint.state.get("images", images) != images:
        raise ConfigError(
            "data.train: the names, sizes or order of the images differ from those that"
            f" {checkpoint.path} was trained on, though their number is equal, so this run cannot"
            " resume with them. Restore the former set, or start a new run with another run_dir;"
            f" train.init_from={checkpoint.path} with train.init_head=true takes the weights over"
        )


def batch_norm_caution(
    config: RunConfig, plan: RunPlan, then: Mapping[str, Any] | None
) -> str | None:
    """A warning if batch norm makes losses depend on how a step is split into micro-batches.

    Its statistics cover one micro-batch on all ranks, so the whole step only if that is a single
    micro-batch.

    Args:
        config: of the run.
        plan: of this start.
        then: plan of the checkpoint that the run resumes from, as saved; None for a new run.

    Returns:
        A sentence; None without batch norm or if nothing changes.
    """
    heads = (config.head, config.patch_head)
    batch_norm = any(head is not None and head.batch_norm for head in heads)
    if not batch_norm and config.model.backbone != RESNET50:
        return None
    images = plan.micro_batch_size * plan.world_size
    before = then["micro_batch_size"] * then["world_size"] if then else plan.batch_size
    if images == before:
        return None
    others = "before this start" if then else "of a whole step"
    return (
        f"batch norm takes its statistics over the {images} images of a micro-batch on all ranks,"
        f" not over the {before} {others}: losses depend on train.micro_batch_size x ranks"
        f" ({plan.micro_batch_size} x {plan.world_size})"
    )


def koleo_caution(config: RunConfig, plan: RunPlan, then: Mapping[str, Any] | None) -> str | None:
    """A warning if KoLeo looks for neighbours among another number of images than before.

    With more images, the nearest one is nearer: the loss is another.

    Args:
        config: of the run.
        plan: of this start.
        then: plan of the checkpoint that the run resumes from, as saved; None for a new run.

    Returns:
        A sentence; None without KoLeo or if nothing changes.
    """
    if then is None or not config.koleo.loss_weight or config.koleo.scope == "group":
        return None  # a group has as many images as before
    of_all = config.koleo.scope == "all"
    images, before = (
        size * (ranks if of_all else 1)
        for size, ranks in (
            (plan.micro_batch_size, plan.world_size),
            (then["micro_batch_size"], then["world_size"]),
        )
    )
    if images == before:
        return None
    setting = "train.micro_batch_size x ranks" if of_all else "train.micro_batch_size"
    return (
        f"KoLeo looks for neighbours among the {images} images of a micro-batch, not {before} as"
        f" before this start: its loss depends on {setting}"
    )


def order_of_stream(config: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Further values that the order of streamed shards depends on; empty for other images."""
    train = config["data"]["train"]
    specs = [train] if isinstance(train, str) else [part["source"] for part in train or ()]
    if not any(is_remote(spec) for spec in specs):
        return {}
    return {
        "the size of a micro-batch": plan["micro_batch_size"],
        "data.stream_readers": config["data"].get("stream_readers"),
        "data.shuffle_buffer": config["data"].get("shuffle_buffer"),
    }


def _differences(
    then: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) value, where they differ; `defaults` are of keys missing in old."""
    old, new = dict(_flat(defaults or {})) | dict(_flat(then)), dict(_flat(now))
    return {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def restore(
    checkpoint: Checkpoint,
    student: Student,
    teacher: Teacher,
    heartbeat: Callable[[], None] = lambda: None,
    *,
    image_size: int | None = None,
    centers: bool = True,
) -> None:
    """Restore student, optimizer, teacher and what it compares with, at any ranks and stage.

    An anchor that the checkpoint does not have begins as the student of the checkpoint.

    Args:
        checkpoint: of this run, or of another one with the same network.
        student: is changed.
        teacher: is changed.
        heartbeat: called after each tensor of this rank.
        image_size: side of the global crops in pixels, for which position embeddings of another
            grid, and their moments, are resized as the forward does it; None: refuse them.
        centers: whether to take the centers of the targets, too; else they keep their values.

    Raises:
        CheckpointError: on every rank, if it is of another model or parts are missing.
    """
    live = shared_tensors(student, teacher)
    shapes = {name: tuple(value.shape) for name, value in live.items()}
    wanted, backbone = student.shapes, student.network.backbone
    other_grid = wanted.get(_POSITIONS) != checkpoint.shapes.get(_POSITIONS)
    if image_size is not None and other_grid:
        wanted = wanted | {_POSITIONS: checkpoint.shapes[_POSITIONS]}
    distributed.together(lambda: checkpoint.require(wanted, shapes, student.frozen.parameters))

    def read(kind: str, name: str, start: int, numel: int) -> Tensor:
        if image_size is not None and other_grid and name == _POSITIONS:
            assert isinstance(backbone, VisionTransformer)
            whole = _resized(checkpoint, kind, backbone, side=image_size)
            values = whole[start : start + numel]
        else:
            values = checkpoint.read(kind, name, start, numel)
        heartbeat()
        return values

    student.restore_master(partial(read, MASTER))
    steps = checkpoint.state["optimizer_steps"]
    distributed.together(lambda: student.restore_optimizer(read, steps))
    teacher.restore(partial(read, EMA))
    if teacher.gram is not None:
        teacher.gram.restore(partial(read, GRAM), checkpoint.gram_refreshes)
    if teacher.anchor is not None and checkpoint.has_anchor:
        teacher.anchor.restore(partial(read, ANCHOR))
    elif teacher.anchor is not None:
        teacher.anchor.take(student.master)
    for name in live.keys() - (() if centers else teacher.centers().keys()):
        live[name].copy_(checkpoint.shared[name])


def _resized(
    checkpoint: Checkpoint, kind: str, backbone: VisionTransformer, *, side: int
) -> Tensor:
    """Position embeddings of a kind for images of `side` pixels, flattened, float32."""
    shape = checkpoint.shapes[_POSITIONS]
    stored = checkpoint.read(kind, _POSITIONS, 0, math.prod(shape)).view(shape)
    resized = backbone.positions(height=side, width=side, of=stored)
    # Bicubic weights are partly negative, and a mean of squares is not.
    return (resized.clamp(min=0) if kind == "exp_avg_sq" else resized).flatten()
