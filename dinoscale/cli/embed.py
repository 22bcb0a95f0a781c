"""`dinoscale embed WEIGHTS DATA OUT`, `dinoscale embed --targets CONFIG OUT`: parse, call one."""

from __future__ import annotations

import argparse
import os
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import (
    add_batch_size,
    add_num_workers,
    add_number,
    add_sizes,
    add_weights,
)
from dinoscale.cli.ranks import joined_ranks, load_and_import, on_all_ranks
from dinoscale.runtime.launcher_env import read_process

if TYPE_CHECKING:
    from collections.abc import Callable

    from dinoscale.cli.arguments import SubCommands

_DESCRIPTION = """Write the features of every image of a set into the folder OUT:
NumPy arrays of some thousand rows each (cls-00000.npy, ...) and manifest.json, which says for
every array the name, size and, if known, class of the image of each row, and the SHA-256; and for
all of them the preprocessing, the checksum of the weights and the images that could not be read.
No row is written for these. Reading it takes numpy alone:

  import json, numpy
  manifest = json.load(open("OUT/manifest.json"))
  for shard in manifest["shards"]:
      features = numpy.load("OUT/" + shard["arrays"]["cls"]["file"])  # a row for each
      names = shard["images"]                                         # of these

Under torchrun, deepspeed or srun the ranks share the images, and write the same bytes. OUT must
then lie where all ranks see it. After an interruption the same command goes on: finished arrays
stay, and the result is the same. manifest.json is written last: without it OUT is not finished.
A folder with the features of other weights, images or settings is refused.

With --targets, OUT gets what the frozen teacher of a run (distill.teacher) finds in the crops of
each of its steps, from which any number of students are trained (distill.targets=OUT): safetensors
files and manifest.json. Settings that follow OUT override CONFIG. The space that it takes is said
before it begins; ranks, interruptions and refusals are as above."""
_OF_FEATURES = (
    *("network", "num_heads", "features", "resize", "crop", "precision", "dtype", "batch_size"),
    *("shard_size", "num_workers", "manifest"),
)
_USAGE = """dinoscale embed WEIGHTS DATA OUT [options]
       dinoscale embed --targets CONFIG OUT [section.key=value ...] [--shard-steps N]"""
_SETTING = re.compile(r"[\w.]+=")  # of section.key=value; a path before "=" has a slash
_EPILOG = """examples:
  dinoscale embed weights.safetensors /data/images features/
  dinoscale embed weights.safetensors '/data/{000..099}.tar' patches/ --features patches
  dinoscale embed runs/first /data/images large/ --resize 448 --crop 448 --precision bf16
  torchrun --nproc-per-node 8 -m dinoscale embed weights.safetensors /data/images features/
  dinoscale embed --targets student.yaml targets/ data.train=/data/images"""


def add_embed(commands: SubCommands) -> None:
    """Add `embed`."""
    embed = commands.add_parser(
        "embed",
        usage=_USAGE,
        help="write the features of any set of images, or the targets of students",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_weights(embed, required=False)
    embed.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="images, with or without classes: a folder, tar shards, a list of files,"
        " shards over https, s3, gs, hdfs or pipe:COMMAND, or synthetic:...",
    )
    embed.add_argument("out", nargs="?", metavar="OUT", help="folder to write to")
    embed.add_argument(
        "--targets",
        nargs="+",
        metavar=("CONFIG", "OUT"),
        help="instead of features: the outputs of a run's frozen teacher for each of its steps",
    )
    add_number(embed, "--shard-steps", "with --targets: steps in one file, default by their size")
    embed.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="NAME",
        help="cls (class token), mean_patch (mean of the patch tokens), patches (all patch tokens,"
        " row by row), all after the last norm; of a ResNet-50 pooled. Default: cls mean_patch",
    )
    add_sizes(embed, crop=", a multiple of the patch size")
    embed.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the network (default fp32)",
    )
    embed.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the arrays (default float32)",
    )
    add_batch_size(embed)
    add_number(embed, "--shard-size", "images in one array", default=4096)
    add_num_workers(embed, of_rank=" of each rank (1 for streamed shards)")
    embed.add_argument(
        "--manifest",
        metavar="PATH_OR_URL",
        help="where the counts of streamed shards are, if not in manifest.json beside them",
    )
    embed.set_defaults(run=partial(_embed, embed))


def _embed(embed: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any] | None:
    if options.targets is not None:
        return _targets(embed, options)
    if options.shard_steps is not None:
        embed.error("argument --shard-steps: goes with --targets")
    if options.out is None:
        embed.error("the following arguments are required: WEIGHTS, DATA, OUT")
    return on_all_ranks(lambda: _written(options))


def _targets(embed: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any] | None:
    for name in _OF_FEATURES:
        if getattr(options, name) != embed.get_default(name):
            option = name.replace("_", "-")
            embed.error(f"argument --{option}: is not read with --targets, whose CONFIG says all")
    if len(options.targets) < 2:
        embed.error("argument --targets: needs CONFIG and OUT")
    config, out, *overrides = options.targets
    if (setting := _SETTING.match(out)) is not None:
        embed.error(
            f"argument --targets: needs CONFIG OUT before settings, and in place of OUT is the "
            f"setting {setting[0]}...; a folder of such a name is ./NAME"
        )
    later = (options.weights, options.data, options.out)  # settings that follow another option
    overrides += [text for text in later if text is not None]
    if options.shard_steps is not None and options.shard_steps < 1:
        embed.error(f"argument --shard-steps: need at least 1, got {options.shard_steps}")
    # Else screens of C++ frames surround the one line that names a lost rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    named = argparse.Namespace(config=config, overrides=overrides)
    run, write_targets = load_and_import(named, _import_write)
    process = read_process(os.environ)
    with joined_ranks(process):
        report = write_targets(run, process, out, shard_steps=options.shard_steps)
    return report if process.rank == 0 else None


def _import_write() -> Callable[..., dict[str, Any]]:
    from dinoscale.training.targets.write import write_targets

    return write_targets


def _written(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.embedding.embed import EmbedOptions, embed

    return embed(
        options.weights,
        options.data,
        options.out,
        EmbedOptions(
            network=options.network,
            num_heads=options.num_heads,
            resize=options.resize,
            crop=options.crop,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            features=tuple(options.features),
            precision=options.precision,
            dtype=options.dtype,
            shard_size=options.shard_size,
            manifest=options.manifest,
        ),
    )
