"""`dinoscale sweep FILE {plan,run,status,fit,report}` and `dinoscale report RUN`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands
    from dinoscale.config.sweep.file import SweepConfig
    from dinoscale.scaling.laws.laws import MetricFit
    from dinoscale.scaling.sweep.table import Row

log = logging.getLogger(__name__)

_EPILOG = """examples:
  dinoscale sweep configs/sweep/laptop.yaml plan
  dinoscale sweep configs/sweep/laptop.yaml run        (the same command resumes it)
  dinoscale sweep configs/sweep/laptop.yaml report
  dinoscale sweep results.csv fit --budget 1e19        (a copied table is enough)"""


def add_sweep(commands: SubCommands) -> None:
    """Add `sweep`, and `report` of a run."""
    sweep = commands.add_parser(
        "sweep",
        help="many runs from one file, fitted scaling laws, and the preset to train next",
        description="A sweep file lists the models, data sizes and budgets to try. `plan` shows"
        " every run and its cost without a GPU, `run` trains and evaluates the runs that are not"
        " done, `status` shows the progress, `fit` fits scaling laws to the results, `report`"
        " writes a page with plots, tables and the preset to train next.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument(
        "file",
        metavar="FILE",
        help="sweep file (.yaml); fit and report also accept its table (.csv)",
    )
    actions = sweep.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_before_and_during(actions)
    fit = actions.add_parser(
        "fit", help="fit scaling laws with intervals, and the best use of a budget"
    )
    _add_fit(fit)
    fit.add_argument("--json", action="store_true", help="one JSON object instead of text")
    fit.set_defaults(run=_fit)
    report = actions.add_parser("report", help="write a page with plots, tables and a preset")
    _add_fit(report)
    report.add_argument(
        "--out", metavar="DIR", help="folder to write to (default: `report` beside the table)"
    )
    report.set_defaults(run=_report)
    _add_run_report(commands)


def _add_before_and_during(actions: SubCommands) -> None:
    plan = actions.add_parser("plan", help="show every run with its size and cost; needs no GPU")
    plan.add_argument("--json", action="store_true", help="one JSON object instead of text")
    plan.set_defaults(run=_plan)
    run = actions.add_parser(
        "run", help="train and evaluate the runs that are not done; run it again to resume"
    )
    run.add_argument(
        "--retry-failed",
        action="store_true",
        help="also start runs again that have used up their retries",
    )
    run.set_defaults(run=_run)
    status = actions.add_parser("status", help="show the progress of the sweep, and what failed")
    status.add_argument("--json", action="store_true", help="one JSON object instead of text")
    status.set_defaults(run=_status)


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="metric to fit; repeatable (default: all)",
    )
    command.add_argument(
        "--budget",
        action="append",
        default=[],
        type=float,
        metavar="FLOPS",
        help="budget of the training to plan; repeatable (default: 2 and 10 times the largest run)",
    )
    command.add_argument(
        "--confidence",
        type=float,
        default=0.9,
        metavar="FRACTION",
        help="level of the intervals (default 0.9)",
    )
    command.add_argument(
        "--samples", type=int, default=500, metavar="N", help="bootstrap samples (default 500)"
    )


def _add_run_report(commands: SubCommands) -> None:
    report = commands.add_parser(
        "report",
        help="write a page with curves, collapse monitors, throughput, k-NN and events of a run",
        description="Write a self-contained HTML page, its plots as PNG and its numbers as JSON,"
        " for a run that has ended or is still training.",
    )
    report.add_argument("run_dir", metavar="RUN", help="directory of a run")
    report.add_argument(
        "--out", metavar="DIR", help="folder to write to (default: `report` in RUN)"
    )
    report.add_argument(
        "--no-attention", action="store_true", help="skip the attention maps of the teacher"
    )
    report.set_defaults(run=_run_report)


def _load(options: argparse.Namespace) -> SweepConfig:
    from dinoscale.config.sweep.file import load_sweep
    from dinoscale.errors import ConfigError

    if _is_table(options):
        raise ConfigError(f"{options.file}: `{options.action}` needs the sweep file (.yaml)")
    return load_sweep(Path(options.file))


def _is_table(options: argparse.Namespace) -> bool:
    return Path(options.file).suffix.lower() == ".csv"


def _plan(options: argparse.Namespace) -> dict[str, Any] | None:
    sweep = _load(options)
    from dinoscale.scaling.design.cost import as_text, make_plan
    from dinoscale.scaling.design.expand import expand_sweep

    plan = make_plan(sweep, expand_sweep(sweep))
    if options.json:
        return plan
    print(as_text(plan), end="")
    return None


def _run(options: argparse.Namespace) -> dict[str, Any]:
    sweep = _load(options)
    from dinoscale.cli.evaluation.evaluate import evaluation_words
    from dinoscale.scaling.design.expand import expand_sweep
    from dinoscale.scaling.sweep.run import run_sweep

    design = expand_sweep(sweep)
    for note in design.notes:
        log.warning("%s", note)
    return run_sweep(
        design.runs,
        out=Path(sweep.out),
        metrics=sweep.metrics,
        executor=sweep.executor,
        retry_failed=options.retry_failed,
        evaluation_words=evaluation_words,
    )


def _status(options: argparse.Namespace) -> dict[str, Any] | None:
    sweep = _load(options)
    from dinoscale.scaling.design.expand import plan_runs
    from dinoscale.scaling.sweep.status import as_text, read_status

    runs, parallel = plan_runs(sweep), sweep.executor.parallel
    status = read_status(runs, out=Path(sweep.out), parallel=parallel)
    if options.json:
        return status
    print(as_text(status), end="")
    return None


def _fitted(options: argparse.Namespace) -> tuple[Path, list[Row], list[MetricFit]]:
    from dinoscale.errors import ConfigError
    from dinoscale.scaling.sweep.reuse import (
        rows_of_sweep,
        rows_of_table,
        with_known_keys,
        with_known_lines,
    )
    from dinoscale.scaling.sweep.table import TABLE, read_table

    table = Path(options.file)
    if _is_table(options):
        rows, notes = rows_of_table(read_table(table))
    else:
        sweep = _load(options)
        from dinoscale.scaling.design.expand import plan_runs  # with torch

        table = Path(sweep.out) / TABLE
        rows = read_table(table)
        try:
            planned = plan_runs(sweep)
        except ConfigError as error:
            raise ConfigError(
                f"{error}\nwithout valid runs, their rows in {table} cannot be identified;"
                f" `dinoscale sweep {table} {options.action}` uses all rows"
            ) from None
        runs = with_known_keys(planned, rows, table.parent)
        rows = with_known_lines(rows, runs, table.parent)
        rows, notes = rows_of_sweep(rows, runs, sweep.metrics)
    for note in notes:
        log.warning("%s", note)
    from dinoscale.scaling.laws.fit import fit_rows  # with scipy

    fits = fit_rows(
        rows,
        metrics=options.metric,
        budgets=options.budget,
        confidence=options.confidence,
        samples=options.samples,
    )
    return table, rows, fits


def _fit(options: argparse.Namespace) -> dict[str, Any] | None:
    from dinoscale.scaling.report.fit_text import as_json, as_text

    _, _, fits = _fitted(options)
    if options.json:
        return as_json(fits)
    print(as_text(fits), end="")
    return None


def _report(options: argparse.Namespace) -> dict[str, Any]:
    table, rows, fits = _fitted(options)
    from dinoscale.scaling.report.write import write_report

    return write_report(rows, fits, Path(options.out) if options.out else table.parent / "report")


def _run_report(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.reports.run.phases import write_report

    run_dir = Path(options.run_dir)
    out = Path(options.out) if options.out else run_dir / "report"
    return write_report(run_dir, out, attention=not options.no_attention)
