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
  dinoscale sweep configs/sweep/laptop.yaml run        (again after any interruption)
  dinoscale sweep configs/sweep/laptop.yaml report
  dinoscale sweep results.csv fit --budget 1e19        (a copied table is enough)"""


def add_sweep(commands: SubCommands) -> None:
    """Sweeps, and the report of a run."""
    sweep = commands.add_parser(
        "sweep",
        help="many runs from one file, a fitted scaling law, and what to train next",
        description="Say in one file which models, data sizes and budgets to try. `plan` shows"
        " every run and the cost of all without a GPU, `run` runs what has not ended, `status`"
        " tells how far it is, `fit` fits scaling laws to the results, `report` writes a page with"
        " plots, tables and the configuration to train next.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument(
        "file", metavar="FILE", help="of the sweep (.yaml), or for fit and report its table (.csv)"
    )
    actions = sweep.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_before_and_during(actions)
    fit = actions.add_parser(
        "fit", help="scaling laws with intervals, and the best use of a budget"
    )
    _add_fit(fit)
    fit.add_argument("--json", action="store_true", help="one JSON object instead of text")
    fit.set_defaults(run=_fit)
    report = actions.add_parser("report", help="write a page with plots, tables and a preset")
    _add_fit(report)
    report.add_argument("--out", metavar="DIR", help="where (default: `report` beside the table)")
    report.set_defaults(run=_report)
    _add_run_report(commands)


def _add_before_and_during(actions: SubCommands) -> None:
    plan = actions.add_parser("plan", help="every run, its size and cost; needs no GPU")
    plan.add_argument("--json", action="store_true", help="one JSON object instead of text")
    plan.set_defaults(run=_plan)
    run = actions.add_parser("run", help="run what has not ended; the same line goes on")
    run.add_argument(
        "--retry-failed", action="store_true", help="also runs whose retries are used up"
    )
    run.set_defaults(run=_run)
    status = actions.add_parser("status", help="how far the sweep is, and what failed")
    status.add_argument("--json", action="store_true", help="one JSON object instead of text")
    status.set_defaults(run=_status)


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="repeatable (default: all)"
    )
    command.add_argument(
        "--budget",
        action="append",
        default=[],
        type=float,
        metavar="FLOPS",
        help="of the training to decide on; repeatable (default: 2 and 10 times the largest run)",
    )
    command.add_argument(
        "--confidence", type=float, default=0.9, metavar="SHARE", help="of intervals (default 0.9)"
    )
    command.add_argument(
        "--samples", type=int, default=500, metavar="N", help="of the bootstrap (default 500)"
    )


def _add_run_report(commands: SubCommands) -> None:
    report = commands.add_parser(
        "report",
        help="a page with curves, collapse monitors, throughput, k-NN and events of a run",
        description="Write one HTML page that needs no network, its plots as PNG and its numbers"
        " as JSON, of a run that has ended or still trains.",
    )
    report.add_argument("run_dir", metavar="RUN", help="directory of a run")
    report.add_argument("--out", metavar="DIR", help="where (default: `report` in RUN)")
    report.add_argument(
        "--no-attention", action="store_true", help="without pictures of where the teacher looks"
    )
    report.set_defaults(run=_run_report)


def _load(options: argparse.Namespace) -> SweepConfig:
    from dinoscale.config.sweep.file import load_sweep
    from dinoscale.errors import ConfigError

    if _is_table(options):
        raise ConfigError(f"{options.file}: `{options.action}` needs the file of the sweep, .yaml")
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
    from dinoscale.cli.evaluate import evaluation_words
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
                f"{error}\nwithout its runs nothing says which rows of {table} are theirs; with"
                f" `dinoscale sweep {table} {options.action}` all of them count"
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
    from dinoscale.reports.run.write import write_run_report

    run_dir = Path(options.run_dir)
    out = Path(options.out) if options.out else run_dir / "report"
    return write_run_report(run_dir, out, attention=not options.no_attention)
