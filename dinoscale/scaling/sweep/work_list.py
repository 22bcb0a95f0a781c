"""What a sweep is about to do with every run and row, and why, before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.sweep.measured_on import changed_input, print_of
from dinoscale.scaling.sweep.reuse import abandoned, lines_of
from dinoscale.scaling.sweep.run_files import Result
from dinoscale.scaling.sweep.table import Row


def to_measure(
    row: Row, result: Result, metrics: Mapping[str, str], commands: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Metrics that a run lacks, or has by another line or of other images, and why.

    Args:
        row: of the run.
        result: that its folder tells.
        metrics: of the sweep, name -> line.
        commands: that measure those with a line.
    """
    lines, prints = {**result.lines, **row.lines}, {**result.prints, **row.prints}
    found = {}
    for name, line in metrics.items():
        if name not in row.metrics:
            found[name] = "new"
        elif lines.get(name, line) != line:
            found[name] = f"was measured by {lines[name]!r}"
        elif name in result.lines and name not in lines_of(row, result):
            found[name] = "the table does not have what its folder has"  # the sweep was ended
        elif name in prints:
            changed = changed_input(prints[name], print_of(line, commands.get(name, ())))
            if changed:
                found[name] = f"was measured on other images ({', '.join(changed)})"
    return found


def intentions(
    runs: Sequence[PlannedRun],
    rows: Mapping[str, Row],
    wanted: Collection[str],
    why: Callable[[PlannedRun, Row], Mapping[str, str]],
    folder: Callable[[PlannedRun], Path],
) -> Iterator[str]:
    """Sentences: how many runs are new, done and so on, what is measured again, what is left alone.

    Args:
        runs: of the file.
        rows: of the table, by key.
        wanted: keys of runs for which there is something to do.
        why: as `to_measure`, of a run that is done.
        folder: of a run.
    """
    ended = [rows[run.key] for run in runs if run.key in rows]
    new = [run for run in runs if run.key not in rows]
    begun = [run for run in new if folder(run).exists()]
    resting = [row for row in ended if row.key not in wanted]
    counts = {
        "new": len(new) - len(begun),
        "to go on": len(begun),
        "to be tried again": sum(bool(row.error) and row.key in wanted for row in ended),
        "done": sum(row.status == "done" for row in resting),
        "failed, left so without --retry-failed": sum(row.status == "failed" for row in resting),
    }
    shares = [f"{count} {what}" for what, count in counts.items() if count]
    yield f"{len(runs)} runs: {', '.join(shares) or 'all to be measured'}"
    for run in runs:
        row = rows.get(run.key)
        reasons = why(run, row) if row is not None and row.status == "done" else {}
        gone = "" if run.key in wanted else ", but its folder is gone: left as it is"
        for name, reason in reasons.items():
            yield f"{run.name}: {name} is to be measured: {reason}{gone}"
    yield from abandoned(list(rows.values()), runs)
