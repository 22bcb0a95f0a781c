"""The table only grows, and a crash costs at most the line that was being written."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from dinoscale.errors import DataError
from dinoscale.scaling.sweep.run_files import Job, Result
from dinoscale.scaling.sweep.table import append_row, read_table
from dinoscale.scaling.sweep.table_row import row_of
from tests.unit.sweep.tiny_sweep import planned

ROW = row_of(
    planned(1),
    Job("1" * 16),
    Result(
        "1" * 16,
        trained=True,
        seconds=12.34,
        curves=[{"step": 1, "images": 16, "loss": None}],
        versions={"torch": "2", "commit": None},
    ),
    metrics={"knn": 0.25, "other": None},
)
OTHER = replace(ROW, key="2" * 16, name='other, "quoted"', embed_dim=None, depth=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    append_row(path, ROW)
    append_row(path, OTHER)
    return path


def test_rows_come_back_as_they_were(path: Path) -> None:
    assert read_table(path) == [ROW, OTHER]


def test_last_row_of_a_run_counts_in_its_first_place(path: Path) -> None:
    newer = replace(ROW, metrics={"knn": 0.125})
    append_row(path, newer)
    assert read_table(path) == [newer, OTHER]


def test_line_that_a_crash_cut_off_is_dropped(path: Path) -> None:
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 300):
        path.write_bytes(whole[:length])
        assert read_table(path)[0] == ROW
        append_row(path, OTHER)
        assert read_table(path) == [ROW, OTHER]


def test_error_of_several_lines_takes_one(path: Path) -> None:
    append_row(path, replace(ROW, error="model: bad\n  data: worse\r\n"))
    assert read_table(path)[0].error == "model: bad data: worse"
    assert len(path.read_text().splitlines()) == 4


def test_header_that_a_crash_cut_off_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("key,na")
    append_row(path, ROW)
    assert read_table(path) == [ROW]


def test_metric_that_is_not_finite_is_no_number(path: Path) -> None:
    path.write_text(path.read_text().replace("0.25", "NaN"))
    assert read_table(path)[0].metrics["knn"] is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("key,name", "key,title", "the first line is not that of a sweep's table"),
        (",12.3,", ",twelve,", "line 2: seconds cannot be 'twelve'"),
        (",1000,", ",1.5,", "line 2: parameters cannot be '1.5'"),
        ("0.25", "true", "line 2: a metric cannot be True"),
        (",done,", ",", "line 2: has 27 cells, need 28"),
        (",1000,", ",,", "line 2: parameters cannot be ''"),
        ('"{""torch"": ""2"", ""commit"": null}"', "[]", r"line 2: versions cannot be '\[\]'"),
    ],
)
def test_damaged_cell_is_named(path: Path, old: str, new: str, said: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=said):
        read_table(path)


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/results\.csv: cannot be written"):
        append_row(tmp_path / "nowhere" / "results.csv", ROW)


def test_a_table_of_an_earlier_version_is_read_and_gets_its_columns(path: Path) -> None:
    with path.open(newline="") as file:
        old = [cells[:-4] for cells in csv.reader(file)]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(old)
    rows = read_table(path)
    assert [(row.lines, row.events) for row in rows] == [({}, {})] * len(rows)
    append_row(path, replace(ROW, key="other", lines={"knn": "online"}))
    *first, last = read_table(path)
    assert first == rows
    assert last.lines == {"knn": "online"}
