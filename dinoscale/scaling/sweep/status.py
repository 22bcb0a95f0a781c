"""The progress of a sweep, read from its files, also while another process runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoscale.checkpoint.layout import checkpoints
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.sweep.reuse import with_known_keys
from dinoscale.scaling.sweep.run_files import (
    Job,
    Result,
    folders_of,
    is_alive,
    read_job,
    read_result,
)
from dinoscale.scaling.sweep.run_logs import METRICS, last_step
from dinoscale.scaling.sweep.table import TABLE, Row, read_table

_STATES = ("done", "failed", "running", "interrupted", "waiting")
_WIDTH = 110  # columns of the text


def read_status(runs: Sequence[PlannedRun], *, out: Path, parallel: int = 1) -> dict[str, Any]:
    """State, progress, metrics and error of each run, and the estimated time left.

    Args:
        runs: runs of the sweep.
        out: folder of the sweep.
        parallel: runs at a time.

    Returns:
        JSON-able: `runs`, `totals` by state, `hours_left` (None until a run is done), `table`.

    Raises:
        DataError: the table cannot be read.
    """
    table = out / TABLE
    rows = {row.key: row for row in read_table(table)} if table.exists() else {}
    runs = with_known_keys(runs, rows.values(), out)
    folders = folders_of(runs, out)
    states = [_state(run, rows.get(run.key), folders[run.key]) for run in runs]
    totals = Counter(state["state"] for state in states)
    return {
        "runs": states,
        "totals": {state: totals[state] for state in _STATES},
        "hours_left": _hours_left(runs, states, rows, parallel=parallel),
        "table": str(table) if rows else None,
    }


def _state(run: PlannedRun, row: Row | None, folder: Path) -> dict[str, Any]:
    job, result = read_job(folder), read_result(folder, run.key)
    if job is not None and job.key != run.key:
        job, result = None, Result(run.key)
    started = job is not None and (bool(checkpoints(folder)) or (folder / METRICS).exists())
    state = "interrupted" if started else "waiting"
    step = last_step(folder / METRICS) if started else 0
    if job is not None and job.handle and not result.ending and is_alive(folder):
        state = "running"
    elif row is not None:
        state, step = row.status, run.steps if row.status == "done" else step
    return {
        "name": run.name,
        "state": state,
        "step": min(step, run.steps),
        "steps": run.steps,
        "attempts": _attempts(job, row, running=state == "running"),
        "seconds": row.seconds if row else result.seconds,
        "metrics": dict(row.metrics if row else result.metrics),
        "error": row.error if row else result.error,
    }


def _attempts(job: Job | None, row: Row | None, *, running: bool) -> int:
    if job is None:
        return row.attempts if row else 0
    return max(job.failures + running, row.attempts if row else 0)


def _hours_left(
    runs: Sequence[PlannedRun],
    states: Sequence[Mapping[str, Any]],
    rows: Mapping[str, Row],
    *,
    parallel: int,
) -> float | None:
    """Estimated from the FLOPs per second of the completed runs."""
    done = [row for row in rows.values() if row.status == "done" and row.seconds > 0]
    if not done:
        return None
    rate = sum(row.flops for row in done) / sum(row.seconds for row in done)
    left = sum(
        run.flops * (1 - state["step"] / max(1, run.steps))
        for run, state in zip(runs, states, strict=True)
        if state["state"] not in ("done", "failed")
    )
    unfinished = sum(state["state"] not in ("done", "failed") for state in states)
    return float(left / rate / max(1, min(parallel, unfinished)) / 3600)


def as_text(status: dict[str, Any]) -> str:
    """The status as text: one line per run, with its error below."""
    table = [("run", "state", "step", "tries", "metrics")]
    for run in status["runs"]:
        metrics = ", ".join(f"{name} {_number(value)}" for name, value in run["metrics"].items())
        step = f"{run['step']}/{run['steps']}"
        table.append((run["name"], run["state"], step, str(run["attempts"]), metrics))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    widths[0] = min(widths[0], 50)
    lines = [_line(table[0], widths)]
    for cells, run in zip(table[1:], status["runs"], strict=True):
        lines.append(_line(cells, widths))
        if run["error"]:
            lines.append(_cut(f"    {' '.join(run['error'].split())}"))
    totals = [f"{number} {state}" for state, number in status["totals"].items() if number]
    hours = status["hours_left"]
    left = "" if hours is None or not _unfinished(status) else f"; about {_hours(hours)} left"
    lines += ["", f"{len(status['runs'])} runs: {', '.join(totals)}{left}"]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    short = [_cut(cell, width) for cell, width in zip(cells, widths, strict=True)]
    return _cut("  ".join(map(str.ljust, short, widths)).rstrip())


def _cut(text: str, width: int = _WIDTH) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _unfinished(status: Mapping[str, Any]) -> bool:
    return any(run["state"] not in ("done", "failed") for run in status["runs"])


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(1, round(hours * 60))} minutes"
