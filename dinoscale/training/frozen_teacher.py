"""The frozen teacher of a run: read at every start, and the same as long as the run lasts."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dinoscale.checkpoint.load import Checkpoint
from dinoscale.config import RunConfig
from dinoscale.convert.initial_weights import read_frozen_teacher
from dinoscale.engine.build import InitialWeights
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import ConfigError
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import on_first_rank
from dinoscale.training.targets.folder import TargetFolder
from dinoscale.training.targets.read import read_prototypes

log = logging.getLogger(__name__)


def require_same_form(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse to learn outputs of a frozen teacher that cannot be; it is not read for that.

    Other ones than before, or stored ones after a rollback, which are of the images it skipped.

    Its heads' outputs or its features, of class tokens or patches: each has maps of its own in the
    student, and features are learned from weights of which heads are not compared.

    Args:
        checkpoint: of the run, which goes on from it.
        config: of the run.

    Raises:
        ConfigError: a weight of features is 0 and was not, or the other way round; or the run has
            skipped images and targets are stored.
    """
    skipped = checkpoint.progress.data_offset
    if config.distill.targets is not None and skipped:
        raise ConfigError(
            f"distill.targets: the run of {checkpoint.path} has rolled back and skipped the images "
            f"of {skipped} steps, and stored targets are those of each step without that; go on "
            "with distill.teacher, or start a new run with another run_dir"
        )
    saved = checkpoint.state["config"].get("distill", {})
    if _named(saved) is None or not config.distill.is_given:
        return  # by their weights, see `read_same_teacher`
    for key in ("class_feature_weight", "patch_feature_weight"):
        then, now = saved.get(key, 0.0), getattr(config.distill, key)
        if bool(then) != bool(now):
            raise ConfigError(
                f"distill.{key}: was {then} when {checkpoint.path} was saved and is {now} now; it "
                "decides which outputs of the frozen teacher are learned, and which maps the "
                "student has. Restore the old value, or start a new run with another run_dir"
            )


def recipe_caution(config: RunConfig) -> str | None:
    """A warning if the student of a frozen teacher's heads is trained as without one.

    Returns:
        A sentence; None where both follow the papers, or no heads of a frozen teacher teach.
    """
    if not config.distill.by_heads:
        return None
    rate, dino, curve = config.model.drop_path_rate, config.dino, config.schedules.teacher_temp
    found = [f"model.drop_path_rate={rate}, where the papers have 0.0"] if rate else []
    warms_up = dino.warmup_teacher_temp_epochs and dino.warmup_teacher_temp != dino.teacher_temp
    key = "dino.warmup_teacher_temp_epochs=0"
    if curve is not None:
        warms_up, key = len(set(curve.reached)) > 1, "a constant schedules.teacher_temp"
    if warms_up:
        found.append(f"a teacher temperature that changes, where DINOv3 has 0.07 all along ({key})")
    if not found:
        return None
    return f"distill.teacher is frozen from the start, and this run has {' and '.join(found)}"


def _named(section: Mapping[str, Any]) -> str | None:
    """The weights or targets that the settings of `distill` name."""
    found: str | None = section.get("teacher") or section.get("targets")
    return found


def read_same_teacher(
    config: RunConfig,
    checkpoint: Checkpoint | None,
    targets: TargetFolder | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> InitialWeights | None:
    """Read `distill.teacher`, or what is stored of it, on rank 0; None on other ranks. Collective.

    Without a frozen teacher, None everywhere. A run that has learnt from a teacher may go on with
    its stored outputs, and the other way round.

    Args:
        config: of the run.
        checkpoint: of the run, which goes on from it.
        targets: what is stored of it.
        heartbeat: called regularly while they are read.

    Raises:
        CheckpointError: on every rank, if the weights cannot be read.
        ConfigError: on every rank, if they do not fit, or the run has learnt from others.
    """
    weights = None
    if config.distill.teacher is not None:
        weights = on_first_rank(partial(read_frozen_teacher, config), heartbeat)
    elif targets is not None:
        weights = read_prototypes(config, targets)
    identity = None if weights is None else weights.identity
    distributed.together(lambda: _require_same(config, checkpoint, identity))
    return weights


def _require_same(config: RunConfig, checkpoint: Checkpoint | None, identity: str | None) -> None:
    """Refuse to go on with another frozen teacher, or with none; only rank 0 knows which it is."""
    if checkpoint is None or distributed.rank() != 0:
        return
    then, path = checkpoint.frozen_teacher, checkpoint.path
    if then == identity:
        return
    named = config.distill.teacher or config.distill.targets or "null"
    key = "distill.teacher" if config.distill.targets is None else "distill.targets"
    before = _named(checkpoint.state["config"].get("distill", {}))
    if then is None:
        what = "has learnt from its own average, and not from a frozen teacher; set it to null"
    else:
        what = (
            f"has learnt from {before} (identity {then[:12]}), whose weights are others; name "
            "those, of a run that has gone on its checkpoint"
        )
    raise ConfigError(
        f"{key}: the run of {path} {what}, or start a new run with another run_dir; got "
        f"{named}" + ("" if identity is None else f" (identity {identity[:12]})")
    )


def teaches_on(config: RunConfig, other: Checkpoint, weights: InitialWeights | None) -> bool:
    """Whether the heads that gave another run's targets give this one's; collective.

    Only then are its centers, which are means of outputs of that network, those of this run.

    Args:
        config: of the run.
        other: the checkpoint that it begins with.
        weights: of the frozen teacher, on rank 0.
    """
    now = weights.identity if weights is not None and config.distill.by_heads else None
    section = other.state["config"].get("distill", {})
    by_features = any(section.get(key) for key in ("class_feature_weight", "patch_feature_weight"))
    then = None if by_features else other.frozen_teacher
    same: bool = distributed.broadcast_object(now == then)
    has_centers = config.has_heads and config.dino.targets == "centering"
    if not same and has_centers and distributed.rank() == 0:
        log.info("the centers of %s are of another teacher's outputs: they begin anew", other.path)
    return same


def begin(teacher: Teacher, weights: InitialWeights | None) -> None:
    """Give the frozen teacher its weights, from rank 0, if there is one; collective."""
    if teacher.frozen is not None:
        named = None if weights is None else weights.by_name()
        teacher.frozen.load(named, identity=None if weights is None else weights.identity)
