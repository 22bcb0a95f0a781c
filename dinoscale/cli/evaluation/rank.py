"""`dinoscale evaluate rank`: parse, call one function."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import (
    add_extraction,
    add_no_cache,
    add_number,
    add_untrained,
    add_weights,
    extraction_options,
)

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands


def add_rank(tasks: SubCommands) -> None:
    """Add `rank`."""
    rank = tasks.add_parser(
        "rank",
        help="effective rank of features, without labels (RankMe, LiDAR, alpha-ReQ)",
        description="Measure how many directions the frozen features of WEIGHTS use, without"
        " labels. `rankme` is the effective rank of the features of some images (Garrido et al."
        " 2023); `lidar` that of what tells images apart, beyond how augmented views of one image"
        " differ (Thilak et al. 2024), here of features before the head; `alpha_req` the decay of"
        " their spectrum (Agrawal et al. 2022; near 1 is said to be best). A rank that falls while"
        " the loss falls is a collapse in the making. Compare checkpoints of one run: between"
        " architectures the numbers mislead, and they do not replace k-NN where there are labels."
        " Under torchrun, deepspeed or srun the ranks share the images.",
        epilog="example: dinoscale evaluate rank weights.safetensors --data /data/images"
        " --untrained",
    )
    add_weights(rank)
    rank.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="images, with or without classes: a folder, tar shards, a list of files, or"
        " synthetic:...",
    )
    says = "images of RankMe and alpha-ReQ, chosen at random, always the same"
    add_number(rank, "--images", says, default=25000)
    add_number(rank, "--lidar-images", "images of LiDAR", default=1000)
    add_number(rank, "--views", "views of each image of LiDAR; 0 leaves it out", default=50)
    add_extraction(rank, crop=", and of a view")
    add_untrained(rank)
    add_no_cache(rank)
    rank.set_defaults(run=_evaluate_rank)


def _evaluate_rank(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.label_free.rank import Samples, evaluate_rank

    return evaluate_rank(
        options.weights,
        options.data,
        samples=Samples(options.images, options.lidar_images, options.views),
        untrained=options.untrained,
        options=extraction_options(options, batch_size=options.batch_size),
    )
