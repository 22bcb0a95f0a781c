"""The command line: parse, call one function, print JSON on stdout and the rest on stderr."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.command import add_commands as add_data_commands

_EPILOG = """examples:
  dinoscale train vit_s16 data.train=/data/images run_dir=runs/first
  deepspeed --module dinoscale train vit_s16 data.train='/data/train-{000..099}.tar'
  torchrun --nproc-per-node 8 -m dinoscale train my_run.yaml engine.zero_stage=3
  deepspeed --module dinoscale doctor vit_s16 data.train=/data/images run_dir=runs/first
  dinoscale config vit_b16 train.batch_size=512 --world-size 8
  dinoscale plan vit_l16 --gpus 8 --gpu h100 --gpu-memory 80GB
  dinoscale export runs/first weights.safetensors
  dinoscale data build-shards /data/images shards/
  dinoscale evaluate knn weights.safetensors --train /data/train --test /data/val

exit codes: 0 done, 1 the run failed, 2 bad input (the message says what and how to mend it),
75 asked to stop by SIGTERM or SIGUSR1 and saved: the same command goes on."""

_CONFIG_HELP = "name of a preset (see `dinoscale presets`) or path of a YAML file"
_OVERRIDE_HELP = "settings that win over the file, for example optim.lr=1e-3"
_DATA_HELP = "labelled images: a folder of class folders, tar shards, or synthetic:..."


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="dinoscale",
        description="Pre-train DINO Vision Transformers on your own images with DeepSpeed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="pre-train, or go on with a run; same line under python, deepspeed, torchrun, srun",
        description="Pre-train. Everything is written to run_dir: config.yaml (training from it"
        " repeats the run), metrics.jsonl, bad_samples.jsonl, checkpoints/. A run directory with"
        " checkpoints is continued from the newest.",
    )
    _add_config(train)
    train.set_defaults(run=_train)
    _add_planning(commands)
    _add_results(commands)
    add_data_commands(commands)
    quickstart = commands.add_parser(
        "quickstart",
        help="learn a drawn image set on two processes of this machine, in minutes",
        description="Draw labelled images, pre-train a small ViT on them without the labels, and"
        " compare its k-NN accuracy with the untrained network's and with raw pixels.",
    )
    quickstart.add_argument("--run-dir", default="runs/quickstart", metavar="DIR")
    quickstart.set_defaults(run=_quickstart)
    return top


def _add_planning(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What runs before a training, without a GPU."""
    config = commands.add_parser(
        "config",
        help="print the resolved configuration and plan; needs no GPU",
        description="Print every setting in force and what it means in steps, absolute learning"
        " rate, micro-batch and accumulation for a number of ranks.",
    )
    _add_config(config)
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
    doctor.add_argument("config", nargs="?", metavar="CONFIG", help=_CONFIG_HELP)
    doctor.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDE_HELP)
    doctor.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long to wait for a rank that does not answer (default 300); give it last",
    )
    doctor.set_defaults(run=_doctor)
    _add_data_views(commands)
    presets = commands.add_parser("presets", help="list the presets")
    presets.set_defaults(run=_presets)


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
    _add_config(plan)
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
        help="what one GPU sends to the others (default: the links within a machine of up to 8"
        " GPUs, 50 beyond)",
    )
    plan.add_argument("--json", action="store_true", help="one JSON object instead of text")
    plan.set_defaults(run=_plan)


def _add_data_views(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What one wants to know about the images of a run before it."""
    bench = commands.add_parser("bench", help="measure parts of a run")
    tasks = bench.add_subparsers(dest="task", required=True, metavar="TASK")
    data = tasks.add_parser(
        "data",
        help="how many images per second this machine can feed, and what limits it",
        description="Measure each part of the input with the images, sizes and micro-batch of a"
        " run: reading and decoding, crops, transfer, what the training device does; then the real"
        " loader. Sentences go to stderr, one JSON object to stdout.",
    )
    _add_config(data)
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
    _add_config(crops)
    crops.add_argument("--images", type=int, default=6, metavar="N", help="rows (default 6)")
    crops.add_argument("--out", default="crops.png", metavar="PNG", help="default crops.png")
    crops.add_argument("--epoch", type=int, default=0, metavar="E", help="from 0 (default 0)")
    crops.add_argument(
        "--plain", action="store_true", help="by the slow reference (data.colors=workers)"
    )
    crops.set_defaults(run=_show_crops)


def _add_bench_step(tasks: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
    _add_config(step)
    step.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="of steps for each side in each turn, at least one step (default 10)",
    )
    step.add_argument("--turns", type=int, default=3, metavar="N", help="default 3")
    step.add_argument(
        "--no-reference", action="store_true", help="measure our step alone, without ratios"
    )
    step.add_argument(
        "--profile", metavar="DIR", help="also write chrome traces of some steps, rankN.json"
    )
    step.set_defaults(run=_bench_step)


def _add_results(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What one does with a trained network."""
    export = commands.add_parser(
        "export",
        help="write a run's backbone as plain PyTorch weights (safetensors)",
        description="Write the backbone under the reference's tensor names, from any ZeRO stage"
        " and number of ranks, on one process without a GPU.",
    )
    _add_export(export)

    _add_checkpoint(commands)

    evaluate = commands.add_parser("evaluate", help="measure a backbone")
    tasks = evaluate.add_subparsers(dest="task", required=True, metavar="TASK")
    knn = tasks.add_parser(
        "knn",
        help="weighted k-NN accuracy by the published protocol",
        description="Weighted k-NN (T 0.07) on frozen features of a labelled train and test set.",
    )
    _add_weights(knn)
    knn.add_argument("--train", required=True, metavar="DATA", help=_DATA_HELP)
    knn.add_argument("--test", required=True, metavar="DATA", help=_DATA_HELP)
    knn.add_argument("--k", type=int, nargs="+", default=None, help="default 10 20 100 200")
    knn.add_argument("--batch-size", type=int, default=64, metavar="N")
    knn.add_argument("--num-workers", type=int, default=2, metavar="N")
    knn.add_argument("--pixels", action="store_true", help="also 16 x 16 pixels as features")
    knn.set_defaults(run=_evaluate_knn)

    attention = tasks.add_parser(
        "attention",
        help="draw where the class token of a ViT looks, per head",
        description="Draw the attention of the last block over some images into a PNG. For"
        " synthetic sets, whose masks are known, also how well it covers the objects.",
    )
    _add_weights(attention)
    attention.add_argument("images", metavar="DATA", help="a folder, tar shards, or synthetic:...")
    attention.add_argument("out", metavar="OUT.png", help="picture to write")
    attention.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of the image the network sees"
    )
    attention.set_defaults(run=_evaluate_attention)


def _add_checkpoint(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What one does with the checkpoints of a run."""
    checkpoint = commands.add_parser(
        "checkpoint",
        help="list, verify, export, reshard or prune the checkpoints of a run",
        description="Look at and tidy up RUN/checkpoints. A run goes on from its newest undamaged"
        " checkpoint by itself, on any number of ranks and at any ZeRO stage.",
    )
    tasks = checkpoint.add_subparsers(dest="task", required=True, metavar="TASK")
    run_help = "run directory or one of its step_*"

    of_run = tasks.add_parser("list", help="steps, sizes, ranks and k-NN accuracies")
    of_run.add_argument("run_dir", metavar="RUN", help="run directory")
    of_run.set_defaults(run=_checkpoint_list)

    verify = tasks.add_parser(
        "verify", help="compare all files with their checksums; exit code 2 if one differs"
    )
    verify.add_argument("run_dir", metavar="RUN", help=run_help)
    verify.set_defaults(run=_checkpoint_verify)

    _add_export(tasks.add_parser("export", help="the same as `dinoscale export`"))

    reshard = tasks.add_parser(
        "reshard",
        help="write a checkpoint anew with another number of files",
        description="Write a checkpoint into another run directory with N shard files. Not needed"
        " to go on with another number of ranks: every checkpoint loads on any.",
    )
    reshard.add_argument("run_dir", metavar="RUN", help=run_help)
    reshard.add_argument("out", metavar="OUT_RUN", help="run directory to write")
    reshard.add_argument("--shards", type=int, default=1, metavar="N", help="files (default 1)")
    reshard.set_defaults(run=_checkpoint_reshard)

    prune = tasks.add_parser(
        "prune",
        help="delete checkpoints, but never the newest undamaged one",
        description="Delete what no rule keeps. Files are verified first; damaged checkpoints"
        " count for no rule and are left alone.",
    )
    prune.add_argument("run_dir", metavar="RUN", help="run directory")
    prune.add_argument("--keep-last", type=int, default=1, metavar="N", help="newest (default 1)")
    prune.add_argument("--keep-every-steps", type=int, metavar="N", help="multiples of N steps")
    prune.add_argument("--no-best", action="store_true", help="do not keep the best by k-NN")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    prune.set_defaults(run=_checkpoint_prune)


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument("weights", metavar="WEIGHTS", help=".safetensors of ours, or a DINO .pth")
    command.add_argument(
        "--num-heads", type=int, metavar="N", help="of a DINO .pth whose heads are not 64 wide"
    )


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="RUN", help="run directory or one of its step_*")
    command.add_argument("out", metavar="OUT.safetensors", help="file to write")
    command.add_argument("--network", choices=("teacher", "student"), default="teacher")
    command.set_defaults(run=_export)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help=_CONFIG_HELP)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDE_HELP)


def run(arguments: Sequence[str]) -> None:
    """Parse and run one command.

    Raises:
        DinoscaleError: as the command does.
        SystemExit: with 2, the arguments are wrong; with 0, after --help.
    """
    # The deepspeed launcher inserts --local_rank=N; the environment says the same.
    own = [argument for argument in arguments if not argument.startswith("--local_rank")]
    options = parser().parse_args(own)
    result = options.run(options)
    if result is not None:
        print(json.dumps(result), flush=True)


def _train(options: argparse.Namespace) -> dict[str, Any] | None:
    # Else a lost rank is reported by screens of C++ frames, around the one line that says which.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dinoscale.config import load_config

    config = load_config(options.config, options.overrides)
    from dinoscale import distributed
    from dinoscale.trainer import train

    process = distributed.read_process(os.environ)
    # A minute more than the watchdog, which has more to say than a collective that gave up.
    distributed.start(process, timeout_s=config.train.hang_timeout_s + 60)
    summary = train(config, process)
    distributed.stop()
    return summary if process.rank == 0 else None


def _config(options: argparse.Namespace) -> dict[str, Any] | None:
    from dinoscale.config import load_config
    from dinoscale.config.resolve import describe, describe_text, resolve, without_auto

    config = load_config(options.config, options.overrides)
    plan = None
    if config.data.sources:
        from dinoscale.data.decode import Decoder
        from dinoscale.data.mixture import open_sources, source_sizes

        specs = [part.source for part in config.data.sources]
        decoder = Decoder(config.data.channels, config.data.white)
        sizes = source_sizes(open_sources(specs, decoder, manifest=config.data.manifest))
        plan = resolve(without_auto(config), world_size=options.world_size, num_images=sizes)
    if options.json:
        return describe(config, plan)
    print(describe_text(config, plan), end="")
    return None


def _plan(options: argparse.Namespace) -> dict[str, Any] | None:
    from dinoscale.config import load_config
    from dinoscale.plan.report import make_plan
    from dinoscale.plan.table import as_text

    plan = make_plan(
        load_config(options.config, options.overrides),
        gpus=options.gpus,
        gpu=options.gpu,
        gpu_memory=options.gpu_memory,
        utilization=options.utilization,
        network=options.network,
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
        from dinoscale import distributed
    except (ImportError, OSError) as error:
        raise LaunchError(f"torch does not load: {error}; install it anew") from error
    from dinoscale.doctor.examine import examine

    process = distributed.read_process(os.environ)
    report = examine(options.config, options.overrides, process, timeout_s=options.timeout)
    if process.rank == 0:
        print(json.dumps(report.as_json()), flush=True)
    if report.lost:  # no leaving in good order
        raise LaunchError(report.lost)
    distributed.gather_objects(None)  # launchers end all ranks as soon as one ends with a 2
    distributed.stop()
    if report.count("problem"):
        raise SystemExit(2)


def _bench_data(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.bench.data import bench_data
    from dinoscale.config import load_config

    return bench_data(
        load_config(options.config, options.overrides),
        gpu_images_per_s=options.gpu_images_per_s,
        seconds=options.seconds,
    )


def _bench_step(options: argparse.Namespace) -> dict[str, Any] | None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler tells of each start
    from dinoscale.config import load_config

    config = load_config(options.config, options.overrides)
    from dinoscale import distributed
    from dinoscale.bench.step import bench_step

    process = distributed.read_process(os.environ)
    distributed.start(process)
    result = bench_step(
        config,
        process,
        seconds=options.seconds,
        turns=options.turns,
        with_reference=not options.no_reference,
        trace_dir=Path(options.profile) if options.profile else None,
    )
    distributed.stop()
    return result if process.rank == 0 else None


def _show_crops(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.config import load_config
    from dinoscale.crop_sheet import show_crops

    plain = ["data.colors=workers"] if options.plain else []
    return show_crops(
        load_config(options.config, [*options.overrides, *plain]),
        num_images=options.images,
        epoch=options.epoch,
        out=Path(options.out),
    )


def _presets(_options: argparse.Namespace) -> None:
    from dinoscale.config import list_presets

    print("\n".join(list_presets()))


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.checkpoint.export import export_backbone

    return export_backbone(Path(options.checkpoint), Path(options.out), network=options.network)


def _checkpoint_list(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.checkpoint.manage import as_table, list_checkpoints

    result = list_checkpoints(Path(options.run_dir))
    print(as_table(result["checkpoints"]), file=sys.stderr)
    return result


def _checkpoint_verify(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.checkpoint.manage import verify_checkpoints
    from dinoscale.errors import CheckpointError

    result = verify_checkpoints(Path(options.run_dir))
    if result["damaged"]:
        print(json.dumps(result), flush=True)
        damages = [row["damage"] for row in result["checkpoints"] if row["damage"]]
        raise CheckpointError("; ".join(damages))
    return result


def _checkpoint_reshard(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.checkpoint.manage import reshard

    return reshard(Path(options.run_dir), Path(options.out), num_shards=options.shards)


def _checkpoint_prune(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.checkpoint.manage import prune_checkpoints
    from dinoscale.checkpoint.retention import Keep

    keep = Keep(options.keep_last, options.keep_every_steps, best=not options.no_best)
    return prune_checkpoints(Path(options.run_dir), keep, dry_run=options.dry_run)


def _evaluate_knn(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.knn import KS, evaluate_knn

    return evaluate_knn(
        options.weights,
        options.train,
        options.test,
        ks=options.k or KS,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        num_heads=options.num_heads,
        pixels=options.pixels,
    )


def _evaluate_attention(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.attention import evaluate_attention

    return evaluate_attention(
        options.weights,
        options.images,
        options.out,
        size=options.size,
        num_heads=options.num_heads,
    )


def _quickstart(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.quickstart import quickstart

    return quickstart(Path(options.run_dir))
