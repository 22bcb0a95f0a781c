"""The command line: parse, call one function, print JSON on stdout and the rest on stderr."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from dinoscale.cli.arguments import add_config
from dinoscale.cli.checkpoints import add_checkpoints
from dinoscale.cli.convert import add_convert
from dinoscale.cli.embed import add_embed
from dinoscale.cli.evaluation.evaluate import add_evaluate, forget_finished
from dinoscale.cli.launch import add_launch
from dinoscale.cli.planning import add_planning
from dinoscale.cli.ranks import load_and_import, on_all_ranks, require_one_process, tell_others
from dinoscale.cli.sweep import add_sweep
from dinoscale.errors import LaunchError
from dinoscale.runtime.launcher_env import read_process
from dinoscale.runtime.logs import stdout_error

_EPILOG = """examples:
  dinoscale train vit_s16 data.train=/data/images run_dir=runs/first
  deepspeed --module dinoscale train vit_s16 data.train='/data/train-{000..099}.tar'
  torchrun --nproc-per-node 8 -m dinoscale train my_run.yaml engine.zero_stage=3
  dinoscale launch my_run.yaml --hostfile hostfile
  deepspeed --module dinoscale doctor vit_s16 data.train=/data/images run_dir=runs/first
  dinoscale config vit_b16 data.train=/data/images --world-size 8
  dinoscale plan vit_l16 --gpus 8 --gpu h100 --gpu-memory 80GB
  dinoscale export runs/first weights.safetensors
  dinoscale convert runs/first vit_s16_hf --to hf
  dinoscale data build-shards /data/images shards/
  dinoscale embed weights.safetensors /data/images features/
  dinoscale evaluate knn weights.safetensors --train /data/train --test /data/val
  dinoscale sweep configs/sweep/laptop.yaml run
  dinoscale report runs/first
  dinoscale evaluate compare a.safetensors b.safetensors --out comparison --task 'video DAVIS'

exit codes: 0 done, 1 the run failed, 2 bad input (the message says what is wrong and the remedy),
69 storage or network failed for minutes, the input may be fine: try again later,
75 asked to stop (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP) and saved: the same command continues.
`dinoscale COMMAND --help` explains a command."""
_MAY_BE_EMPTY = ("--options", "--ssh-options")  # options for other programs, perhaps none
_EMPTY_OPTION = re.compile(r"--[a-z-]+=")
_OPTION_OF_HOME = re.compile(r"^(--[a-z-]+=)(~[^/]*)")  # a shell replaces ~ after a space only
# Under a launcher every process would do all the work and write the same files.
_ONE_PROCESS = ("checkpoint", "convert", "data", "export", "quickstart", "recipe", "report")
_SEVERAL_RANKS = ("train", "bench", "doctor", "embed", "evaluate")  # their ranks meet
_RESULT_ON_DISK = ("embed", "train", "launch", "sweep", "quickstart")


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    # Not at the top: the working directory, which may hold this name, is searched last only now.
    from data_tools.command import add_commands as add_data_commands

    top = argparse.ArgumentParser(
        prog="dinoscale",
        description="Pre-train DINO Vision Transformers on your own images with DeepSpeed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="pre-train, or continue a run; same line under python, deepspeed, torchrun, srun",
        description="Pre-train a model. All files of the run go to run_dir: config.yaml (training"
        " from it repeats the run), metrics.jsonl, bad_samples.jsonl, logs/, checkpoints/. If"
        " run_dir already has checkpoints, training continues from the newest. `dinoscale config`"
        " lists all settings.",
    )
    add_config(train)
    train.set_defaults(run=_train)
    add_launch(commands)
    add_planning(commands)
    add_checkpoints(commands)
    add_convert(commands)
    add_embed(commands)
    add_evaluate(commands)
    add_sweep(commands)
    add_data_commands(commands)
    quickstart = commands.add_parser(
        "quickstart",
        help="pre-train on drawn images with two processes of this machine, in minutes",
        description="Draw labelled images, pre-train a small ViT on them without the labels, and"
        " compare its k-NN accuracy with the untrained network's and with raw pixels'.",
    )
    quickstart.add_argument(
        "--recipe",
        choices=("dino", "dinov2", "dinov3"),
        default="dino",
        help="dinov2: with masked patches, KoLeo and Sinkhorn-Knopp, and a picture of patch"
        " features; dinov3: also rotary positions, and a last phase with and without Gram"
        " anchoring (default dino)",
    )
    quickstart.add_argument(
        "--run-dir",
        metavar="DIR",
        help="where to write images, weights and results (default runs/quickstart, or"
        " runs/quickstart_dinov2, ..._dinov3)",
    )
    quickstart.set_defaults(run=_quickstart)
    return top


def run(arguments: Sequence[str]) -> bool:
    """Parse and run one command.

    Returns:
        Whether its result is on disk, so that the printed one is a copy.

    Raises:
        DinoscaleError: the command failed.
        SystemExit: with 2, the arguments are wrong; with 0, after --help.
    """
    # The deepspeed launcher inserts --local_rank=N; the environment says the same.
    own = [argument for argument in arguments if not argument.startswith("--local_rank")]
    try:
        options = _parsed(own)
    except SystemExit as error:
        if error.code and own[:1] and own[0] in _SEVERAL_RANKS:
            tell_others(LaunchError("its command line is wrong, as its output says"))
        raise
    run_here = partial(options.run, options)
    if getattr(options, "several_ranks", False):  # one of a command's tools whose ranks meet
        result = on_all_ranks(run_here)
    else:
        if options.command in _ONE_PROCESS:
            require_one_process(options.command)
        result = run_here()
    if result is not None:
        print(json.dumps(result), flush=True)
        keeps = options.command == "evaluate" and not getattr(options, "no_cache", False)
        if keeps and stdout_error() is None:
            forget_finished(result)
    return options.command in _RESULT_ON_DISK


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    own = [
        _OPTION_OF_HOME.sub(lambda match: match[1] + os.path.expanduser(match[2]), argument)
        for argument in arguments
    ]
    commands = parser()
    for before, argument in pairwise(["", *own]):  # Path("") would be this directory
        name = argument.removesuffix("=") if argument else before
        if (not argument or _EMPTY_OPTION.fullmatch(argument)) and name not in _MAY_BE_EMPTY:
            commands.error(
                f"{argument or 'an argument'} is empty, perhaps from a variable that is not set;"
                " give it a value or leave it out"
            )
    options, rest = commands.parse_known_args(own)
    for argument in rest:  # argparse does not recognize settings that come after an option
        if "=" not in argument or argument.startswith("-") or not hasattr(options, "overrides"):
            commands.error(f"unrecognized arguments: {argument}{_unquoted(argument)}")
        options.overrides.append(argument)
    return options


def _unquoted(argument: str) -> str:
    """What to say of a file too many: the shell has made it of a pattern."""
    is_file = not argument.startswith("-") and os.path.exists(argument)
    return "; put a pattern of files in quotes, else the shell lists them" if is_file else ""


def _train(options: argparse.Namespace) -> dict[str, Any] | None:
    # Else screens of C++ frames surround the one line that names a lost rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    environ = dict(os.environ)  # before the libraries add to it
    config, train = load_and_import(options, _import_train)
    from dinoscale.cli.restart import restart
    from dinoscale.runtime import distributed
    from dinoscale.runtime.watchdog import collectives_timeout_s
    from dinoscale.training import run_directory as directory

    process = read_process(os.environ)
    # The watchdog comes first: it reports more than a collective that timed out.
    distributed.start(process, timeout_s=collectives_timeout_s(config.train.hang_timeout_s))
    summary = train(config, process)
    meeting = distributed.next_meeting() if "next_phase" in summary else None
    distributed.stop()
    if meeting is not None:
        # As written at the start: the file on the command line may be another run's by now.
        written = Path(config.run_dir) / directory.CONFIG
        restart(["train", str(written), "resume=true"], {**environ, **meeting})
    return summary if process.rank == 0 else None


def _import_train() -> Callable[..., dict[str, Any]]:
    from dinoscale.training.trainer import train

    return train


def _quickstart(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.training.quickstart import quickstart

    return quickstart(options.recipe, options.run_dir)
