"""`dinoscale evaluate linear | logistic | finetune`: parse, call one function."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import DATA_HELP, UNTRAINED_HELP, WORKERS_HELP, add_weights

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands

_KEPT = (
    "(FILE-best.safetensors), after each measurement; if it is ended, the same command goes on from"
    " FILE.safetensors.resume"
)
_SETS = "--train /data/train --test /data/val"


def add_probes(tasks: SubCommands) -> None:
    """The tasks that train a classifier."""
    _add_linear(tasks)
    _add_logistic(tasks)
    _add_finetune(tasks)


def _add_linear(tasks: SubCommands) -> None:
    linear = tasks.add_parser(
        "linear",
        help="accuracy of linear classifiers on frozen features, by two published protocols",
        description="Train linear classifiers on frozen features. `--protocol grid` (DINOv2): class"
        " tokens of the last and of the last four blocks, with and without the mean patch token,"
        " each at 13 learning rates, all trained on one frozen forward of random crops; the best"
        " after the last iteration counts. `--protocol dino` (DINO v1): one classifier, SGD for 100"
        " epochs; the best epoch counts, and the last is reported too. As in the papers, the best"
        " is chosen on the test set itself, so read the number as an upper bound.",
        epilog=f"example: dinoscale evaluate linear weights.safetensors {_SETS}",
    )
    _add_common(linear)
    linear.add_argument("--protocol", choices=("grid", "dino"), default="grid", help="default grid")
    linear.add_argument(
        "--batch-size",
        type=int,
        default=128,
        metavar="N",
        help="images of a step, default 128; learning rates are scaled by N / 256",
    )
    linear.add_argument(
        "--iterations", type=int, metavar="N", help="of --protocol grid, default 12500"
    )
    linear.add_argument("--epochs", type=int, metavar="N", help="of --protocol dino, default 100")
    linear.add_argument(
        "--lr",
        type=float,
        metavar="RATE",
        help="of --protocol dino for 256 images, default 0.001; worth a sweep",
    )
    linear.add_argument(
        "--out",
        metavar="FILE.safetensors",
        help=f"also write the classifier that was last the best, and the best of all {_KEPT}",
    )
    linear.add_argument(
        "--no-augmentation",
        action="store_true",
        help="train on features of whole images, forwarded once: fast also on a CPU, but not the"
        " published protocol",
    )
    linear.set_defaults(run=_evaluate_linear)


def _add_logistic(tasks: SubCommands) -> None:
    logistic = tasks.add_parser(
        "logistic",
        help="accuracy of a logistic regression on frozen features",
        description="Fit scikit-learn's logistic regression to L2-normalised frozen features"
        " without augmentation. The penalty is chosen on a tenth of the train set, then all of it"
        " is fitted and the test set looked at once.",
        epilog=f"example: dinoscale evaluate logistic weights.safetensors {_SETS}",
    )
    _add_common(logistic)
    logistic.add_argument(
        "--c",
        type=float,
        nargs="+",
        metavar="C",
        help="inverse strengths of the penalty to choose from, default 45 from 1e-6 to 1e5",
    )
    logistic.set_defaults(run=_evaluate_logistic)


def _add_finetune(tasks: SubCommands) -> None:
    finetune = tasks.add_parser(
        "finetune",
        help="accuracy after a short supervised training of the whole network",
        description="Train the backbone and a linear classifier with AdamW, warm-up and cosine,"
        " label smoothing and stochastic depth, on random crops, in one process. The best epoch on"
        " the test set counts, and the last is reported too.",
        epilog=f"example: dinoscale evaluate finetune weights.safetensors {_SETS} --epochs 30",
    )
    _add_common(finetune)
    finetune.add_argument(
        "--epochs", type=int, default=30, metavar="N", help="passes over the train set, default 30"
    )
    finetune.add_argument(
        "--batch-size", type=int, default=128, metavar="N", help="images of a step, default 128"
    )
    finetune.add_argument(
        "--lr",
        type=float,
        default=5e-5,
        metavar="RATE",
        help="for 512 images, default 5e-5; scaled by N / 512",
    )
    finetune.add_argument(
        "--weight-decay", type=float, default=0.05, metavar="X", help="default 0.05"
    )
    finetune.add_argument(
        "--label-smoothing", type=float, default=0.1, metavar="SHARE", help="default 0.1"
    )
    finetune.add_argument(
        "--drop-path-rate", type=float, default=0.1, metavar="SHARE", help="default 0.1"
    )
    finetune.add_argument(
        "--precision", choices=("bf16", "fp32"), help="default bf16 on a GPU, fp32 on a CPU"
    )
    finetune.add_argument(
        "--out",
        metavar="FILE.safetensors",
        help=f"also write the backbone of the last epoch, and of the best {_KEPT}",
    )
    finetune.set_defaults(run=_evaluate_finetune)


def _add_common(task: argparse.ArgumentParser) -> None:
    add_weights(task)
    task.add_argument("--train", required=True, metavar="DATA", help=DATA_HELP)
    task.add_argument("--test", required=True, metavar="DATA", help=DATA_HELP)
    task.add_argument("--untrained", action="store_true", help=UNTRAINED_HELP)
    task.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of all random numbers, default 0"
    )
    task.add_argument(
        "--log", metavar="FILE.jsonl", help="append each intermediate result to this file at once"
    )
    task.add_argument("--num-workers", type=int, default=2, metavar="N", help=WORKERS_HELP)
    task.add_argument("--no-cache", action="store_true", help="neither read nor keep features")


def _common(options: argparse.Namespace) -> dict[str, Any]:
    """What all three functions take."""
    from dinoscale.evaluate.classification.inputs import Reading

    return {
        "weights_path": options.weights,
        "train_spec": options.train,
        "test_spec": options.test,
        "seed": options.seed,
        "untrained": options.untrained,
        "log_path": options.log,
        "reading": Reading(num_workers=options.num_workers, cache=not options.no_cache),
        "network": options.network,
        "num_heads": options.num_heads,
    }


def _evaluate_linear(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.errors import ConfigError
    from dinoscale.evaluate.classification.linear import evaluate_linear
    from dinoscale.evaluate.classification.linear_protocols import DinoProtocol, GridProtocol

    named = {"iterations": options.iterations, "epochs": options.epochs, "lr": options.lr}
    own = ("iterations",) if options.protocol == "grid" else ("epochs", "lr")
    given = {name: value for name, value in named.items() if value is not None}
    for name in given.keys() - set(own):
        raise ConfigError(f"--{name}: --protocol {options.protocol} has no such number")
    protocol = GridProtocol if options.protocol == "grid" else DinoProtocol
    return evaluate_linear(
        protocol=protocol(batch_size=options.batch_size, **given),
        augment=not options.no_augmentation,
        out=options.out,
        **_common(options),
    )


def _evaluate_logistic(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.classification.logistic import CS, evaluate_logistic

    return evaluate_logistic(
        cs=options.c or CS,
        **_common(options),
    )


def _evaluate_finetune(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.classification.finetune import Recipe, evaluate_finetune

    return evaluate_finetune(
        recipe=Recipe(
            epochs=options.epochs,
            batch_size=options.batch_size,
            lr=options.lr,
            weight_decay=options.weight_decay,
            label_smoothing=options.label_smoothing,
            drop_path_rate=options.drop_path_rate,
            precision=options.precision,
        ),
        out=options.out,
        **_common(options),
    )
