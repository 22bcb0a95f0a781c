"""`dinoscale evaluate compare`: measure task lines, and lay out all reports on one page."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dinoscale.cli.ranks import require_one_process
from dinoscale.errors import ConfigError

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands
    from dinoscale.reports.comparison.runs import Job

# The option of a task that names a folder for pictures.
_DRAWING = {
    **dict.fromkeys(("attention", "segment", "pca", "video", "discover", "correspond"), "--out"),
    "segmentation": "--pictures",
}
_ANSWERING = ("knn", "linear", "logistic", "finetune", "probe")  # tasks with --predictions FILE


def add_compare(tasks: SubCommands, add_tasks: Callable[[SubCommands], None]) -> None:
    """Add `evaluate compare`.

    Args:
        tasks: where to add it.
        add_tasks: adds the tasks that a --task may name.
    """
    compare = tasks.add_parser(
        "compare",
        help="several weights and tasks in one table and page",
        description="One table over several weights: a row for each, a column for each task, with"
        " baselines, plots and pictures. Each --task is measured on every WEIGHTS; reports that"
        " tasks printed (`dinoscale evaluate knn ... > knn.json`) may be given as REPORT.json. Only"
        " equal protocols, data and code share a column. Every result is saved in DIR/results at"
        " once, and the same command run again measures only those that are missing or whose"
        " weights, images or code have changed. The weights are ranked in every column, and over"
        " those that have all of them. If a task fails, the table shows its error, the"
        " others go on, and the exit code is 2. Of classifiers it also tests, image by image, which"
        " differences are more than chance (McNemar). Writes DIR/compare.html, one file that needs"
        " no network, and DIR/compare.json.",
        epilog="example: dinoscale evaluate compare a.safetensors b.safetensors --out comparison/"
        " --task 'knn --train /data/train --test /data/val' --task 'video DAVIS'",
    )
    compare.add_argument(
        "sources",
        nargs="+",
        metavar="WEIGHTS|REPORT.json",
        help="weights in any format that the tasks read, or the report of a task",
    )
    compare.add_argument(
        "--task",
        action="append",
        default=[],
        dest="lines",
        metavar="LINE",
        help="a task and its options without WEIGHTS, --out and --pictures, in quotes; may be"
        " repeated",
    )
    compare.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    compare.set_defaults(run=partial(_evaluate_compare, add_tasks))


def _evaluate_compare(
    add_tasks: Callable[[SubCommands], None], options: argparse.Namespace
) -> None:
    from dinoscale.reports.comparison.runs import measure_all
    from dinoscale.reports.comparison.scores import compare, outcome_of_report

    require_one_process(
        "evaluate compare",
        "Measure under the launcher (`torchrun ... evaluate knn ... > a.json`), and compare the"
        " reports.",
    )
    out = Path(options.out)
    jobs = _jobs(options, add_tasks, out / "results")
    reports = [outcome_of_report(Path(path)) for path in options.sources if _is_report(path)]
    comparison = compare([*reports, *measure_all(jobs)])
    from dinoscale.reports.comparison.page import write_page  # loads matplotlib

    result = comparison.as_json() | {"page": str(out / "compare.html")}
    write_page(comparison, out)
    print(json.dumps(result), flush=True)
    if comparison.failed:
        raise SystemExit(2)


def _is_report(source: str) -> bool:
    return source.endswith(".json")


def _jobs(
    options: argparse.Namespace, add_tasks: Callable[[SubCommands], None], folder: Path
) -> list[Job]:
    """One job per task line and weights; all lines are parsed before the first is measured.

    Raises:
        ConfigError: a line is wrong, or there is nothing to measure.
    """
    weights = [source for source in options.sources if not _is_report(source)]
    if bool(weights) != bool(options.lines):
        missing = "no --task LINE to measure" if weights else "no WEIGHTS to measure"
        raise ConfigError(f"compare: {missing}; see `dinoscale evaluate compare --help`")
    parser = line_parser(add_tasks)
    return [_job(parser, path, line, folder) for path in weights for line in options.lines]


def line_parser(add_tasks: Callable[[SubCommands], None]) -> argparse.ArgumentParser:
    """Parser of `TASK WEIGHTS ...`; it raises ValueError on a mistake."""
    parser: argparse.ArgumentParser = _LineParser(add_help=False)
    add_tasks(parser.add_subparsers(required=True, dest="task", metavar="TASK"))
    return parser


def split_line(line: str) -> tuple[str, list[str]]:
    """Task and options of a line; ValueError if it says where to write."""
    task, *words = shlex.split(line) or [""]
    for word in words:
        if (option := word.split("=")[0]) in ("--out", "--pictures", "--predictions"):
            raise ValueError(f"{option}: compare chooses the place of every result. Leave it out.")
    return task, words


class _LineParser(argparse.ArgumentParser):
    """Raises what is wrong with a line; the caller adds which line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _job(parser: argparse.ArgumentParser, weights: str, line: str, folder: Path) -> Job:
    from dinoscale.evaluate.provenance import made_from
    from dinoscale.reports.comparison.runs import Job, result_path

    try:
        task, words = split_line(line)
        result = result_path(folder, weights, [task, *words])
        place = [_DRAWING[task], str(result.with_suffix(""))] if task in _DRAWING else []
        if task in _ANSWERING:
            place = ["--predictions", str(result.with_suffix(".npz"))]
        options = parser.parse_args([task, weights, *words, *place])
    except ValueError as error:
        raise ConfigError(f"--task {line!r}: {error}") from error

    def measure() -> dict[str, Any] | None:
        report: dict[str, Any] | None = options.run(options)
        return report

    network = getattr(options, "network", "teacher")
    return Job(weights, network, task, line, result, partial(made_from, vars(options)), measure)
