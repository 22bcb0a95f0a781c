"""`dinoscale evaluate linear | logistic | finetune`: parse, call one function."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import (
    LABELLED_HELP,
    add_batch_size,
    add_details,
    add_labelled_sets,
    add_labels,
    add_no_cache,
    add_num_workers,
    add_number,
    add_untrained,
    add_weights,
    details_of,
    extraction_options,
)

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands

_SAVED = (
    "(FILE-best.safetensors), after each measurement; the same command resumes an interrupted"
    " training from FILE.safetensors.resume"
)
_JUDGED = "; `evaluate probe` judges other test sets by it"
_OWN = ", default that of the training"
_SETS = "--train /data/train --test /data/val"


def add_probes(tasks: SubCommands) -> None:
    """Add the tasks that train a classifier."""
    _add_linear(tasks)
    _add_logistic(tasks)
    _add_finetune(tasks)
    _add_probe(tasks)


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
    says = "images of a step; learning rates are scaled by N / 256"
    add_number(linear, "--batch-size", says, default=128)
    add_number(linear, "--iterations", "of --protocol grid, default 12500")
    add_number(linear, "--epochs", "of --protocol dino, default 100")
    says = "of --protocol dino for 256 images, default 0.001; worth a sweep"
    add_number(linear, "--lr", says, kind=float, metavar="RATE")
    linear.add_argument(
        "--out",
        metavar="FILE.safetensors",
        help="also write the best classifier of the last measurement, and of all"
        f" {_SAVED}{_JUDGED}",
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
        " without augmentation. A held-out tenth of the train set chooses the penalty; then the"
        " model is refitted to all of it, and tested once.",
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
    logistic.add_argument(
        "--out", metavar="FILE.safetensors", help=f"also write the classifier{_JUDGED}"
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
    add_number(finetune, "--epochs", "passes over the train set", default=30)
    add_number(finetune, "--batch-size", "images of a step", default=128)
    says = "for 512 images, scaled by N / 512"
    add_number(finetune, "--lr", says, default=5e-5, kind=float, metavar="RATE")
    add_number(finetune, "--weight-decay", "of AdamW", default=0.05, kind=float, metavar="X")
    for option, default in (("--label-smoothing", 0.1), ("--drop-path-rate", 0.1)):
        says = option.strip("-").replace("-", " ")
        add_number(finetune, option, says, default=default, kind=float, metavar="SHARE")
    finetune.add_argument(
        "--precision", choices=("bf16", "fp32"), help="default bf16 on a GPU, fp32 on a CPU"
    )
    finetune.add_argument(
        "--out",
        metavar="FILE.safetensors",
        help=f"also write the backbone of the last epoch, and of the best {_SAVED}; their"
        f" classifiers are FILE-head.safetensors and FILE-best-head.safetensors{_JUDGED}",
    )
    finetune.set_defaults(run=_evaluate_finetune)


def _add_probe(tasks: SubCommands) -> None:
    probe = tasks.add_parser(
        "probe",
        help="accuracy of a kept classifier on another test set",
        description="Judge a classifier that `linear`, `logistic` or `finetune` wrote with --out by"
        " another test set, on the features of the WEIGHTS that it was trained on (of `finetune`,"
        " those written beside it). Classes are matched by the names of their folders. The set may"
        " have some of them only, as ImageNet-R and -A: then these alone compete, and"
        " top1_all_classes is the accuracy among all. With --labels, all compete."
        " Under torchrun, deepspeed or srun the ranks"
        " share the images.",
        epilog="example: dinoscale evaluate probe weights.safetensors --probe linear.safetensors"
        " --test /data/imagenet-r",
    )
    add_weights(probe)
    probe.add_argument(
        "--probe", required=True, metavar="FILE.safetensors", help="the classifier's file"
    )
    probe.add_argument("--test", required=True, metavar="DATA", help=LABELLED_HELP)
    add_number(probe, "--resize", f"short side of an image before the crop{_OWN}", metavar="PIXELS")
    add_number(probe, "--crop", f"side of the center crop{_OWN}", metavar="PIXELS")
    add_batch_size(probe)
    add_num_workers(probe, of_rank=" of each rank")
    add_no_cache(probe)
    add_labels(probe)
    add_details(probe)
    probe.set_defaults(run=_evaluate_probe)


def _evaluate_probe(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.classification.kept_probe import evaluate_probe

    return evaluate_probe(
        options.weights,
        options.probe,
        options.test,
        labels_path=options.labels,
        details=details_of(options),
        options=extraction_options(options, batch_size=options.batch_size),
    )


def _add_common(task: argparse.ArgumentParser) -> None:
    add_weights(task)
    add_labelled_sets(task)
    add_untrained(task)
    add_number(task, "--seed", "of all random numbers", default=0)
    task.add_argument(
        "--log", metavar="FILE.jsonl", help="append each intermediate result to this file at once"
    )
    add_num_workers(task)
    add_no_cache(task)
    add_details(task)


def _common(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that all three functions take."""
    return {
        "weights_path": options.weights,
        "train_spec": options.train,
        "test_spec": options.test,
        "seed": options.seed,
        "untrained": options.untrained,
        "log_path": options.log,
        "details": details_of(options),
        "options": extraction_options(options),
    }


def _evaluate_linear(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.errors import ConfigError
    from dinoscale.evaluate.classification.linear import evaluate_linear
    from dinoscale.evaluate.classification.linear_protocols import DinoProtocol, GridProtocol

    named = {"iterations": options.iterations, "epochs": options.epochs, "lr": options.lr}
    own = ("iterations",) if options.protocol == "grid" else ("epochs", "lr")
    given = {name: value for name, value in named.items() if value is not None}
    for name in given.keys() - set(own):
        raise ConfigError(f"--{name}: --protocol {options.protocol} has no such option")
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
        out=options.out,
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
