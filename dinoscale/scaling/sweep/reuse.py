"""Match existing results to the runs and metrics of a sweep's file.

A table outlives versions of the file and of the code. Results that no longer match are named, left
untouched, and never mixed with those that do.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinoscale.config import load_config, parse_config
from dinoscale.errors import ConfigError
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.design.run_key import NOT_IN_KEY, key_of
from dinoscale.scaling.sweep.measured_on import changed_input
from dinoscale.scaling.sweep.run_files import (
    RUNS,
    SETTINGS,
    Result,
    folders_of,
    read_job,
    read_result,
)
from dinoscale.scaling.sweep.table import Row

_MAX_SHOWN = 3  # names in a sentence


def with_known_keys(runs: Sequence[PlannedRun], rows: Iterable[Row], out: Path) -> list[PlannedRun]:
    """The runs under the keys that tables and folders of an earlier version use for them.

    Keys once covered settings that change no number. Two runs are the same if their current keys
    are equal.

    Args:
        runs: runs as planned.
        rows: rows of the table.
        out: folder of the sweep.
    """
    planned = {run.key for run in runs}
    known: dict[str, str] = {}  # later entries win, so that no completed run is trained again
    for folder in sorted((out / RUNS).glob("*")) if planned else ():
        job = read_job(folder)
        with contextlib.suppress(ConfigError):
            if job is not None and job.key not in planned:
                known[key_of(load_config(str(folder / SETTINGS)))] = job.key
    for row in sorted(rows, key=lambda row: (row.status == "done", row.key in planned)):
        with contextlib.suppress(ConfigError):  # settings of another version: a different run
            current = row.key if row.key in planned else key_of(parse_config(row.config))
            known[current] = row.key
    return [replace(run, key=known.get(run.key, run.key)) for run in runs]


def with_known_lines(rows: Sequence[Row], runs: Sequence[PlannedRun], out: Path) -> list[Row]:
    """Rows with the lines of their metrics, which an earlier version kept only in the folders.

    Args:
        rows: rows of the table.
        runs: runs of the file, under the keys of the table.
        out: folder of the sweep.
    """
    folders = folders_of(runs, out)
    return [
        replace(row, lines=lines_of(row, read_result(folders[row.key], row.key)))
        if row.key in folders and not row.lines
        else row
        for row in rows
    ]


def lines_of(row: Row, result: Result) -> dict[str, str]:
    """Metric -> line that measured it; from the folder only where its value is the same."""
    same = {
        name: line
        for name, line in result.lines.items()
        if name in row.metrics and row.metrics[name] == result.metrics.get(name)
    }
    return {**same, **row.lines}


def rows_of_sweep(
    rows: Sequence[Row], runs: Sequence[PlannedRun], metrics: Mapping[str, str]
) -> tuple[list[Row], list[str]]:
    """The rows of a file's runs, with its metrics only, and sentences on what was left out.

    Args:
        rows: rows of the table.
        runs: runs of the file, under the keys of the table.
        metrics: metrics of the file, name -> line.
    """
    keys = {run.key for run in runs}
    notes = [*describe_unmatched(rows, runs)]
    kept = [row for row in rows if row.key in keys]
    for name, line in metrics.items():
        kept, more_notes = _of_metric(kept, name, line)
        notes += more_notes
    own = [_with_metrics(row, [name for name in metrics if name in row.metrics]) for row in kept]
    return own, notes


def rows_of_table(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows of a bare table, with the values of each metric by its most recent line."""
    kept, notes = list(rows), list[str]()
    for name in dict.fromkeys(name for row in rows for name in row.metrics):
        lines = [row.lines[name] for row in sorted(rows, key=_ended) if name in row.lines]
        if lines:
            kept, more_notes = _of_metric(kept, name, lines[-1])
            notes += more_notes
    return kept, notes


def _ended(row: Row) -> str:
    return row.ended


def _of_metric(rows: Sequence[Row], name: str, line: str) -> tuple[list[Row], list[str]]:
    """Drop values of a metric by another line, or on other images than the most recent ones."""
    by_line = [row for row in rows if row.lines.get(name, line) != line]
    fingerprinted = [
        row for row in sorted(rows, key=_ended) if row.prints.get(name) and row not in by_line
    ]
    newest = fingerprinted[-1].prints[name] if fingerprinted else {}
    by_images = [row for row in fingerprinted if changed_input(row.prints[name], newest)]
    notes = []
    if by_line:
        others = sorted({row.lines[name] for row in by_line})
        notes.append(
            f"{name} of {_runs(by_line)} left out: measured by {_some(others)}, not by {line!r};"
            " `dinoscale sweep FILE run` measures again where the weights still exist"
        )
    if by_images:
        parts = (changed_input(row.prints[name], newest) for row in by_images)
        what = sorted({each for changed in parts for each in changed})
        notes.append(
            f"{name} of {_runs(by_images)} left out: measured on other images than the latest runs"
            f" ({', '.join(what[:_MAX_SHOWN])}); `dinoscale sweep FILE run` measures again"
        )
    out = {row.key for row in (*by_line, *by_images)}
    return [
        _with_metrics(row, [each for each in row.metrics if each != name])
        if row.key in out
        else row
        for row in rows
    ], notes


def _with_metrics(row: Row, names: Sequence[str]) -> Row:
    return replace(row, metrics={name: row.metrics[name] for name in names})


def describe_unmatched(rows: Sequence[Row], runs: Sequence[PlannedRun]) -> Iterator[str]:
    """A sentence on the rows that match no run, with the settings in which they differ."""
    keys = {run.key for run in runs}
    others = [row for row in rows if row.key not in keys]
    if not others:
        return
    planned = [_flat(run.config.model_dump(mode="json")) for run in runs]
    reasons = Counter(_differing(row, planned) for row in others)
    because = "; ".join(f"{count} in {why}" for why, count in reasons.most_common(_MAX_SHOWN))
    yield (
        f"{_runs(others)} of the table left out: the file has no such run (differences to the"
        f" nearest of its runs: {because})"
    )


def _differing(row: Row, planned: Sequence[Mapping[str, object]]) -> str:
    """The settings in which a row differs from the nearest run."""
    own = _flat(row.config)
    differing = (
        sorted(name for name in own.keys() | run.keys() if own.get(name) != run.get(name))
        for run in planned
    )
    found = min(differing, key=len, default=[])
    more = ", ..." if len(found) > _MAX_SHOWN else ""
    return ", ".join(found[:_MAX_SHOWN]) + more or "their keys only"


def _flat(config: Mapping[str, Any]) -> dict[str, object]:
    """Settings by dotted key, without those that do not enter the key of a run."""
    flat: dict[str, object] = {}
    for section, values in config.items():
        inner = values.items() if isinstance(values, dict) else [("", values)]
        flat |= {f"{section}.{name}".rstrip("."): value for name, value in inner}
    return {
        name: value
        for name, value in flat.items()
        if not {name, name.partition(".")[0]} & set(NOT_IN_KEY)
    }


def _runs(rows: Sequence[Row]) -> str:
    names = [row.name for row in rows]
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    count = f"{len(names)} run{'s' * (len(names) > 1)}"
    return f"{count} ({', '.join(names[:_MAX_SHOWN])}{more})"


def _some(lines: Sequence[str]) -> str:
    return " and ".join(repr(line) for line in lines[:_MAX_SHOWN])
