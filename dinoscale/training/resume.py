"""Going on with a run: find its newest undamaged checkpoint, check that it fits, load it."""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from dinoscale.checkpoint.checksums import difference, first_difference, matches, read_sums
from dinoscale.checkpoint.layout import EMA, MASTER, checkpoints, directory
from dinoscale.checkpoint.load import Checkpoint, first_good, held_step, newest_first
from dinoscale.checkpoint.retention import clear_leftovers
from dinoscale.checkpoint.save import shared_tensors
from dinoscale.config import RunConfig
from dinoscale.config.backbones import RESNET50
from dinoscale.config.resolve import RunPlan, micro_batch_sizes, with_micro_batch
from dinoscale.config.secrets import hide_secrets
from dinoscale.data.shards.remote import is_remote
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import CheckpointError, ConfigError, MissingFileError, UnreadableError
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import by_all, on_first_rank
from dinoscale.runtime.versions import versions

log = logging.getLogger(__name__)
T = TypeVar("T")

_DAMAGED, _MISNAMED = "damaged_", "misnamed_"  # before the names of what is set aside
# What may change between two starts without a word: none of it moves a number beyond rounding, but
# micro-batches where there is batch norm, of which `batch_norm_caution` warns.
_PRECISION = "engine.precision"
_FREE: tuple[str, ...] = ("run_dir", "resume", "engine.", "eval.", "log.", "checkpoint.")
_FREE += (
    "data.num_workers",
    "train.micro_batch_size",
    "train.init_",  # read at step 0 only
    "train.stop_after_steps",
    "train.max_",
    "train.hang_timeout_s",
)


def find_checkpoint(run_dir: Path, goes_on: Callable[[], None] = lambda: None) -> Checkpoint | None:
    """The newest undamaged checkpoint of a run, None if it has none; collective.

    All ranks share the reading for the checksums; rank 0 opens it and hands it to the others.
    Damaged checkpoints are set aside under another name, and what was not written to its end is
    deleted. Nothing is done about one that merely cannot be read. One that holds another step than
    its name tells gets the right name, or is set aside where that is taken. `goes_on` is called
    again and again, also while other ranks read.

    Raises:
        UnreadableError: on every rank; the checkpoints cannot be listed, the newest or the state
            of any not be read, or ranks see it differently.
        CheckpointError: there are checkpoints and all of them are damaged.
    """
    is_first = distributed.rank() == 0
    found = _of_first(lambda: _rightly_named(run_dir))
    checkpoint, errors = first_good(found, lambda path: _open_together(path, goes_on))
    if is_first:
        for path, error in zip(found, errors, strict=False):
            _set_aside(path, error)
    on_first_rank(lambda alive: clear_leftovers(run_dir, alive), goes_on)
    return checkpoint


def _rightly_named(run_dir: Path) -> list[Path]:
    """The checkpoints, newest first, each under the name of the step it holds if that is free."""
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
        log.warning("%s holds step %d, as its state.json says: it becomes %s", path, step, right)
        _rename(path, right)
        taken.add(right)
    return newest_first(run_dir)


def _open_together(path: Path, goes_on: Callable[[], None]) -> Checkpoint:
    """Verify and open a checkpoint; what all ranks see as one is said to be damaged.

    Raises:
        UnreadableError: it cannot be read, or ranks see different files or bytes.
        CheckpointError: it is damaged.
    """
    try:
        sums = _of_first(lambda: read_sums(path))
        _require_sums(path, sums, goes_on)
        return _of_first(lambda: Checkpoint(path))
    except MissingFileError:
        views = distributed.gather_objects(_listed(path))
        other = next((rank for rank, view in enumerate(views) if view != views[0]), None)
        if other is None:
            raise
        raise UnreadableError(
            f"rank {other} sees other files in {path} than rank 0 ({views[other]} and {views[0]})."
            " The checkpoint may be whole, and nothing of it was changed: mend the file system, or"
            " leave out that machine, then start again"
        ) from None


def _of_first(read: Callable[[], T]) -> T:
    """What rank 0 reads, on every rank; its second reading decides whether something is damaged."""

    def read_twice() -> T:
        try:
            return read()
        except (MissingFileError, UnreadableError):
            raise
        except CheckpointError:
            return read()

    value = distributed.together(lambda: read_twice() if distributed.rank() == 0 else None)
    return cast(T, distributed.broadcast_object(value))


def _require_sums(path: Path, sums: dict[str, str], goes_on: Callable[[], None]) -> None:
    """Compare all files with their checksums, each rank its share; rank 0 looks at a bad one too.

    Raises:
        UnreadableError: a file cannot be read, or rank 0 reads other bytes of it.
        CheckpointError: a file is damaged.
    """
    rank, world_size = distributed.rank(), distributed.world_size()

    def differs(sign: Callable[[], None]) -> str | None:
        return first_difference(path, sums, share=rank, num_shares=world_size, goes_on=sign)

    own = by_all(differs, goes_on)
    found = distributed.gather_objects(own)
    finder = next((number for number, name in enumerate(found) if name is not None), None)
    if finder is None:
        return
    name = cast(str, found[finder])
    whole = on_first_rank(lambda alive: matches(path / name, sums[name], alive), goes_on)
    if not distributed.broadcast_object(whole):
        raise difference(path, name)
    raise UnreadableError(
        f"rank {finder} twice read other bytes of {path / name} than rank 0, which found it whole;"
        " nothing was changed: leave out the machine of that rank, then start again"
    )


def _listed(path: Path) -> str:
    """What a rank sees of a checkpoint's folder, short enough to be compared and shown."""
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return str(error.strerror)
    return f"{len(names)} files, CRC {zlib.crc32(json.dumps(names).encode()):08x}"


def _set_aside(path: Path, error: CheckpointError) -> None:
    log.warning("%s; going on from an older checkpoint", error)
    _rename(path, path.with_name(_DAMAGED + path.name))


def _rename(path: Path, target: Path) -> None:
    try:
        path.rename(target)
    except OSError as reason:
        log.warning("cannot rename %s: %s", path, reason)


def keep_micro_batch(checkpoint: Checkpoint, config: RunConfig, *, world_size: int) -> RunConfig:
    """Replace `auto` by what the run had, if that still divides a rank's images of a step.

    Raises:
        ConfigError: it does not, and the order of streamed shards depends on it.
    """
    if config.train.micro_batch_size != "auto":
        return config
    plan = checkpoint.state["plan"]
    saved, path = plan["micro_batch_size"], checkpoint.path
    if saved in micro_batch_sizes(config.train, world_size=world_size):
        return with_micro_batch(config, saved)
    share = config.train.batch_size // world_size
    if _order_of_stream(checkpoint.state["config"], plan):
        raise ConfigError(
            f"train.micro_batch_size: {saved} when {path} was saved, and the order of streamed"
            f" shards depends on it, but it does not divide the {share} images of a step that each"
            f" of {world_size} ranks takes now; go on with {plan['world_size']} ranks"
        )
    if distributed.rank() == 0:
        log.warning(
            "the micro-batch of %s, %d, does not divide the %d images of a step that each of %d"
            " ranks takes now: finding another",
            *(path.name, saved, share, world_size),
        )
    return config


def require_same_run(checkpoint: Checkpoint, config: RunConfig, plan: RunPlan) -> None:
    """Refuse what would shift the position in data and schedules; name other changes.

    Raises:
        ConfigError: the seed, the images per step or the number of images drawn differ.
    """
    saved_config, saved_plan = checkpoint.state["config"], checkpoint.state["plan"]
    pairs = {
        "seed": (saved_config.get("seed"), config.seed),
        "train.batch_size": (saved_plan.get("batch_size"), plan.batch_size),
        "the number of images trained on": (saved_plan.get("num_images"), plan.num_images),
        "the number of images of each source": (saved_plan.get("source_sizes"), plan.source_sizes),
        "the number drawn from each source an epoch": (saved_plan.get("quotas"), plan.quotas),
    }
    streamed = _order_of_stream(saved_config, saved_plan)
    streamed_now = _order_of_stream(config.model_dump(mode="json"), asdict(plan))
    for name in {**streamed, **streamed_now}:
        pairs[name] = streamed.get(name), streamed_now.get(name)
    for name, (then, now) in pairs.items():
        now = list(now) if isinstance(now, tuple) else now  # as JSON has it
        if then != now:
            raise ConfigError(
                f"{name} was {then} when {checkpoint.path} was saved and is {now} now; the order of"
                " the images and the schedules depend on it, so this run cannot go on with it."
                " Put the old value back, or start a new run with another run_dir"
            )
    if distributed.rank() != 0:
        return
    changes = [
        f"{key} {hide_secrets(then)} -> {now}"
        for key, (then, now) in _differences(saved_config, config.model_dump(mode="json")).items()
        if key == _PRECISION or not key.startswith(_FREE)
    ]
    of_libraries = _differences(checkpoint.state.get("versions", {}), versions())
    changes += [f"{name} {then} -> {now}" for name, (then, now) in of_libraries.items()]
    if changes:
        log.warning("changed since %s: %s", checkpoint.path.name, ", ".join(changes))


def require_same_set(checkpoint: Checkpoint, images: str) -> None:
    """Refuse other images of the same number: every position in the run would mean another one.

    Args:
        checkpoint: of the run; one of a version that did not note its images is accepted.
        images: `identity` of the source at hand.

    Raises:
        ConfigError: names or sizes of images, or their order, are not those of the checkpoint.
    """
    if checkpoint.state.get("images", images) != images:
        raise ConfigError(
            "data.train: the names, sizes or order of the images are not those that"
            f" {checkpoint.path} was trained on, though their number is, so this run cannot go on"
            " with them. Put the former set back, or start a new run with another run_dir;"
            f" train.init_from={checkpoint.path} with train.init_head=true takes the weights over"
        )


def batch_norm_caution(
    config: RunConfig, plan: RunPlan, then: Mapping[str, Any] | None
) -> str | None:
    """What to say where batch norm makes losses depend on how a step is split.

    Its statistics are those of a micro-batch on all ranks: of the whole step only where there is
    one micro-batch.

    Args:
        config: of the run.
        plan: of this start.
        then: plan of the checkpoint that it goes on from, as saved; None at the start of a run.

    Returns:
        A sentence, or None where there is no batch norm or nothing that changes.
    """
    if not config.head.batch_norm and config.model.backbone != RESNET50:
        return None
    images = plan.micro_batch_size * plan.world_size
    before = then["micro_batch_size"] * then["world_size"] if then else plan.batch_size
    if images == before:
        return None
    whose = "before this start" if then else "in a step"
    return (
        f"batch norm takes its statistics over the {images} images of a micro-batch on all ranks,"
        f" not over {before} as there are {whose}: losses are others than with another"
        f" train.micro_batch_size x ranks ({plan.micro_batch_size} x {plan.world_size})"
    )


def _order_of_stream(config: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """What else the order of streamed shards depends on; empty for other images."""
    train = config["data"]["train"]
    specs = [train] if isinstance(train, str) else [part["source"] for part in train or ()]
    if not any(is_remote(spec) for spec in specs):
        return {}
    return {
        "the size of a micro-batch": plan["micro_batch_size"],
        "data.stream_readers": config["data"].get("stream_readers"),
        "data.shuffle_buffer": config["data"].get("shuffle_buffer"),
    }


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> values, where they differ."""
    old, new = dict(_flat(then)), dict(_flat(now))
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
    goes_on: Callable[[], None] = lambda: None,
) -> None:
    """Set student, optimizer, teacher and center to a checkpoint's, at any world size and stage.

    `goes_on` is called after each tensor of this rank.

    Raises:
        CheckpointError: on every rank: another model, or parts are missing.
    """
    live = shared_tensors(student, teacher)
    shapes = {name: tuple(value.shape) for name, value in live.items()}
    distributed.together(lambda: checkpoint.require(student.shapes, shapes))

    def read(kind: str, name: str, start: int, numel: int) -> Tensor:
        values = checkpoint.read(kind, name, start, numel)
        goes_on()
        return values

    student.restore_master(partial(read, MASTER))
    steps = checkpoint.state["optimizer_steps"]
    distributed.together(lambda: student.restore_optimizer(read, steps))
    teacher.restore(partial(read, EMA))
    for name, value in live.items():
        value.copy_(checkpoint.shared[name])
