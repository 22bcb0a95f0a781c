"""The commands before a training: recipe, config, plan, doctor, bench, show, presets."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import add_config, add_num_workers, add_number
from dinoscale.runtime.launcher_env import read_process

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands
    from dinoscale.config import RunConfig, RunPlan


def add_planning(commands: SubCommands) -> None:
    """Add `recipe`, `config`, `plan`, `doctor`, `bench`, `show` and `presets`."""
    _add_recipe(commands)
    config = commands.add_parser(
        "config",
        help="print every setting and the steps and rates that follow; needs no GPU",
        description="Print the value of every setting. If data.train is set, also print what"
        " follows for a number of ranks: steps, absolute learning rate, micro-batch and gradient"
        " accumulation.",
    )
    add_config(config)
    config.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="number of ranks (default 1)"
    )
    config.add_argument("--json", action="store_true", help="one JSON object instead of text")
    config.set_defaults(run=_config)
    _add_plan(commands)
    doctor = commands.add_parser(
        "doctor",
        help="check machine, network, data, disk and plan before a long run; trains nothing",
        description="Check the machine before a run. Call it with the launcher and settings of the"
        " run, `doctor` in place of `train`: all ranks check versions, devices, CPU cores, bf16,"
        " shared memory, the network between them, the images, run_dir and the disk space for"
        " checkpoints. Without CONFIG only the machine is checked. Sentences go to stderr, one JSON"
        " object to stdout. The exit code is 2 if there is a problem, else 0, also with warnings.",
    )
    add_config(doctor, required=False)
    doctor.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long to wait for a rank that does not answer (default 300); give it last",
    )
    doctor.set_defaults(run=_doctor)
    _add_data_views(commands)
    presets = commands.add_parser(
        "presets",
        help="list the presets and describe each",
        description="List the presets: names that any CONFIG argument takes.",
    )
    presets.set_defaults(run=_presets)


def _add_recipe(commands: SubCommands) -> None:
    recipe = commands.add_parser(
        "recipe",
        help="look at a set of images and write a preset that suits it, with reasons",
        description="Look at a sample of the images (number, sizes, channels, copies) and write a"
        " commented preset: prototypes, images of a step, epochs, momentum, crops and patches, each"
        " with its reason and its source. Then print the line that trains with it. Nothing is"
        " chosen elsewhere: edit the file.",
        epilog="examples:\n  dinoscale recipe /data/images --gpus 8\n"
        "  dinoscale recipe '/data/train-{000..099}.tar' --from dinov2_vitb14_pretrain.pth",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe.add_argument(
        "data", metavar="DATA", help="the images: one source of data.train, on a disk"
    )
    recipe.add_argument(
        "--model",
        choices=("s", "b", "l"),
        help="ViT-S, B or L/16 (default: s up to the size of ImageNet-1k, b beyond)",
    )
    add_number(recipe, "--gpus", "GPUs of the run", default=1)
    recipe.add_argument(
        "--from",
        dest="weights",
        metavar="WEIGHTS",
        help="go on from these weights of a ViT, instead of from scratch",
    )
    recipe.add_argument(
        "--out",
        type=Path,
        default=Path("recipe.yaml"),
        metavar="FILE",
        help="file to write; must not exist (default recipe.yaml)",
    )
    add_number(recipe, "--images", "images to look at, the same every time", default=1000)
    add_num_workers(recipe)
    recipe.set_defaults(run=_recipe)


def _recipe(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.recipe.write import write_recipe

    return write_recipe(
        options.data,
        options.out,
        model=options.model,
        gpus=options.gpus,
        weights=options.weights,
        images=options.images,
        workers=options.num_workers,
    )


def _add_plan(commands: SubCommands) -> None:
    plan = commands.add_parser(
        "plan",
        help="predict memory, hours and communication on given GPUs; needs no GPU",
        description="Predict what a run needs, from the sizes of its tensors: FLOPs per image; the"
        " largest micro-batch at each ZeRO stage, with nothing, pointwise operations, all but"
        " attention, or whole blocks recomputed; the peak memory of a GPU by kind; images/s and"
        " hours; communication between GPUs, and how much of it a step waits for. Recommends the"
        " cheapest settings that fit. Predicted memory has been compared with steps on CPUs, not"
        " with a GPU's allocator.",
        epilog="example: dinoscale plan vit_l16 train.batch_size=2048 --gpus 16 --gpu h100"
        " --network 25",
    )
    add_config(plan)
    plan.add_argument(
        "--gpus", type=int, required=True, metavar="N", help="number of GPUs, one rank on each"
    )
    plan.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="kind of GPU (default h100; an unknown name lists the known ones)",
    )
    plan.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="memory of one GPU, such as 80GB or 24GiB (default: as published for --gpu)",
    )
    plan.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="model FLOP/s utilization: share of the published FLOP/s that the model's own FLOPs"
        " reach (default 0.4; `dinoscale bench step` measures it)",
    )
    plan.add_argument(
        "--network",
        type=float,
        metavar="GB/s",
        help="bandwidth of one GPU, one way: to other nodes (default 50), or if there is one node"
        " to its other GPUs (default: as published for --gpu)",
    )
    plan.add_argument(
        "--node-gpus", type=int, default=8, metavar="N", help="GPUs per node (default 8)"
    )
    plan.add_argument(
        "--storage",
        type=float,
        default=10.0,
        metavar="GB/s",
        help="speed at which all ranks together write to run_dir (default 10)",
    )
    _add_restart(plan)
    plan.add_argument("--json", action="store_true", help="one JSON object instead of text")
    plan.set_defaults(run=_plan)


def _add_restart(plan: argparse.ArgumentParser) -> None:
    """Add the options for what a failure costs on several nodes."""
    for name, default, what in (
        (
            "hang",
            None,
            "after a failure: longest time until it is noticed (default: train.hang_timeout_s)",
        ),
        ("requeue", 300.0, "after a failure: until the nodes are available again (default 300)"),
        ("start", 120.0, "at a start: until Python is loaded and the ranks met (default 120)"),
        ("index", 30.0, "at a start: until the images are listed or indexed (default 30)"),
    ):
        plan.add_argument(f"--{name}", type=float, default=default, metavar="SECONDS", help=what)


def _add_data_views(commands: SubCommands) -> None:
    """Add `bench` and `show`."""
    bench = commands.add_parser(
        "bench",
        help="measure the speed of the input or of the training step",
        description="Measure the speed of a part of a run on this machine.",
    )
    tasks = bench.add_subparsers(dest="task", required=True, metavar="TASK")
    data = tasks.add_parser(
        "data",
        help="how many images per second this machine can feed, and what limits it",
        description="Measure each part of a run's input, with its images, sizes and micro-batch:"
        " reading and decoding, and cutting crops, on one core while the others do the same; the"
        " transfer; the augmentation on the training device; then the real loader. Sentences go to"
        " stderr, one JSON object to stdout.",
    )
    add_config(data)
    data.add_argument(
        "--gpu-images-per-s",
        type=float,
        default=2500.0,
        metavar="RATE",
        help="images/s that one GPU trains; says how many workers feed it (default 2500)",
    )
    data.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="seconds per part (default 5)"
    )
    data.set_defaults(run=_bench_data)
    _add_bench_step(tasks)

    show = commands.add_parser(
        "show",
        help="draw the crops that a run trains on",
        description="Draw the input of a run.",
    )
    tasks = show.add_subparsers(dest="task", required=True, metavar="TASK")
    crops = tasks.add_parser(
        "crops",
        help="images with the boxes of their crops, and every crop as the network sees it",
        description="Draw a contact sheet with one row per image: the image with the boxes of its"
        " crops, then the crops as in training. Under each crop: its share of the image, and"
        " what was done to it; the letters after `jitter` are the order of (B)rightness,"
        " (C)ontrast, (S)aturation and (H)ue, the number after `blur` is a radius in pixels."
        " Patches that are masked for the student (ibot.loss_weight) are dark.",
    )
    add_config(crops)
    crops.add_argument(
        "--images", type=int, default=6, metavar="N", help="number of rows (default 6)"
    )
    crops.add_argument(
        "--out", default="crops.png", metavar="PNG", help="file to write (default crops.png)"
    )
    crops.add_argument(
        "--epoch",
        type=int,
        default=0,
        metavar="E",
        help="epoch whose random crops to draw, from 0 (default 0)",
    )
    crops.add_argument(
        "--plain",
        action="store_true",
        help="augment with the slow reference implementation (data.color_ops_on=workers)",
    )
    crops.set_defaults(run=_show_crops)


def _add_bench_step(tasks: SubCommands) -> None:
    step = tasks.add_parser(
        "step",
        help="images per second of a training step, where its time goes, and its peak memory",
        description="Time real optimizer steps of a run, on its images through its loader if"
        " data.train is set, else on random pictures; same line under python, deepspeed, torchrun,"
        " srun. The time is split into data, transfer, augmentation, teacher, student, loss,"
        " backward, optimizer and EMA. FLOP/s are by formula, without recomputation, and compared"
        " with those of large matrix products on this device. In a checkout, ours and a literal"
        " implementation of the reference step take turns on the same crops: trust the ratios"
        " within a turn. A table goes to stderr, one JSON object to stdout.",
        epilog="example: dinoscale bench step vit_s16 train.batch_size=64 --turns 5",
    )
    add_config(step)
    step.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds of steps, for ours and the reference in each turn; at least one step"
        " (default 10)",
    )
    step.add_argument(
        "--turns", type=int, default=3, metavar="N", help="number of turns (default 3)"
    )
    step.add_argument(
        "--minutes",
        type=float,
        default=6.0,
        metavar="M",
        help="limit for all turns (default 6): on a slow machine, steps get fewer images and turns"
        " or the reference are omitted, with a message",
    )
    step.add_argument(
        "--no-reference", action="store_true", help="measure only our step, without ratios"
    )
    step.add_argument(
        "--profile", metavar="DIR", help="also write chrome traces of some steps, rankN.json"
    )
    step.set_defaults(run=_bench_step)


def _config(options: argparse.Namespace) -> None:
    from dinoscale.config import dump_config, load_config, phases_of
    from dinoscale.config.resolve import RunPlan, comments_on, describe
    from dinoscale.errors import DinoscaleError

    config = load_config(options.config, options.overrides)
    names = [phase.name for phase in config.phases]
    runs = dict(zip(names, phases_of(config), strict=True)) if names else {"": config}
    plans, errors = dict[str, RunPlan | None](), dict[str, DinoscaleError]()
    for name, run in runs.items():
        plans[name] = None
        try:
            if run.data.sources:
                plans[name] = _plan_of(run, world_size=options.world_size)
        except DinoscaleError as error:
            errors[name] = error  # the settings are shown nevertheless
    if options.json:
        of_runs = {name: describe(run, plans[name]) for name, run in runs.items()}
        print(json.dumps({**describe(config, None), "phases": of_runs} if names else of_runs[""]))
    else:
        text = dump_config(config)
        for name, run in runs.items():
            text += comments_on(run, plans[name], errors.get(name), of=f"{name}." if name else "")
        print(text, end="")
    for first in errors.values():
        raise first


def _plan_of(config: RunConfig, *, world_size: int) -> RunPlan:
    """The plan for the images of a run, which are counted."""
    from dinoscale.config.resolve import resolve, without_auto
    from dinoscale.data.decoding.decode import Decoder
    from dinoscale.data.sources.mixture import open_sources, source_sizes

    source = open_sources(
        [part.source for part in config.data.sources],
        Decoder(config.data.channels, config.data.max_pixel_value),
        manifest=config.data.manifest,
        subset_size=config.data.subset_size,
        max_lost=config.data.max_bad_fraction,
    )
    return resolve(without_auto(config), world_size=world_size, num_images=source_sizes(source))


def _plan(options: argparse.Namespace) -> dict[str, Any] | None:
    from dinoscale.config import load_config, phases_of

    config = load_config(options.config, options.overrides)
    from dinoscale.planning.plan.report import plan_of_phases
    from dinoscale.planning.plan.table import as_text, text_of_phases

    runs = phases_of(config)
    _warn_of_missing_weights(config, runs)
    if config.phases:
        phases = {
            phase.name: _plan_of_run(run, options)
            for phase, run in zip(config.phases, runs, strict=True)
        }
        found, text = plan_of_phases(phases), text_of_phases
    else:
        found, text = _plan_of_run(config, options), as_text
    if options.json:
        return found
    print(text(found), end="")
    return None


def _warn_of_missing_weights(config: RunConfig, runs: Sequence[RunConfig]) -> None:
    """Say that the run would not start where it is planned, for want of a teacher."""
    from dinoscale.errors import DinoscaleError
    from dinoscale.training.phases import require_teachers

    try:
        require_teachers(config, runs)
    except DinoscaleError as error:  # the run may be meant for another machine
        print(f"a run here would not start: {error}", file=sys.stderr)


def _plan_of_run(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.planning.plan.failures import Restart
    from dinoscale.planning.plan.report import make_plan

    return make_plan(
        config,
        gpus=options.gpus,
        gpu=options.gpu,
        gpu_memory=options.gpu_memory,
        utilization=options.utilization,
        network=options.network,
        node_gpus=options.node_gpus,
        storage=options.storage,
        restart=Restart(
            hang_s=config.train.hang_timeout_s if options.hang is None else options.hang,
            requeue_s=options.requeue,
            start_s=options.start,
            index_s=options.index,
        ),
    )


def _doctor(options: argparse.Namespace) -> None:
    from dinoscale.errors import ConfigError, LaunchError

    if not 0 < options.timeout <= 86400:
        raise ConfigError(f"--timeout: need more than 0 and at most a day, got {options.timeout}")
    try:
        from dinoscale.runtime import distributed
    except (ImportError, OSError) as error:
        raise LaunchError(f"torch does not load: {error}; reinstall it") from error
    from dinoscale.cluster.doctor.examine import examine

    process = read_process(os.environ)
    report = examine(options.config, options.overrides, process, timeout_s=options.timeout)
    if process.rank == 0:
        print(json.dumps(report.as_json()), flush=True)
    if report.lost:  # the ranks cannot end together
        raise LaunchError(report.lost)
    distributed.stop()  # all together: launchers kill the others as soon as one exits with 2
    if report.count("problem"):
        raise SystemExit(2)


def _bench_data(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.config import load_config

    config = load_config(options.config, options.overrides)
    from dinoscale.planning.bench.data import bench_data

    return bench_data(
        config,
        gpu_images_per_s=options.gpu_images_per_s,
        seconds=options.seconds,
    )


def _bench_step(options: argparse.Namespace) -> dict[str, Any] | None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler logs each of its starts
    from dinoscale.cli.ranks import joined_ranks, load_and_import

    config, bench_step = load_and_import(options, _import_bench_step)
    process = read_process(os.environ)
    with joined_ranks(process):
        result = bench_step(
            config,
            process,
            seconds=options.seconds,
            turns=options.turns,
            with_reference=not options.no_reference,
            trace_dir=Path(options.profile) if options.profile else None,
            limit_s=60 * options.minutes,
        )
    return result if process.rank == 0 else None


def _import_bench_step() -> Callable[..., dict[str, Any]]:
    from dinoscale.planning.bench.step import bench_step

    return bench_step


def _show_crops(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.config import load_config

    plain = ["data.color_ops_on=workers"] if options.plain else []
    config = load_config(options.config, [*options.overrides, *plain])
    from dinoscale.reports.crop_sheet import show_crops

    return show_crops(
        config,
        num_images=options.images,
        epoch=options.epoch,
        out=Path(options.out),
    )


def _presets(_options: argparse.Namespace) -> None:
    from dinoscale.config import describe_presets

    presets = describe_presets()
    width = max(map(len, presets), default=0)
    print("\n".join(f"{name:<{width}}  {what}" for name, what in presets.items()))
