"""`dinoscale checkpoint`: list, verify, export, reshard and prune the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinoscale.cli.convert import add_export

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands


def add_checkpoints(commands: SubCommands) -> None:
    """Add `checkpoint`."""
    checkpoint = commands.add_parser(
        "checkpoint",
        help="list, verify, export, reshard or prune the checkpoints of a run",
        description="Inspect and tidy up RUN/checkpoints. None of this is needed to continue a run:"
        " `dinoscale train` loads the newest undamaged checkpoint by itself, on any number of ranks"
        " and at any ZeRO stage.",
    )
    tasks = checkpoint.add_subparsers(dest="task", required=True, metavar="TASK")
    run_help = "run directory, or one step_* folder in its checkpoints/"

    listing = tasks.add_parser("list", help="show steps, sizes, ranks and k-NN accuracies")
    listing.add_argument("run_dir", metavar="RUN", help="run directory")
    listing.set_defaults(run=_checkpoint_list)

    verify = tasks.add_parser(
        "verify", help="compare all files with their checksums; exit code 2 if one differs"
    )
    verify.add_argument("run_dir", metavar="RUN", help=run_help)
    verify.set_defaults(run=_checkpoint_verify)

    add_export(tasks.add_parser("export", help="the same as `dinoscale export`"))

    reshard = tasks.add_parser(
        "reshard",
        help="rewrite a checkpoint with another number of shard files",
        description="Copy a checkpoint into another run directory, as N shard files. Not needed to"
        " continue on another number of ranks: every checkpoint loads on any number.",
    )
    reshard.add_argument("run_dir", metavar="RUN", help=run_help)
    reshard.add_argument("out", metavar="OUT_RUN", help="run directory to write")
    reshard.add_argument(
        "--shards", type=int, default=1, metavar="N", help="number of files (default 1)"
    )
    reshard.set_defaults(run=_checkpoint_reshard)

    prune = tasks.add_parser(
        "prune",
        help="delete checkpoints, but never the newest undamaged one",
        description="Delete all checkpoints except those that the options keep: by default the"
        " newest, and the best by k-NN accuracy. Those of checkpoint.keep_steps stay, too. Files"
        " are verified first; damaged checkpoints are left alone and do not count as kept.",
    )
    prune.add_argument("run_dir", metavar="RUN", help="run directory")
    prune.add_argument(
        "--keep-last", type=int, default=1, metavar="N", help="keep the N newest (default 1)"
    )
    prune.add_argument(
        "--keep-every-steps", type=int, metavar="N", help="keep those at multiples of N steps"
    )
    prune.add_argument(
        "--no-best", action="store_true", help="do not keep the one with the best k-NN accuracy"
    )
    prune.add_argument(
        "--dry-run", action="store_true", help="print what would be deleted, and delete nothing"
    )
    prune.set_defaults(run=_checkpoint_prune)


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
    from dinoscale.checkpoint.reshard import reshard

    return reshard(Path(options.run_dir), Path(options.out), num_shards=options.shards)


def _checkpoint_prune(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.checkpoint.manage import prune_checkpoints
    from dinoscale.checkpoint.retention import Keep

    keep = Keep(options.keep_last, options.keep_every_steps, best=not options.no_best)
    return prune_checkpoints(Path(options.run_dir), keep, dry_run=options.dry_run)
