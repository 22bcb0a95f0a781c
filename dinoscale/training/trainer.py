"""Set up a run and start it: images, checkpoint, networks, k-NN, then the loop."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from dinoscale.checkpoint.layout import checkpoints, not_resumed
from dinoscale.checkpoint.load import Checkpoint
from dinoscale.checkpoint.next_phase import phase_before
from dinoscale.cluster.agreement import (
    Member,
    gather_members,
    keep_logs,
    require_alike,
    require_shared,
)
from dinoscale.cluster.doctor.report import count_text
from dinoscale.config import RunConfig
from dinoscale.config.load import phases_of
from dinoscale.config.resolve import (
    RunPlan,
    require_gram_network,
    require_groups_within_nodes,
    resolve,
    split_batch,
    with_micro_batch,
    without_auto,
)
from dinoscale.convert.formats.licences import joined_notes
from dinoscale.convert.initial_weights import (
    initial_weights_caution,
    read_gram_weights,
    read_initial_weights,
)
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.mixture import source_sizes
from dinoscale.data.sources.source import Source, StoredSource, open_source
from dinoscale.engine.build import InitialWeights, build_pair
from dinoscale.engine.frozen.anchor import anchor_caution
from dinoscale.engine.frozen.gram import GramNetwork
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import ConfigError, DataError
from dinoscale.runtime import distributed
from dinoscale.runtime.cores import available_cores, cores_per_rank
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.opening import on_first_rank, open_once_per_node
from dinoscale.runtime.preemption import StopRequest
from dinoscale.runtime.watchdog import Watchdog
from dinoscale.training import frozen_teacher
from dinoscale.training import run_directory as directory
from dinoscale.training.feed import open_images
from dinoscale.training.hooks.events import Events
from dinoscale.training.hooks.held_out import HeldOut
from dinoscale.training.hooks.online_knn import OnlineKnn, drawn_images_caution
from dinoscale.training.hooks.online_rank import online_rank
from dinoscale.training.loop import Run
from dinoscale.training.micro_batch.search import find_micro_batch
from dinoscale.training.phases import (
    next_phase,
    require_kept_steps,
    require_own_directory,
    require_teachers,
)
from dinoscale.training.resume import (
    batch_norm_caution,
    find_checkpoint,
    keep_micro_batch,
    koleo_caution,
    open_other_run,
    require_same_run,
    require_same_set,
    restore,
)
from dinoscale.training.step_zero import compare_features
from dinoscale.training.targets.folder import open_targets

log = logging.getLogger(__name__)
S = TypeVar("S", bound=Source)

_ENDING_LAUNCHERS = ("torchrun", "deepspeed")  # if they die, their ranks would keep running
_NAMES_COMPARED = 100  # of images, between ranks


def train(config: RunConfig, process: Process) -> dict[str, Any]:
    """Pre-train as `config` says; all ranks call it after `distributed.start`.

    Of a run of several phases, only the first that is not finished is trained.

    Returns:
        JSON-able summary: run_dir, steps, last loss and k-NN, images left out; with a guard
        `best_checkpoint`, whose teacher was exported, or None; `next_phase`, its name, if one
        follows: new processes have to train it.

    Raises:
        DinoscaleError: on every rank.
    """
    members = gather_members(config, process)
    hosts = [member.host for member in members]
    stop = StopRequest(answer=process.rank == 0)
    watchdog = Watchdog(
        timeout_s=config.train.hang_timeout_s,
        hosts=hosts,
        launched=process.launcher in _ENDING_LAUNCHERS,
        ask_to_stop=stop.ask,
    )
    with watchdog.sharing_failure():
        require_alike(config, process, members)
        runs, is_first = phases_of(config), process.rank == 0
        distributed.together(lambda: require_own_directory(config, runs) if is_first else None)
        distributed.together(lambda: require_teachers(config, runs) if is_first else None)
        if not config.phases:
            return _train(config, process, members, stop, watchdog)
        for run in runs:  # a mistake in the last phase must not wait for it
            require_groups_within_nodes(run, ranks_of_node=process.local_world_size)
            split_batch(without_auto(run), world_size=process.world_size)
        run_dir = Path(config.run_dir)
        with distributed.together(lambda: directory.lock(run_dir) if is_first else nullcontext()):
            distributed.together(lambda: directory.prepare(config) if is_first else None)
            index = _choose_phase(config, runs, watchdog)
            name = config.phases[index].name
            if is_first:
                log.info("phase %d of %d: %s", index + 1, len(runs), name)
            summary = _train(runs[index], process, members, stop, watchdog)
            summary |= {"run_dir": config.run_dir, "phase": name}
            following = next_phase(config, runs)  # this one, if it was stopped before its end
            if following.index > index:
                distributed.together(stop.check)
                summary["next_phase"] = config.phases[following.index].name
            return summary


def _choose_phase(config: RunConfig, runs: Sequence[RunConfig], watchdog: Watchdog) -> int:
    """Index of the phase to train; one begins only where the checkpoint it continues is intact."""
    phase = next_phase(config, runs)
    before = phase_before(config, phase.index)
    if phase.begins and before is not None:
        watchdog.progress("opening the last checkpoint of the phase before")
        # Sets it aside if it is damaged; the phase before then goes on from an older one.
        find_checkpoint(Path(runs[before].run_dir), watchdog.heartbeat)
        phase = next_phase(config, runs)
    return phase.index


def _train(
    config: RunConfig,
    process: Process,
    members: Sequence[Member],
    stop: StopRequest,
    watchdog: Watchdog,
) -> dict[str, Any]:
    """Train a run of one part."""
    is_first, run_dir = process.rank == 0, Path(config.run_dir)
    hosts = [member.host for member in members]
    opens = _unless_asked(partial(open_images, config), stop)
    source = open_once_per_node(opens, hosts, watchdog.heartbeat)
    distributed.together(stop.check)
    require_same_images(source)
    plan = _plan(without_auto(config), process, source)  # fail before the run_dir is created
    distributed.together(lambda: require_kept_steps(config, plan) if is_first else None)
    with distributed.together(lambda: directory.lock(run_dir) if is_first else nullcontext()):
        require_shared(run_dir, hosts)
        keep_logs(run_dir, process, members)
        return _build(config, process, hosts, source, stop, watchdog).train()


def _unless_asked(
    open_set: Callable[[Callable[[], None]], S], stop: StopRequest
) -> Callable[[Callable[[], None]], S]:
    """Let a request to stop interrupt the opening of a set, which may take hours.

    Only the rank that opens it checks; a waiting rank that stopped would leave that one alone.
    """

    def opened(heartbeat: Callable[[], None]) -> S:
        def heartbeat_unless_asked() -> None:
            heartbeat()
            stop.check()

        return open_set(heartbeat_unless_asked)

    return opened


def require_same_images(source: Source) -> None:
    """Refuse to train if ranks found different images, as in a folder that is still being filled.

    They would take different numbers of steps and wait for each other at the end.

    Raises:
        DataError: on every rank, if the number of images or one of a hundred names differs.
    """
    stride = max(1, len(source) // _NAMES_COMPARED)
    names = [os.path.basename(source.path(i)) for i in range(0, len(source), stride)]
    first, *others = distributed.gather_objects((len(source), names))
    for rank, (count, found) in enumerate(others, start=1):
        if (count, found) != first:
            different = "" if count != first[0] else " different ones"
            raise DataError(
                f"data.train: rank 0 found {first[0]} images and rank {rank} {count}{different}."
                " Train on a set that does not change and is the same on every machine."
            )


def _plan(config: RunConfig, process: Process, source: Source) -> RunPlan:
    require_groups_within_nodes(config, ranks_of_node=process.local_world_size)
    return resolve(config, world_size=process.world_size, num_images=source_sizes(source))


def _build(
    config: RunConfig,
    process: Process,
    hosts: Sequence[str],
    source: StoredSource,
    stop: StopRequest,
    watchdog: Watchdog,
) -> Run:
    is_first = process.rank == 0
    run_dir = Path(config.run_dir)
    if not config.resume:
        distributed.together(lambda: _require_new(run_dir) if is_first else None)
    watchdog.progress("comparing the images with those of the run so far")
    images = on_first_rank(source.identity, watchdog.heartbeat) or ""
    watchdog.progress("opening the newest checkpoint")
    checkpoint = find_checkpoint(run_dir, watchdog.heartbeat)
    if checkpoint is not None:
        config = keep_micro_batch(checkpoint, config, world_size=process.world_size)
        require_same_run(checkpoint, config, _plan(without_auto(config), process, source))
        frozen_teacher.require_same_form(checkpoint, config)
        distributed.together(lambda: require_same_set(checkpoint, images) if is_first else None)
    elif is_first and os.path.exists(run_dir / "metrics.jsonl"):
        log.warning("%s has logged steps but no checkpoint: starting from step 0", run_dir)
    init_from = None
    if checkpoint is None and config.train.init_from is not None:
        init_from = on_first_rank(partial(read_initial_weights, config), watchdog.heartbeat)
    other = None
    if checkpoint is None and config.train.continue_from is not None:
        watchdog.progress("opening the checkpoint to continue from")
        other = open_other_run(config, watchdog.heartbeat)
        if is_first:
            log.info("continuing from %s", other.path)
            end = other.state["plan"].get("stop_step", 0)
            if other.step < end:
                log.warning("that run has not ended: step %d of %d", other.step, end)
    gram_from, begins_gram = None, checkpoint is None or checkpoint.gram_refreshes is None
    if config.gram.loss_weight and begins_gram:
        gram_from = on_first_rank(partial(read_gram_weights, config), watchdog.heartbeat)
    if config.distill.teacher is not None:
        watchdog.progress("opening the weights of the frozen teacher")
    targets = None
    if config.distill.targets is not None:
        watchdog.progress("opening the targets of the frozen teacher")
        of_run = _plan(config, process, source)
        targets = open_targets(config, of_run, source, images, watchdog.heartbeat)
    frozen_from = frozen_teacher.read_same_teacher(config, checkpoint, targets, watchdog.heartbeat)
    if config.train.micro_batch_size == "auto":
        config = _find_micro_batch(config, process, stop, watchdog)
    plan = _plan(config, process, source)
    if config.engine.offload_optimizer and process.device.type == "cuda":
        # The host updates the weights; launchers limit it to one thread.
        torch.set_num_threads(cores_per_rank(process.local_world_size))
    watchdog.progress("building the networks")
    distributed.together(stop.check)
    centers = other is None or frozen_teacher.teaches_on(config, other, frozen_from)
    student, teacher = _networks(
        config, plan, init_from, checkpoint, other, centers=centers, heartbeat=watchdog.heartbeat
    )
    if checkpoint is None and config.train.init_from is not None:
        watchdog.progress("comparing the features with those of train.init_from")
        step_zero = None if init_from is None else init_from.step_zero
        compare_features(config, teacher, step_zero)
    if teacher.gram is not None and begins_gram:
        _begin_gram(teacher.gram, config, plan, gram_from)
    frozen_teacher.begin(teacher, frozen_from)
    sources = (checkpoint, other, init_from, gram_from, frozen_from)
    licence = joined_notes(None if part is None else part.licence for part in sources)
    del init_from, gram_from, frozen_from, sources  # 4 bytes per weight, on rank 0
    online_knn, held_out = _measured_sets(config, hosts, stop, watchdog)
    if is_first:
        _announce(config, plan, process, student, teacher, resumed_from=checkpoint, other=other)
    deepspeed = {"student": student.deepspeed_config, "teacher": teacher.deepspeed_config}
    distributed.together(stop.check)
    distributed.together(lambda: directory.prepare(config, deepspeed) if is_first else None)
    return Run(
        config,
        plan,
        process,
        source,
        images,
        licence,
        student,
        teacher,
        online_knn,
        held_out,
        online_rank(config, source),
        stop,
        watchdog,
        checkpoint,
        targets,
    )


def _networks(
    config: RunConfig,
    plan: RunPlan,
    init_from: InitialWeights | None,
    checkpoint: Checkpoint | None,
    other: Checkpoint | None = None,
    *,
    centers: bool = True,
    heartbeat: Callable[[], None] = lambda: None,
) -> tuple[Student, Teacher]:
    """Student and teacher: initial weights, or from a checkpoint of this run or of another one.

    `centers` says whether those of the other one are taken, too.
    """
    begins = checkpoint is None and other is None
    student, teacher = build_pair(config, plan, init_from, values=begins, heartbeat=heartbeat)
    if checkpoint is not None:
        restore(checkpoint, student, teacher, heartbeat)
    elif other is not None:
        side = config.crops.global_size
        restore(other, student, teacher, heartbeat, image_size=side, centers=centers)
    return student, teacher


def _begin_gram(
    gram: GramNetwork, config: RunConfig, plan: RunPlan, weights: InitialWeights | None
) -> None:
    """Give the Gram network the weights of gram.teacher, else keep those of another run, if any.

    `weights` are on rank 0. Collective.

    Raises:
        ConfigError: on every rank, if there are none, and no refresh will bring some, or too late.
    """
    if config.gram.teacher is not None:
        gram.load(None if weights is None else weights.backbone)
    elif gram.refreshes is not None:
        gram.refreshes = 0  # those of the other run do not count
    elif config.gram.refresh_every_steps is None:
        raise ConfigError(
            f"gram.teacher: {config.train.continue_from} has no Gram network to go on with; give "
            "weights, or let the EMA teacher be taken over with gram.refresh_every_steps"
        )
    else:
        require_gram_network(config, plan.steps_per_epoch)


def _require_new(run_dir: Path) -> None:
    if checkpoints(run_dir):
        raise ConfigError(f"run_dir: {not_resumed(run_dir)}")


def _measured_sets(
    config: RunConfig, hosts: Sequence[str], stop: StopRequest, watchdog: Watchdog
) -> tuple[OnlineKnn | None, HeldOut | None]:
    """The sets that the teacher is measured on, as far as the configuration names them."""

    def open_set(spec: str, decoder: Decoder) -> StoredSource:
        opens = _unless_asked(partial(open_source, spec, decoder), stop)
        return open_once_per_node(opens, hosts, watchdog.heartbeat)

    knn = distributed.together(lambda: OnlineKnn(config, open_set)) if config.eval.train else None
    guarded = config.guard.every_steps is not None
    if not guarded:
        return knn, None
    sets = () if knn is None else knn.sets
    return knn, distributed.together(
        lambda: HeldOut(config, open_set, watchdog.heartbeat, labelled=sets)
    )


def _find_micro_batch(
    config: RunConfig, process: Process, stop: StopRequest, watchdog: Watchdog
) -> RunConfig:
    """The configuration with the largest micro-batch that fits, found by trials."""
    found = find_micro_batch(
        config, process, moved=watchdog.progress, stop_asked=lambda: stop.asked
    )
    events = Events(Path(config.run_dir), active=process.rank == 0)
    events.write(0, "micro-batch found", **asdict(found))
    return with_micro_batch(config, found.size)


def _announce(
    config: RunConfig,
    plan: RunPlan,
    process: Process,
    student: Student,
    teacher: Teacher,
    *,
    resumed_from: Checkpoint | None,
    other: Checkpoint | None,
) -> None:
    """Log the run's size, model, cautions and start in a few lines.

    The run goes on from its own checkpoint, from that of another run, or from neither.
    """
    parameters = sum(math.prod(shape) for shape in student.shapes.values())
    log.info(
        "%s: %d images, %s of %d steps; step = %d images = %s x %d x %d (micro-batches)",
        config.data.sources_text,
        plan.num_images,
        count_text(config.train.epochs, "epoch"),
        plan.steps_per_epoch,
        plan.batch_size,
        count_text(plan.world_size, "rank"),
        plan.micro_batch_size,
        plan.accumulation_steps,
    )
    trained = parameters - sum(p.numel() for p in student.frozen.parameters.values())
    log.info(
        "%s, %.2f M parameters%s%s; ZeRO stage %d, %s; teacher %.1f MB per rank",
        config.model.backbone,
        parameters / 1e6,
        " with head" if config.has_heads else "",
        f", {trained / 1e6:.2f} M of them train" if trained < parameters else "",
        config.engine.zero_stage,
        config.engine.precision,
        teacher.num_bytes() / 1e6,
    )
    if config.data.channels != 3:
        log.info("%d channels are not RGB: saturation, hue and gray are off", config.data.channels)
    cores = available_cores()
    workers = config.data.num_workers * process.local_world_size
    if workers > cores:
        log.warning("%d data workers share %d cores; lower data.num_workers", workers, cores)
    state = None if resumed_from is None else resumed_from.state
    then = None if state is None else state["plan"]
    begun = other if resumed_from is None else resumed_from
    with_anchor = begun.state["config"] if begun is not None and begun.has_anchor else None
    for caution in (
        batch_norm_caution(config, plan, then),
        koleo_caution(config, plan, then),
        drawn_images_caution(config),
        None if state is None else initial_weights_caution(config, state["config"]),
        anchor_caution(config, with_anchor),
        frozen_teacher.recipe_caution(config),
    ):
        if caution is not None:
            log.warning("%s", caution)
    if resumed_from is not None:
        left = plan.stop_step - resumed_from.step
        log.info("resuming from %s, %d steps left", resumed_from.path, max(left, 0))
