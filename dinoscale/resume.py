"""Going on with a run: find its newest undamaged checkpoint, check that it fits, load it."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dinoscale import distributed
from dinoscale.checkpoint.layout import EMA, MASTER, checkpoints
from dinoscale.checkpoint.load import Checkpoint, first_good, open_verified
from dinoscale.checkpoint.retention import clear_leftovers
from dinoscale.checkpoint.save import shared_tensors
from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan, micro_batch_sizes, with_micro_batch
from dinoscale.config.secret_text import hide_secrets
from dinoscale.data.remote import is_remote
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.versions import versions

log = logging.getLogger(__name__)

_DAMAGED = "damaged_"
# What may change between two starts without a word: none of it moves a number beyond rounding.
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


def find_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint of a run, None if it has none; collective.

    All ranks share the reading for the checksums. Damaged checkpoints are set aside under another
    name, and what was not written to its end is deleted.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    found = distributed.broadcast_object(checkpoints(run_dir)[::-1])  # one view of the directory
    checkpoint, errors = first_good(
        found,
        lambda path: distributed.together(
            lambda: open_verified(path, share=rank, num_shares=world_size)
        ),
    )
    if rank == 0:
        for path, error in zip(found, errors, strict=False):
            _set_aside(path, error)
        clear_leftovers(run_dir)
    return checkpoint


def _set_aside(path: Path, error: CheckpointError) -> None:
    log.warning("%s; going on from an older checkpoint", error)
    try:
        path.rename(path.with_name(_DAMAGED + path.name))
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


def _order_of_stream(config: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """What else the order of streamed shards depends on; empty for other images."""
    train = config["data"]["train"]
    specs = [train] if isinstance(train, str) else [part["source"] for part in train or ()]
    if not any(is_remote(spec) for spec in specs):
        return {}
    return {
        "the size of a micro-batch": plan["micro_batch_size"],
        "data.lanes": config["data"].get("lanes"),
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


def restore(checkpoint: Checkpoint, student: Student, teacher: Teacher) -> None:
    """Set student, optimizer, teacher and center to a checkpoint's, at any world size and stage.

    Raises:
        CheckpointError: on every rank: another model, or parts are missing.
    """
    live = shared_tensors(student, teacher)
    shapes = {name: tuple(value.shape) for name, value in live.items()}
    distributed.together(lambda: checkpoint.require(student.shapes, shapes))
    student.restore_master(lambda *at: checkpoint.read(MASTER, *at))
    student.restore_optimizer(checkpoint.read, checkpoint.state["optimizer_steps"])
    teacher.restore(lambda *at: checkpoint.read(EMA, *at))
    for name, value in live.items():
        value.copy_(checkpoint.shared[name])
