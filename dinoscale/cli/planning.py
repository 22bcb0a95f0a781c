"""What runs before a training: config, plan, doctor, bench, show, presets."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import add_config
from dinoscale.runtime.launcher_env import read_process

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands
    from dinoscale.config import RunConfig


def add_planning(commands: SubCommands) -> None:
    """What runs before a training, without a GPU."""
    config = commands.add_parser(
        "config",
        help="print the resolved configuration and plan; needs no GPU",
        description="Print every setting in force and what it means in steps, absolute learning"
        " rate, micro-batch and accumulation for a number of ranks.",
    )
    add_config(config)
    config.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks (default 1)")
    config.add_argument("--json", action="store_true", help="one JSON object instead of text")
    config.set_defaults(run=_config)
    _add_plan(commands)
    doctor = commands.add_parser(
        "doctor",
        help="check machine, network, data, disk and plan before a long run; trains nothing",
        description="Pre-flight. Put `doctor` where `train` will stand, under the same launcher"
        " and with the same settings: all ranks check versions, devices, CPU cores, bf16, shared"
        " memory, the network between them, the images, run_dir and the room for checkpoints."
        " Without CONFIG, the machine alone. Sentences go to stderr, one JSON object to stdout;"
        " exit code 2 if there is a problem, 0 if there are warnings at most.",
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
    presets = commands.add_parser("presets", help="list the presets, with what each is")
    presets.set_defaults(run=_presets)


def _add_plan(commands: SubCommands) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory, hours and communication on given GPUs, before they are there",
        description="Work out, from sizes alone, what a run needs: FLOPs of an image; the largest"
        " micro-batch at each ZeRO stage with nothing, the pointwise operations, all but attention"
        " or whole blocks recomputed; where the memory of a GPU goes at the fullest moment of a"
        " step; images/s and hours; what is sent between GPUs and what of it a step waits for."
        " Ends with the cheapest way that fits. Predicted memory has been compared with steps on"
        " CPUs, not with a GPU's allocator.",
        epilog="example: dinoscale plan vit_l16 train.batch_size=2048 --gpus 16 --gpu h100"
        " --network 25",
    )
    add_config(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the run")
    plan.add_argument(
        "--gpu", default="h100", metavar="NAME", help="which (default h100; another lists them)"
    )
    plan.add_argument(
        "--gpu-memory", metavar="SIZE", help="of one, as 80GB or 24GiB (default: what it has)"
    )
    plan.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of the published FLOP/s that the model's own FLOPs get (default 0.4; `dinoscale bench"
        " step` measures it)",
    )
    plan.add_argument(
        "--network",
        type=float,
        metavar="GB/s",
        help="what one GPU sends to other machines (default 50), or on one machine to the others"
        " (default: its links)",
    )
    plan.add_argument(
        "--node-gpus", type=int, default=8, metavar="N", help="GPUs of a machine (default 8)"
    )
    plan.add_argument(
        "--storage",
        type=float,
        default=10.0,
        metavar="GB/s",
        help="what all ranks together write to run_dir (default 10)",
    )
    _add_restart(plan)
    plan.add_argument("--json", action="store_true", help="one JSON object instead of text")
    plan.set_defaults(run=_plan)


def _add_restart(plan: argparse.ArgumentParser) -> None:
    """What a failure costs on many machines."""
    for name, default, what in (
        ("hang", None, "until a failure is noticed, at most (default: train.hang_timeout_s)"),
        ("requeue", 300.0, "until the machines are there again (default 300)"),
        ("start", 120.0, "until Python is loaded and the ranks have met (default 120)"),
        ("index", 30.0, "until the images are listed or their index is read (default 30)"),
    ):
        plan.add_argument(f"--{name}", type=float, default=default, metavar="SECONDS", help=what)


def _add_data_views(commands: SubCommands) -> None:
    """What one wants to know about the images of a run before it."""
    bench = commands.add_parser("bench", help="measure parts of a run")
    tasks = bench.add_subparsers(dest="task", required=True, metavar="TASK")
    data = tasks.add_parser(
        "data",
        help="how many images per second this machine can feed, and what limits it",
        description="Measure each part of the input with the images, sizes and micro-batch of a"
        " run: reading and decoding and crops of one core, while all others do the same; transfer,"
        " what the training device does; then the real loader. Sentences go to stderr, one JSON"
        " object to stdout.",
    )
    add_config(data)
    data.add_argument(
        "--gpu-images-per-s",
        type=float,
        default=2500.0,
        metavar="RATE",
        help="what one GPU trains, to work out the workers it needs (default 2500)",
    )
    data.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="for each part (default 5)"
    )
    data.set_defaults(run=_bench_data)
    _add_bench_step(tasks)

    show = commands.add_parser("show", help="draw what a run would see")
    tasks = show.add_subparsers(dest="task", required=True, metavar="TASK")
    crops = tasks.add_parser(
        "crops",
        help="images with the boxes of their crops, and every crop as the network sees it",
        description="Draw a contact sheet: one row an image, its crops as in training.",
    )
    add_config(crops)
    crops.add_argument("--images", type=int, default=6, metavar="N", help="rows (default 6)")
    crops.add_argument("--out", default="crops.png", metavar="PNG", help="default crops.png")
    crops.add_argument("--epoch", type=int, default=0, metavar="E", help="from 0 (default 0)")
    crops.add_argument(
        "--plain", action="store_true", help="by the slow reference (data.color_ops_on=workers)"
    )
    crops.set_defaults(run=_show_crops)


def _add_bench_step(tasks: SubCommands) -> None:
    step = tasks.add_parser(
        "step",
        help="images per second of a training step, where its time goes, and its peak memory",
        description="Take real optimizer steps of a run, on random pictures or, with data.train,"
        " on its own through its loader; same line under python, deepspeed, torchrun, srun. The"
        " time is split into data, transfer, augmentation, teacher, student, loss, backward,"
        " optimizer and average; FLOP/s are compared with what products of large matrices reach"
        " here (operations by formula, nothing recomputed is counted). From a checkout, the"
        " literal reference step takes turns with ours on the same crops: trust the ratios within"
        " a turn. A table goes to stderr, one JSON object to stdout.",
        epilog="example: dinoscale bench step vit_s16 train.batch_size=64 --turns 5",
    )
    add_config(step)
    step.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="of steps for each side in each turn, at least one step (default 10)",
    )
    step.add_argument("--turns", type=int, default=3, metavar="N", help="default 3")
    step.add_argument(
        "--minutes",
        type=float,
        default=6.0,
        metavar="M",
        help="for all turns (default 6): where this machine is too slow, images of a step, turns"
        " and the reference are left out, and said",
    )
    step.add_argument(
        "--no-reference", action="store_true", help="measure our step alone, without ratios"
    )
    step.add_argument(
        "--profile", metavar="DIR", help="also write chrome traces of some steps, rankN.json"
    )
    step.set_defaults(run=_bench_step)


def _config(options: argparse.Namespace) -> dict[str, Any] | None:
    from dinoscale.config import load_config
    from dinoscale.config.resolve import describe, describe_text, resolve, without_auto

    config = load_config(options.config, options.overrides)
    plan = None
    if config.data.sources:
        from dinoscale.data.decoding.decode import Decoder
        from dinoscale.data.sources.mixture import open_sources, source_sizes

        source = open_sources(
            [part.source for part in config.data.sources],
            Decoder(config.data.channels, config.data.max_pixel_value),
            manifest=config.data.manifest,
            subset_size=config.data.subset_size,
            max_lost=config.data.max_bad_fraction,
        )
        sizes = source_sizes(source)
        plan = resolve(without_auto(config), world_size=options.world_size, num_images=sizes)
    if options.json:
        return describe(config, plan)
    print(describe_text(config, plan), end="")
    return None


def _plan(options: argparse.Namespace) -> dict[str, Any] | None:
    from dinoscale.config import load_config

    config = load_config(options.config, options.overrides)
    from dinoscale.planning.plan.failures import Restart
    from dinoscale.planning.plan.report import make_plan
    from dinoscale.planning.plan.table import as_text

    plan = make_plan(
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
    if options.json:
        return plan
    print(as_text(plan), end="")
    return None


def _doctor(options: argparse.Namespace) -> None:
    from dinoscale.errors import ConfigError, LaunchError

    if not 0 < options.timeout <= 86400:
        raise ConfigError(f"--timeout: need more than 0 and at most a day, got {options.timeout}")
    try:
        from dinoscale.runtime import distributed
    except (ImportError, OSError) as error:
        raise LaunchError(f"torch does not load: {error}; install it anew") from error
    from dinoscale.cluster.doctor.examine import examine

    process = read_process(os.environ)
    report = examine(options.config, options.overrides, process, timeout_s=options.timeout)
    if process.rank == 0:
        print(json.dumps(report.as_json()), flush=True)
    if report.lost:  # no leaving in good order
        raise LaunchError(report.lost)
    distributed.stop()  # of all together: launchers end all as soon as one ends with a 2
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler tells of each start
    from dinoscale.cli.ranks import joined, prepared

    config, bench_step = prepared(lambda: _step_to_measure(options))
    process = read_process(os.environ)
    with joined(process):
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


def _step_to_measure(
    options: argparse.Namespace,
) -> tuple[RunConfig, Callable[..., dict[str, Any]]]:
    """The configuration, and what measures: a library may be missing on one node alone."""
    from dinoscale.config import load_config

    config = load_config(options.config, options.overrides)
    from dinoscale.planning.bench.step import bench_step

    return config, bench_step


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

    told = describe_presets()
    width = max(map(len, told), default=0)
    print("\n".join(f"{name:<{width}}  {what}" for name, what in told.items()))
