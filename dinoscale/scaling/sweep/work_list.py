"""What a sweep will do with every run and row, and why; logged before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.sweep.measured_on import changed_input, measurement_fingerprint
from dinoscale.scaling.sweep.reuse import describe_unmatched, lines_of
from dinoscale.scaling.sweep.run_files import Result
from dinoscale.scaling.sweep.table import Row


def to_measure(
    row: Row, result: Result, metrics: Mapping[str, str], commands: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """The metrics to measure for a run, with the reasons: missing, another line, other images.

    Args:
        row: row of the run.
        result: result in its folder.
        metrics: metrics of the sweep, name -> line.
        commands: commands that measure the metrics with a line.
    """
    lines, prints = {**result.lines, **row.lines}, {**result.prints, **row.prints}
    found = {}
    for name, line in metrics.items():
        if name not in row.metrics:
            found[name] = "new"
        elif lines.get(name, line) != line:
            found[name] = f"was measured by {lines[name]!r}"
        elif name in result.lines and name not in lines_of(row, result):
            found[name] = "the table lacks the value in its folder"  # the sweep was killed between
        elif name in prints:
            changed = changed_input(
                prints[name], measurement_fingerprint(line, commands.get(name, ()))
            )
            if changed:
                found[name] = f"was measured on other images ({', '.join(changed)})"
    return found


def describe_work(
    runs: Sequence[PlannedRun],
    rows: Mapping[str, Row],
    pending: Collection[str],
    why: Callable[[PlannedRun, Row], Mapping[str, str]],
    folder: Callable[[PlannedRun], Path],
) -> Iterator[str]:
    """Sentences on how many runs are new, done, etc., what is measured again, and what is skipped.

    Args:
        runs: runs of the file.
        rows: rows of the table, by key.
        pending: keys of the runs that have work left.
        why: `to_measure` for a run that is done.
        folder: folder of a run.
    """
    ended = [rows[run.key] for run in runs if run.key in rows]
    new = [run for run in runs if run.key not in rows]
    started = [run for run in new if folder(run).exists()]
    finished = [row for row in ended if row.key not in pending]
    counts = {
        "new": len(new) - len(started),
        "to continue": len(started),
        "to retry": sum(bool(row.error) and row.key in pending for row in ended),
        "done": sum(row.status == "done" for row in finished),
        "failed (retry with --retry-failed)": sum(row.status == "failed" for row in finished),
    }
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    yield f"{len(runs)} runs: {', '.join(parts) or 'all to be measured'}"
    for run in runs:
        row = rows.get(run.key)
        reasons = why(run, row) if row is not None and row.status == "done" else {}
        gone = "" if run.key in pending else ", but its folder is gone: skipped"
        for name, reason in reasons.items():
            yield f"{run.name}: measure {name}: {reason}{gone}"
    yield from describe_unmatched(list(rows.values()), runs)
