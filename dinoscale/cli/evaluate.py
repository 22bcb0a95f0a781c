"""`dinoscale evaluate TASK WEIGHTS ...`: parse, call one function."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import DATA_HELP, add_weights
from dinoscale.cli.propagate import add_copies, add_retrieve, add_video

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands


def add_evaluate(commands: SubCommands) -> None:
    """`evaluate` and its tasks."""
    evaluate = commands.add_parser("evaluate", help="measure a backbone")
    tasks = evaluate.add_subparsers(dest="task", required=True, metavar="TASK")
    _add_knn(tasks)
    _add_attention(tasks)
    add_video(tasks)
    add_retrieve(tasks)
    add_copies(tasks)


def _add_knn(tasks: SubCommands) -> None:
    knn = tasks.add_parser(
        "knn",
        help="weighted k-NN accuracy by the published protocol",
        description="Weighted k-NN (T 0.07) on frozen features of a labelled train and test set.",
    )
    add_weights(knn)
    knn.add_argument("--train", required=True, metavar="DATA", help=DATA_HELP)
    knn.add_argument("--test", required=True, metavar="DATA", help=DATA_HELP)
    knn.add_argument("--k", type=int, nargs="+", default=None, help="default 10 20 100 200")
    knn.add_argument("--batch-size", type=int, default=64, metavar="N")
    knn.add_argument("--num-workers", type=int, default=2, metavar="N")
    knn.add_argument("--pixels", action="store_true", help="also 16 x 16 pixels as features")
    knn.set_defaults(run=_evaluate_knn)


def _add_attention(tasks: SubCommands) -> None:
    attention = tasks.add_parser(
        "attention",
        help="draw where the class token of a ViT looks, per head",
        description="Draw the attention of the last block over some images into a PNG. For"
        " synthetic sets, whose masks are known, also how well it covers the objects.",
    )
    add_weights(attention)
    attention.add_argument("images", metavar="DATA", help="a folder, tar shards, or synthetic:...")
    attention.add_argument("out", metavar="OUT.png", help="picture to write")
    attention.add_argument(
        "--size", type=int, metavar="PIXELS", help="side of the image the network sees"
    )
    attention.set_defaults(run=_evaluate_attention)


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
