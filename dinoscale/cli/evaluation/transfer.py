"""`dinoscale evaluate transfer`: parse, call one function."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import (
    add_batch_size,
    add_no_cache,
    add_num_workers,
    add_number,
    add_sizes,
    add_untrained,
    add_weights,
    extraction_options,
)

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands


def add_transfer(tasks: SubCommands) -> None:
    """Add `transfer`."""
    transfer = tasks.add_parser(
        "transfer",
        help="k-NN and logistic regression on many sets, from few images a class and from all",
        description="Measure frozen features on several labelled sets in one line: weighted k-NN"
        " and a logistic regression (as `knn` and `logistic`), learned from a few images of each"
        " class, of several draws, and from all. The score is the mean over the sets; the report"
        " has the mean and standard deviation of every set. A set is a folder with train and test"
        " (or val), or labelled images, of which a fifth of each class is tested on. Under"
        " torchrun, deepspeed or srun the ranks share the images and the regressions.",
        epilog="example: dinoscale evaluate transfer weights.safetensors --sets /data/flowers"
        " /data/pets /data/cars",
    )
    add_weights(transfer)
    transfer.add_argument(
        "--sets", nargs="+", required=True, metavar="DATA", help="labelled sets, see above"
    )
    transfer.add_argument(
        "--shots", type=int, nargs="+", metavar="N", help="images of a class, default 1 5 10"
    )
    add_number(transfer, "--seeds", "subsets for each number of shots", default=5)
    add_number(transfer, "--k", "neighbours that vote", default=20)
    transfer.add_argument(
        "--c",
        type=float,
        nargs="+",
        metavar="C",
        help="inverse strengths of the penalty to choose from, default 12 from 1e-6 to 1e5",
    )
    add_sizes(transfer, crop=" that the network sees")
    add_batch_size(transfer)
    add_num_workers(transfer, of_rank=" of each rank")
    add_untrained(transfer)
    add_no_cache(transfer, also=", nor regressions of an interrupted start")
    transfer.set_defaults(run=_evaluate_transfer)


def _evaluate_transfer(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.classification.transfer import (
        C_CHOICES,
        SHOTS,
        Plan,
        evaluate_transfer,
    )

    return evaluate_transfer(
        options.weights,
        options.sets,
        plan=Plan(
            shots=tuple(options.shots or SHOTS),
            seeds=options.seeds,
            k=options.k,
            cs=tuple(options.c or C_CHOICES),
        ),
        untrained=options.untrained,
        fingerprint=None if options.no_cache else options.fingerprint,
        options=extraction_options(
            options,
            resize=options.resize,
            crop=options.crop,
            batch_size=options.batch_size,
            cache=not options.no_cache,
        ),
    )
