"""A table of reports: a row for each file of weights, a column for each measurement.

Reports share a column only if task, protocol, data and code are equal. Properties of the weights
themselves (patch, mean and std of their pixels, which network) may differ within a column.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.provenance import WEIGHTS
from dinoscale.evaluate.sheet import short_names
from dinoscale.reports.comparison.paired_tests import PairedTest, paired_tests
from dinoscale.reports.comparison.ranks import mean_ranks, ranks_of
from dinoscale.runtime.fingerprint import digest_of

Report = Mapping[str, Any]  # as a task prints it
Scores = Mapping[str, float]
Kind = Literal["weights", "untrained", "floor"]

DATA_KEYS = ("train", "test", "spec", "masks", "data", "images", "objects")  # of reports
OF_THE_WEIGHTS = {
    "mean",
    "std",
    "white",
    "max_pixel_value",
    "patch",
    "network",
}  # last parts of protocol keys
OF_ROWS = {WEIGHTS, "probe"}  # inputs that are what a row measures
NOT_RANKED = {"pca", "rank"}  # tasks whose number does not measure quality


@dataclass(frozen=True)
class Outcome:
    """The report of one task on one file of weights, or its error."""

    weights: str
    network: str  # teacher or student
    task: str
    origin: str  # the task's line, or the file of the report
    report: Report | None
    error: str = ""  # the message, if there is no report


@dataclass(frozen=True)
class Cell:
    """One row in one column.

    Attributes:
        scores: of weights one; of a baseline all distinct ones of its reports; none if the task
            failed, or has no score.
        report: of weights.
        error: why there is no report.
    """

    scores: tuple[Scores, ...] = ()
    report: Report | None = None
    error: str = ""

    @property
    def headlines(self) -> list[float]:
        """The first number of each score."""
        return [next(iter(score.values())) for score in self.scores]

    @property
    def not_above_baselines(self) -> bool:
        """Whether a baseline of the cell's own report is as good."""
        baselines = [_scores(self.report, key) for key in ("untrained", "floors")]
        names = list(self.scores[0])[:1] if self.scores else []
        return any(
            scores.get(n, -math.inf) >= self.scores[0][n] for scores in baselines for n in names
        )


@dataclass
class Row:
    """A file of weights, or a baseline; its cells by number of the column."""

    label: str
    kind: Kind
    about: str  # full description
    cells: dict[int, Cell] = field(default_factory=dict)


@dataclass
class Column:
    """One task, measured by one protocol on one set of data.

    Attributes:
        task: its name.
        headline: name of the number that the table shows; empty if there is none.
        settings: protocol and data, flat: `train.images` -> 1000.
        differs: settings that differ from other columns of the task.
        origins: task lines and files of its reports.
    """

    task: str
    headline: str
    settings: dict[str, object]
    differs: dict[str, object] = field(default_factory=dict)
    origins: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Comparison:
    """The table; weights come first, then baselines.

    Attributes:
        columns: measurements.
        rows: weights and baselines.
        tests: number of a column -> which differences between its weights are more than chance.
    """

    columns: list[Column]
    rows: list[Row]
    tests: dict[int, list[PairedTest]] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Number of failed tasks."""
        return sum(bool(cell.error) for row in self.rows for cell in row.cells.values())

    def best(self, column: int) -> float | None:
        """The highest headline of a column; None if fewer than two weights can be ranked."""
        if self.columns[column].task in NOT_RANKED:
            return None
        weights = [
            row.cells[column] for row in self.rows if row.kind == "weights" and column in row.cells
        ]
        found = [cell.headlines[0] for cell in weights if cell.scores]
        return max(found) if len(found) > 1 else None

    def ranks(self, column: int) -> dict[str, float]:
        """Rank of each weights in a column by its headline, see `ranks_of`; empty if not ranked."""
        if self.columns[column].task in NOT_RANKED:
            return {}
        found = [(row.label, row.cells.get(column)) for row in self.rows if row.kind == "weights"]
        return ranks_of({label: cell.headlines[0] for label, cell in found if cell and cell.scores})

    def mean_ranks(self) -> tuple[dict[str, float], int]:
        """Mean rank of each weights, over how many columns that rank all of them."""
        labels = [row.label for row in self.rows if row.kind == "weights"]
        return mean_ranks([self.ranks(number) for number in range(len(self.columns))], labels)

    def as_json(self) -> dict[str, object]:
        """Ready for JSON; cells are in the order of the columns."""
        columns = [
            {"task": c.task, "headline": c.headline or None, "differs": c.differs}
            | {"settings": c.settings, "ranks": self.ranks(number)}
            | {"paired_tests": [test.as_json() for test in self.tests.get(number, ())]}
            for number, c in enumerate(self.columns)
        ]
        numbers = range(len(columns))
        rows = [
            {"label": row.label, "kind": row.kind, "about": row.about}
            | {"cells": [_cell_json(row.cells.get(number), row.kind) for number in numbers]}
            for row in self.rows
        ]
        means, of = self.mean_ranks()
        ranks = {"mean_ranks": means, "mean_ranks_of_columns": of}
        table = {"task": "compare", "columns": columns, "rows": rows}
        return {**table, **ranks, "failed": self.failed}


def _cell_json(cell: Cell | None, kind: Kind) -> dict[str, object] | None:
    if cell is None or kind != "weights":
        return None if cell is None else {"scores": [dict(score) for score in cell.scores]}
    return {"error": cell.error} if cell.error else {"score": dict(*cell.scores)}


def read_report(path: Path) -> dict[str, Any]:
    """Read the report of a task from a file.

    Raises:
        DataError: the file cannot be read, or is no report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not the JSON of one report ({error})") from error
    wrong = _mistake(report)
    if wrong:
        raise DataError(
            f"{path}: is no report of a task ({wrong}). Give what `dinoscale evaluate TASK ... >"
            " FILE.json` writes."
        )
    return dict(report)


def _mistake(report: object) -> str:
    """The first mistake in a report; empty if there is none."""
    if not isinstance(report, dict):
        return "need an object"
    for key in ("task", "weights"):
        if not isinstance(report.get(key), str):
            return f"`{key}` is no text"
    for key, kind in {"protocol": "settings", "backbone": "sizes"}.items():
        if not isinstance(report.get(key), dict):
            return f"`{key}` is no object of {kind}"
    if not _is_origin(report.get("made_from")):
        return "`made_from` is no fingerprint"
    for key in ("score", "untrained", "floors"):
        scores = report.get(key)
        if scores is not None and not _are_scores(scores):
            return f"`{key}` is no object of numbers"
    if not all(map(_is_sequence, report.get("sequences", ()))):
        return "`sequences` is no list of scores by video"
    return "" if "score" in report else "`score` is missing"


def _is_origin(made_from: object) -> bool:
    """Whether it is a fingerprint by `provenance.made_from`, or missing, as in Python reports."""
    if made_from is None:
        return True
    inputs = made_from.get("input") if isinstance(made_from, dict) else None
    return isinstance(inputs, dict) and all(
        not isinstance(files, dict) or "number" in files for files in inputs.values()
    )


def _are_scores(scores: object) -> bool:
    return isinstance(scores, dict) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in scores.values()
    )


def _is_sequence(entry: object) -> bool:
    if not isinstance(entry, dict) or "sequence" not in entry:
        return False
    scores = entry.get("score")
    return _are_scores(scores) and (not scores or "J&F" in scores)


def outcome_of_report(path: Path) -> Outcome:
    """Make an outcome of the report in a file.

    Raises:
        DataError: as `read_report`.
    """
    report = read_report(path)
    network = str(report["protocol"].get("network", "teacher"))
    return Outcome(report["weights"], network, report["task"], str(path), report)


def compare(outcomes: Sequence[Outcome]) -> Comparison:
    """Make the table.

    Args:
        outcomes: at least one; rows and columns are in their order.

    Raises:
        ConfigError: two reports give different numbers for the same weights, task and protocol.
    """
    table = Comparison([], [])
    rows: dict[tuple[str, ...], Row] = {}
    done = [outcome for outcome in outcomes if outcome.report is not None]
    for outcome in done:
        number = _column_of(outcome, table.columns)
        row = rows.setdefault(_row_key(outcome), _row(outcome))
        score = _scores(outcome.report, "score")
        cell = Cell((score,) if score else (), outcome.report)
        if number in row.cells and row.cells[number].scores != cell.scores:
            raise ConfigError(
                f"{outcome.origin}: another report has different numbers of {outcome.task} for"
                f" {outcome.weights}, measured alike. Leave one of them out."
            )
        row.cells[number] = cell
    _add_failures([outcome for outcome in outcomes if outcome.report is None], table.columns, rows)
    table.rows.extend(_labelled(_in_order(outcomes, rows)))
    table.rows.extend(_baselines(table.rows))
    for column in table.columns:
        column.differs = _differences(column, table.columns)
    for number in range(len(table.columns)):
        cells = {row.label: row.cells[number] for row in table.rows if number in row.cells}
        table.tests[number] = paired_tests(
            {label: cell.report for label, cell in cells.items() if cell.report is not None}
        )
    return table


def _scores(report: Report | None, key: str) -> Scores:
    return (report or {}).get(key) or {}


def _column_of(outcome: Outcome, columns: list[Column]) -> int:
    """Number of the column of a report; a new column if none has the same settings."""
    report = outcome.report or {}
    data = {key: report[key] for key in DATA_KEYS if report.get(key) is not None}
    if "sequences" in report:  # of video
        data["sequences"] = [sequence["sequence"] for sequence in report["sequences"]]
    settings = {
        key: value
        for key, value in _flat({**report["protocol"], **data}).items()
        if key.rpartition(".")[2] not in OF_THE_WEIGHTS
    }
    settings |= _made_from(report)
    headline = next(iter(_scores(report, "score")), "")
    new = Column(outcome.task, headline, settings)
    for number, column in enumerate(columns):
        if (column.task, column.headline, column.settings) == (new.task, headline, settings):
            column.origins.add(outcome.origin)
            return number
    columns.append(new)
    new.origins.add(outcome.origin)
    return len(columns) - 1


def _made_from(report: Report) -> dict[str, object]:
    """Digests of the code and of the input files except the weights, as settings."""
    made_from = report.get("made_from") or {}
    code = {"code": digest_of(made_from["code"])} if "code" in made_from else {}
    inputs = {name: of for name, of in _inputs(report).items() if name not in OF_ROWS}
    files = {f"files.{name}": of for name, of in inputs.items()}
    return {**files, **code}


def _inputs(report: Report) -> dict[str, str]:
    """Number and digest of the files of each input, independent of their paths."""
    inputs = (report.get("made_from") or {}).get("input", {})
    return {
        name: f"{files['number']}, {digest_of({**files, 'root': None})}"
        for name, files in inputs.items()
        if isinstance(files, dict)
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested settings with dotted names."""
    flat: dict[str, object] = {}
    for key, value in settings.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _row_key(outcome: Outcome) -> tuple[str, ...]:
    """Equal for results of the same network; the path alone does not identify it."""
    report = outcome.report or {}
    known = [report.get("weights_source"), report.get("backbone"), _inputs(report).get(WEIGHTS)]
    kind = json.dumps(known, sort_keys=True)
    return (outcome.weights, outcome.network, kind)


def _row(outcome: Outcome) -> Row:
    """A row, whose label `_labelled` completes."""
    report = outcome.report or {}
    source = report.get("weights_source")
    said = [outcome.network, _architecture(report.get("backbone") or {})]
    about = ", ".join([*filter(None, said), *([f"from {source}"] if source else [])])
    student = " (student)" if outcome.network == "student" else ""
    return Row(student, "weights", f"{outcome.weights}: {about}")


def _architecture(backbone: Mapping[str, object]) -> str:
    """A description of the sizes, unique for each architecture."""
    sizes = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in backbone.items()
        if key != "name" and value not in (None, False)
    ]
    return f"{backbone.get('name', '')} ({', '.join(sizes)})" if sizes else ""


def _add_failures(
    failures: Iterable[Outcome], columns: list[Column], rows: dict[tuple[str, ...], Row]
) -> None:
    """Put each error into the cell where its number would be."""
    for failure in failures:
        known = [n for n, column in enumerate(columns) if failure.origin in column.origins]
        if not known:
            known = [len(columns)]
            columns.append(Column(failure.task, "", {}, origins={failure.origin}))
        keys = [key for key in rows if key[:2] == (failure.weights, failure.network)]
        key = keys[0] if keys else _row_key(failure)
        row = rows.setdefault(key, _row(failure))
        row.cells[known[0]] = Cell(error=failure.error)


def _in_order(
    outcomes: Sequence[Outcome], rows: Mapping[tuple[str, ...], Row]
) -> dict[str, list[Row]]:
    """Rows by their weights, in the order of the outcomes."""
    order = {outcome.weights: list[Row]() for outcome in outcomes}
    for key, row in rows.items():
        order[key[0]].append(row)
    return order


def _labelled(order: Mapping[str, list[Row]]) -> list[Row]:
    """Label rows by the shortest ends of their paths that tell them apart."""
    for name, rows in zip(short_names(list(order)), order.values(), strict=True):
        seen = Counter[str]()
        for row in rows:
            seen[row.label] += 1
            number = f" #{seen[row.label]}" if seen[row.label] > 1 else ""
            row.label = f"{name}{row.label}{number}"
    return [row for rows in order.values() for row in rows]


def _baselines(rows: Sequence[Row]) -> list[Row]:
    """Rows of the baselines in the reports: untrained networks by architecture, and others."""
    found: dict[str, Row] = {}
    reports = [(n, cell.report) for row in rows for n, cell in row.cells.items() if cell.report]
    shapes = {_architecture(report["backbone"]): report["backbone"] for _, report in reports}
    names = Counter(str(shape.get("name")) for shape in shapes.values())
    for number, report in reports:
        whole = _architecture(report["backbone"])
        name = str(report["backbone"].get("name"))
        label = f"untrained {name if names[name] == 1 else whole}"
        row = Row(label, "untrained", f"fresh weights: {whole}")
        _add_baseline(found, row, number, report, "untrained")
    for number, report in reports:
        about = "scores without a network; see each task"
        _add_baseline(found, Row("baseline", "floor", about), number, report, "floors")
    return list(found.values())


def _add_baseline(found: dict[str, Row], new: Row, column: int, report: Report, key: str) -> None:
    """Add a score to its row, unless the row has it already, to the digits that are shown."""
    score = _scores(report, key)
    if score:
        row = found.setdefault(new.label, new)
        scores = row.cells.get(column, Cell()).scores
        if all(_shown(score) != _shown(other) for other in scores):
            row.cells[column] = Cell((*scores, score))


def _shown(score: Scores) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in score.items()}


def _differences(column: Column, columns: Sequence[Column]) -> dict[str, object]:
    """Settings of a column that another column of the same task does not share."""
    others = [other.settings for other in columns if other.task == column.task and other.settings]
    return {
        key: value
        for key, value in column.settings.items()
        if any(key not in other or other[key] != value for other in others)
    }
