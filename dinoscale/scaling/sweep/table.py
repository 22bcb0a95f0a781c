"""The results of a sweep: an append-only CSV file with a row for each run that ended.

It is all that `fit` and `report` need. A run that ends again, after a retry or with another metric,
gets another row; the last one counts. Cells with several values are JSON.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dinoscale.config.renamed import AXES, with_new_keys, with_new_names
from dinoscale.errors import DataError
from dinoscale.runtime.outputs import replace_text

log = logging.getLogger(__name__)

TABLE = "results.csv"  # in the folder of the sweep


@dataclass(frozen=True)
class Row:
    """A run that ended.

    Attributes:
        key: key of the run, see `PlannedRun`.
        name: name of the run.
        status: done, or failed after all retries.
        ended: time of the end, ISO 8601 in UTC.
        attempts: number of attempts.
        parameters: N, parameters of the backbone.
        flops_per_image: training FLOPs per image.
        images: D, images seen.
        distinct_images: at most this many different images among them.
        steps: optimizer steps.
        flops: C, training FLOPs.
        embed_dim: width of the backbone; None for a ResNet.
        depth: number of blocks of the backbone; None for a ResNet.
        batch_size: images per step.
        lr: peak learning rate.
        seed: random seed.
        seconds: training time, summed over all attempts.
        ranks: processes, usually GPUs.
        metrics: lower is better; errors as fractions, losses in nats; None where a metric is not
            finite or could not be measured.
        curves: metrics during training: {"step", "images", name of metric: value, ...}.
        axes: axis -> value in the sweep.
        config: all settings.
        versions: versions of libraries and code.
        error: why it failed, else empty.
        lines: metric -> line of the sweep's file that measured it.
        prints: metric -> fingerprint of its images and code, see `measured_on.py`.
        events: counts of events during training, such as collapse, rolled back, skipped.
        rules: rules of the sweep, by which settings scale with sizes.
    """

    key: str
    name: str
    status: Literal["done", "failed"]
    ended: str
    attempts: int
    parameters: int
    flops_per_image: int
    images: int
    distinct_images: int
    steps: int
    flops: int
    embed_dim: int | None
    depth: int | None
    batch_size: int
    lr: float
    seed: int
    seconds: float
    ranks: int
    metrics: Mapping[str, float | None]
    curves: Sequence[Mapping[str, float | None]] = field(repr=False)
    axes: Mapping[str, object]
    config: Mapping[str, Any] = field(repr=False)
    versions: Mapping[str, str | None] = field(repr=False)
    error: str = ""
    lines: Mapping[str, str] = field(default_factory=dict, repr=False)
    prints: Mapping[str, Any] = field(default_factory=dict, repr=False)
    events: Mapping[str, int] = field(default_factory=dict)
    rules: Mapping[str, Any] = field(default_factory=dict, repr=False)


_COLUMNS = [column.name for column in fields(Row)]
_ADDED = {name: "{}" for name in ("lines", "prints", "events", "rules")}  # older tables lack them
_JSON = {
    **{"metrics": dict, "curves": list, "axes": dict, "config": dict, "versions": dict},
    **dict.fromkeys(_ADDED, dict),
}
_INTEGERS = (
    *("attempts", "parameters", "flops_per_image", "images", "distinct_images", "steps", "flops"),
    *("embed_dim", "depth", "batch_size", "seed", "ranks"),
)
_NUMBERS = ("lr", "seconds")
_MAY_BE_EMPTY = ("embed_dim", "depth")


def append_row(path: Path, row: Row) -> None:
    """Append a row; a last line truncated by a crash is dropped first.

    Raises:
        DataError: the file cannot be written, or is not the table of a sweep.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if _keep_whole_lines(path) == 0:
        writer.writerow(_COLUMNS)
    else:
        _add_columns(path)
    writer.writerow(_cell(name, value) for name, value in asdict(row).items())
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}).") from error


def _cell(name: str, value: object) -> object:
    """A value as one line of text, since a row ends where its line does."""
    if name in _JSON:
        return json.dumps(value)
    return " ".join(value.split()) if isinstance(value, str) else value


def read_table(path: Path) -> list[Row]:
    """The last row of every run, in the order in which the runs first ended.

    Raises:
        DataError: the file cannot be read, or is not the table of a sweep.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no table yet; `dinoscale sweep FILE run` writes it."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as the table of a sweep ({error}).") from error
    whole = text[: text.rfind("\n") + 1]
    if len(whole) < len(text):
        log.warning("%s: the last line is truncated and was skipped", path)
    csv.field_size_limit(2**30)  # curves of a long run
    reader = csv.reader(io.StringIO(whole, newline=""))
    rows: dict[str, Row] = {}
    columns: list[str] = []
    for number, cells in enumerate(reader):
        if number == 0:
            columns = cells
            if columns != _COLUMNS[: len(columns)] or not _has_all(columns):
                raise DataError(
                    f"{path}: the first line is not that of a sweep's table: {','.join(_COLUMNS)}"
                )
            continue
        row = _row(columns, cells, where=f"{path}, line {reader.line_num}")
        rows[row.key] = row
    return list(rows.values())


def _has_all(columns: Sequence[str]) -> bool:
    """Whether the columns include all that every version wrote."""
    return len(columns) >= len(_COLUMNS) - len(_ADDED)


def _row(columns: Sequence[str], cells: Sequence[str], *, where: str) -> Row:
    if len(cells) != len(columns):
        raise DataError(f"{where}: has {len(cells)} cells, need {len(columns)}. Repair the line.")
    values = {name: _value(name, text, where) for name, text in zip(columns, cells, strict=True)}
    metrics = values["metrics"].items()
    values["metrics"] = {name: _finite(value, where) for name, value in metrics}
    values["axes"] = with_new_keys(values["axes"], AXES)
    values["config"] = with_new_names(values["config"])
    return Row(**values)


def _value(name: str, text: str, where: str) -> Any:
    try:
        if name in _JSON:
            value = json.loads(text)
            if isinstance(value, _JSON[name]):
                return value
            raise ValueError
        if name in _INTEGERS:
            return None if not text and name in _MAY_BE_EMPTY else int(text)
        return float(text) if name in _NUMBERS else text
    except (ValueError, RecursionError):
        raise DataError(f"{where}: {name} cannot be {text[:60]!r}. Repair the line.") from None


def _finite(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: a metric cannot be {value!r}. Repair the line.")
    return float(value) if math.isfinite(value) else None


def _keep_whole_lines(path: Path) -> int:
    """Truncate a file after its last whole line; return the bytes kept."""
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}).") from error
    return whole


def _add_columns(path: Path) -> None:
    """Add the missing columns to the table of an earlier version, atomically."""
    with path.open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader([file.readline()]), [])
    missing = [name for name in _ADDED if name not in columns]
    if not missing or not _has_all(columns):
        return
    head, _, rest = path.read_text(encoding="utf-8").partition("\n")
    more = "".join(f",{_ADDED[name]}" for name in missing)
    lines = [f"{head},{','.join(missing)}", *(f"{line}{more}" for line in rest.split("\n")[:-1])]
    try:
        replace_text(path, "\n".join([*lines, ""]))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}).") from error
