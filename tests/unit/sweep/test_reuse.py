"""Results of another version of a file, line or set of images are named and never mixed in."""

from dataclasses import replace
from pathlib import Path

import pytest

from dinoscale.scaling.design.run_key import key_of
from dinoscale.scaling.sweep.reuse import (
    rows_of_sweep,
    rows_of_table,
    with_known_keys,
    with_known_lines,
)
from dinoscale.scaling.sweep.run_files import RUNS as FOLDERS
from dinoscale.scaling.sweep.run_files import Job, Result, write_record
from dinoscale.scaling.sweep.table import Row
from dinoscale.scaling.sweep.table_row import row_of
from dinoscale.scaling.sweep.work_list import to_measure
from tests.unit.sweep.tiny_sweep import planned

RUNS = [planned(number) for number in range(3)]
LINE, OTHER = "knn --train a --test b", "knn --train a --test b --k 5"


def _row(number: int, line: str = LINE, *, images: str = "x", **changes: object) -> Row:
    run = RUNS[number]
    print_ = {"input": {"b": {"names": images}}, "command": {"line": line}, "code": {}}
    result = Result(run.key, trained=True, lines={"knn": line}, prints={"knn": print_})
    row = row_of(run, Job(run.key), result, metrics={"knn": 0.5})
    return replace(row, ended=f"2030-01-0{number + 1}", **changes)  # type: ignore[arg-type]


def test_rows_of_an_earlier_version_of_the_file_are_left_out() -> None:
    config = {**RUNS[0].config.model_dump(mode="json"), "optim": {"lr": 0.1}}
    rows = [_row(0), replace(_row(1), key="f" * 16, name="old", config=config)]
    kept, (note,) = rows_of_sweep(rows, RUNS, {"knn": LINE})
    assert kept == rows[:1]
    assert note.startswith("1 run (old) of the table left out: the file has no such run")
    assert "optim.clip_grad" in note


def test_a_metric_that_the_file_has_no_longer_is_not_fitted() -> None:
    row = replace(_row(0), metrics={"knn": 0.5, "old": 0.1})
    kept, notes = rows_of_sweep([row], RUNS, {"knn": LINE})
    assert (kept[0].metrics, notes) == ({"knn": 0.5}, [])


def test_values_by_another_line_are_left_out() -> None:
    kept, (note,) = rows_of_sweep([_row(0), _row(1, OTHER)], RUNS, {"knn": LINE})
    assert [row.metrics for row in kept] == [{"knn": 0.5}, {}]
    assert f"measured by {OTHER!r}, not by {LINE!r}" in note
    kept, (note,) = rows_of_table([_row(0), _row(1, OTHER), _row(2, OTHER)])  # the last line counts
    assert [row.metrics for row in kept] == [{}, {"knn": 0.5}, {"knn": 0.5}]
    assert RUNS[0].name in note


def test_values_of_other_images_are_left_out() -> None:
    kept, (note,) = rows_of_table([_row(0, images="y"), _row(1), _row(2)])
    assert [row.metrics for row in kept] == [{}, {"knn": 0.5}, {"knn": 0.5}]
    assert "measured on other images" in note
    assert "input.b.names" in note


def test_rows_without_lines_and_fingerprints_count() -> None:
    bare = replace(_row(0), lines={}, prints={})
    assert rows_of_sweep([bare, _row(1)], RUNS, {"knn": LINE}) == ([bare, _row(1)], [])


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_old_keys_of_one_run_that_of_the_completed_row_counts(
    tmp_path: Path, first: int
) -> None:
    run = replace(RUNS[0], key=key_of(RUNS[0].config))
    rows = [
        replace(_row(0), key="a" * 16, status="failed", error="out of memory"),
        replace(_row(0), key="b" * 16),
    ]
    (found,) = with_known_keys([run], [rows[first], rows[1 - first]], tmp_path)
    assert found.key == "b" * 16
    (found,) = with_known_keys([run], [replace(_row(0), key=run.key), rows[first]], tmp_path)
    assert found.key == run.key


def test_rows_of_an_earlier_version_have_the_lines_of_their_folders(tmp_path: Path) -> None:
    bare = replace(_row(0), lines={}, prints={})
    folder = tmp_path / FOLDERS / RUNS[0].name
    folder.mkdir(parents=True)
    write_record(folder, Result(bare.key, metrics={"knn": 0.5}, lines={"knn": OTHER}))
    rows = with_known_lines([bare, _row(1)], RUNS, tmp_path)
    kept, (note,) = rows_of_sweep(rows, RUNS, {"knn": LINE})
    assert [row.metrics for row in kept] == [{}, {"knn": 0.5}]
    assert f"measured by {OTHER!r}" in note
    write_record(folder, Result(bare.key, metrics={"knn": 0.7}, lines={"knn": OTHER}))
    assert with_known_lines([bare], RUNS, tmp_path) == [bare]


def test_what_a_job_has_measured_unseen_is_taken_into_a_table_of_an_earlier_version() -> None:
    bare = replace(_row(0), lines={}, prints={})
    same, new = (Result(bare.key, metrics={"knn": x}, lines={"knn": LINE}) for x in (0.5, 0.7))
    assert to_measure(bare, same, {"knn": LINE}, {}) == {}
    assert [*to_measure(bare, new, {"knn": LINE}, {})] == ["knn"]
