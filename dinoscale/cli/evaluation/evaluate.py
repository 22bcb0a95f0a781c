"""`dinoscale evaluate TASK WEIGHTS ...`: parse, call one function."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import (
    add_details,
    add_extraction,
    add_labelled_sets,
    add_labels,
    add_no_cache,
    add_untrained,
    add_weights,
    details_of,
    extraction_options,
)
from dinoscale.cli.evaluation.compare import add_compare, line_parser, split_line
from dinoscale.cli.evaluation.dense import add_dense
from dinoscale.cli.evaluation.dense_probes import add_dense_probes
from dinoscale.cli.evaluation.patches import add_patch_tasks
from dinoscale.cli.evaluation.probes import add_probes
from dinoscale.cli.evaluation.propagate import add_copies, add_retrieve, add_video
from dinoscale.cli.evaluation.rank import add_rank
from dinoscale.cli.evaluation.transfer import add_transfer
from dinoscale.cli.ranks import on_all_ranks, require_one_process
from dinoscale.errors import ConfigError

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands

log = logging.getLogger(__name__)

Measure = Callable[[argparse.Namespace], dict[str, Any]]

# Tasks whose work the ranks of a launcher share.
_SHARED = ("knn", "logistic", "probe", "copies", "rank", "discover", "correspond", "transfer")
# Why the other tasks do not.
_ALONE = {
    "linear": "one network sees the crops of every step (with --no-augmentation, ranks share the"
    " features)",
    "finetune": "its training is not distributed",
    "pca": "its components are those of all patches together",
    "video": "every frame depends on those before it",
    **dict.fromkeys(("attention", "segment"), "its images, of any size, are seen one by one"),
    "retrieve": "its images, of any size, are seen one by one (with --data, ranks share them)",
    **dict.fromkeys(("segmentation", "depth"), "its training on pixels is not distributed"),
}
_BASELINES = {"untrained": "the same network untrained", "floors": "without a network"}


def add_evaluate(commands: SubCommands) -> None:
    """Add `evaluate` and its tasks."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a backbone",
        description="Measure a backbone by the published protocols, whose numbers are the defaults."
        " The report is one JSON object on stdout: `score` (in percent, `rank` in directions; the"
        " first number is the headline), `protocol` (all settings that change it), `floors` and"
        " `untrained` (baselines that it should beat, if the task has them), and `made_from`"
        " (digests of the files that were read, of the options and of the code). Under a launcher"
        " the ranks of `knn`, `logistic`, `probe`, `copies`, `rank`, `discover`, `correspond`,"
        " `transfer`, `linear --no-augmentation` and `retrieve --data` share the work; the other"
        " tasks run in one process and refuse several.",
        epilog="example: dinoscale evaluate knn weights.safetensors --train /data/train"
        " --test /data/val > knn.json",
    )
    tasks = evaluate.add_subparsers(dest="task", required=True, metavar="TASK")
    _add_measurements(tasks)
    add_compare(tasks, _add_measurements)


def evaluation_words(line: str, weights: str) -> list[str]:
    """The command line that measures weights by `TASK OPTIONS`, a line without the weights.

    Raises:
        ConfigError: the line is wrong, or lacks a folder to write into.
    """
    try:
        task, options = split_line(line)
        line_parser(_add_measurements).parse_args([task, weights, *options])
    except ValueError as error:
        raise ConfigError(f"{line!r}: {error}") from error
    return ["evaluate", task, weights, *options]


def _add_measurements(tasks: SubCommands) -> None:
    _add_knn(tasks)
    add_probes(tasks)
    add_dense(tasks)
    add_video(tasks)
    add_retrieve(tasks)
    add_copies(tasks)
    add_rank(tasks)
    add_dense_probes(tasks)
    add_patch_tasks(tasks)
    add_transfer(tasks)
    for task in tasks.choices.values():
        task.set_defaults(run=partial(_report, task.get_default("run")))


def _report(measure: Measure, options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure, on all ranks if they share the work, else in one process; rank 0 reports."""
    if _is_shared(options):
        report = on_all_ranks(lambda: _measured(measure, options))
    else:
        reason = _ALONE.get(options.task, "")
        require_one_process(f"evaluate {options.task}", reason=reason)
        report = _measured(measure, options)
    if report is not None:
        _say_score(report)
    return report


def forget_finished(report: dict[str, Any]) -> None:
    """Remove what was kept for another start, once the report is printed."""
    from dinoscale.evaluate.finished_items import forget

    forget(report)


def _is_shared(options: argparse.Namespace) -> bool:
    by_options = {
        "linear": getattr(options, "no_augmentation", False),
        "retrieve": getattr(options, "data", None) is not None,
    }
    return options.task in _SHARED or by_options.get(options.task, False)


def _say_score(report: dict[str, Any]) -> None:
    """The headline in words, as the JSON is long, and whether a baseline is as good."""
    for name, value in list((report.get("score") or {}).items())[:1]:
        found = {what: (report.get(key) or {}).get(name) for key, what in _BASELINES.items()}
        baselines = {what: number for what, number in found.items() if number is not None}
        unit = report.get("unit", "%")
        others = "".join(f"; {what} {number:.1f} {unit}" for what, number in baselines.items())
        log.info("%s %.1f %s%s", name, value, unit, others)
        if any(value <= number for number in baselines.values()):
            log.warning("a baseline is as good: by this measure the weights have learned nothing")


def _measured(measure: Measure, options: argparse.Namespace) -> dict[str, Any]:
    """The report of a task, with the fingerprint of its inputs."""
    from dinoscale.evaluate.provenance import made_from
    from dinoscale.runtime.opening import on_first_rank

    # Many files take long: other ranks do not wait in a collective, which would time out.
    before = on_first_rank(lambda _: made_from(vars(options)))
    options.fingerprint = before  # for tasks that keep the results of an interrupted start
    return {**measure(options), "made_from": before}


def _add_knn(tasks: SubCommands) -> None:
    knn = tasks.add_parser(
        "knn",
        help="weighted k-NN accuracy by the published protocol",
        description="Classify each test image by the votes of the most similar images of the train"
        " set, on the frozen features of WEIGHTS (Wu et al. 2018; T 0.07). Nothing is trained, so"
        " this is the fastest measure of features; usually k 20 is quoted. Under torchrun,"
        " deepspeed or srun the ranks share the images. Features are cached in $DINOSCALE_CACHE,"
        " else ~/.cache/dinoscale, as features-*.safetensors, and reused while weights and images"
        " are the same; the files may be deleted at any time.",
        epilog="example: dinoscale evaluate knn weights.safetensors --train /data/train"
        " --test /data/val --untrained --pixels",
    )
    add_weights(knn)
    add_labelled_sets(knn)
    knn.add_argument(
        "--k", type=int, nargs="+", help="numbers of neighbours, default 10 20 100 200"
    )
    add_extraction(knn, crop=" that the network sees")
    knn.add_argument(
        "--pixels", action="store_true", help="also measure 16 x 16 pixels as features"
    )
    add_untrained(knn)
    add_no_cache(knn)
    add_labels(knn)
    add_details(knn)
    knn.set_defaults(run=_evaluate_knn)


def _evaluate_knn(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.classification.knn import KS, evaluate_knn

    return evaluate_knn(
        options.weights,
        options.train,
        options.test,
        ks=options.k or KS,
        pixels=options.pixels,
        untrained=options.untrained,
        labels_path=options.labels,
        details=details_of(options),
        options=extraction_options(options, batch_size=options.batch_size),
    )
