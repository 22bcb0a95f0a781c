"""How far a sweep is, from its files."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dinoscale.scaling.sweep.run_files import RESULT, Job, Result, write_record
from dinoscale.scaling.sweep.status import as_text, read_status
from dinoscale.scaling.sweep.table import TABLE, append_row
from dinoscale.scaling.sweep.table_row import row_of
from tests.unit.sweep.tiny_sweep import planned

RUNS = [planned(number) for number in range(6)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Runs that are done, failed, running, interrupted, to be tried again, and not begun."""
    folders = [tmp_path / "runs" / run.name for run in RUNS]
    results = [
        Result(RUNS[0].key, ending="done", trained=True, seconds=3600.0),
        Result(RUNS[1].key, ending="failed", error="no memory", seconds=20.0),
        Result(RUNS[2].key, seconds=30.0),
        Result(RUNS[3].key, ending="stopped"),
        Result(RUNS[4].key, ending="failed", error="bad luck"),
    ]
    steps = [16, 2, 8, 12, 0]
    for run, folder, result, step in zip(RUNS, folders, results, steps, strict=False):
        folder.mkdir(parents=True)
        write_record(folder, Job(run.key, handle="" if run in RUNS[:2] else "x", failures=0))
        write_record(folder, result)
        lines = [json.dumps({"step": number, "loss": 1.0}) for number in range(1, step + 1)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    done = row_of(RUNS[0], Job(RUNS[0].key), results[0], metrics={"knn": 0.25, "loss": None})
    failed = row_of(RUNS[1], Job("", failures=2), results[1], metrics={}, error="no memory " * 20)
    append_row(tmp_path / TABLE, done)
    append_row(tmp_path / TABLE, failed)
    return tmp_path


def test_each_run_is_in_its_state(out: Path) -> None:
    status = read_status(RUNS, out=out)
    states = [run["state"] for run in status["runs"]]
    assert states == ["done", "failed", "running", "interrupted", "interrupted", "waiting"]
    assert [run["step"] for run in status["runs"]] == [16, 2, 8, 12, 0, 0]
    assert [run["attempts"] for run in status["runs"]] == [1, 2, 1, 0, 0, 0]
    assert status["runs"][0]["metrics"] == {"knn": 0.25, "loss": None}
    assert status["runs"][4]["error"] == "bad luck"
    totals = {"done": 1, "failed": 1, "running": 1, "interrupted": 2, "waiting": 1}
    assert status["totals"] == totals
    json.dumps(status)


def test_rest_is_estimated_from_the_runs_that_ended(out: Path) -> None:
    left = 0.5 + 0.25 + 1 + 1  # of a run of an hour
    assert read_status(RUNS, out=out)["hours_left"] == pytest.approx(left)
    assert read_status(RUNS, out=out, parallel=2)["hours_left"] == pytest.approx(left / 2)
    assert read_status(RUNS, out=out, parallel=9)["hours_left"] == pytest.approx(left / 4)
    assert read_status(RUNS, out=out / "nowhere")["hours_left"] is None


def test_job_that_is_silent_for_minutes_runs_no_longer(out: Path) -> None:
    path = out / "runs" / RUNS[2].name / RESULT
    os.utime(path, (0, 0))
    assert read_status(RUNS, out=out)["runs"][2]["state"] == "interrupted"


def test_text_is_narrow(out: Path) -> None:
    long = replace(RUNS[5], name="n" * 150)
    text = as_text(read_status([*RUNS[:5], long], out=out))
    assert max(map(len, text.splitlines())) <= 110
    assert f"{RUNS[0].name}" in text
    assert "knn 0.25, loss -" in text
    assert "no memory no memory" in text
    assert "6 runs: 1 done, 1 failed, 1 running, 2 interrupted, 1 waiting; about 2.8 hours" in text
