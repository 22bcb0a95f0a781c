"""Real trainings of a sweep: killed in the middle it goes on, and nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dinoscale.scaling.sweep.run_files import read_job
from dinoscale.scaling.sweep.table import TABLE, Row, read_table
from tests.unit.sweep.tiny_sweep import REAL_SWEEP, planned

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def _sweep(out: Path, kind: str, *words: str) -> subprocess.Popen[bytes]:
    with (out.parent / "said.txt").open("ab") as said:  # a pipe would live as long as the jobs
        return subprocess.Popen(
            [sys.executable, "-c", REAL_SWEEP, str(out), kind, *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=said,
        )


def _said(out: Path) -> str:
    return (out.parent / "said.txt").read_text()[-3000:]


def _wait(condition: Callable[[], bool], *, timeout_s: float = 240.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _processes_of(out: Path) -> list[int]:
    """All that have the folder of the sweep in their command line, but this one."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(out) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.info["pid"])
    return found


def _rows(out: Path) -> list[Row]:
    return sorted(read_table(out / TABLE), key=lambda row: row.seed)


def _steps(out: Path, number: int) -> int:
    path = out / "runs" / planned(number).name / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def test_killed_sweep_goes_on_and_leaves_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweep = _sweep(out, "local", "0,1", "1", "1", "2")
    _wait(lambda: sweep.poll() is not None or _steps(out, 1) > 3)
    assert sweep.poll() is None, _said(out)
    assert len(_processes_of(out)) >= 3
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    _wait(lambda: not _processes_of(out), timeout_s=200)
    log = out / "runs" / planned(1).name / "job.log"
    assert "the same command goes on from there" in log.read_text()
    again = _sweep(out, "local", "0,1", "1", "1", "2")
    assert again.wait(timeout=400) == 0, _said(out)
    rows = _rows(out)
    assert [(row.status, row.attempts, row.error) for row in rows] == [("done", 1, "")] * 2
    assert all(set(row.metrics) == {"knn", "loss"} for row in rows)
    assert all(0 <= (row.metrics["knn"] or -1) <= 1 for row in rows)
    assert [row.curves[-1]["step"] for row in rows] == [16, 96]
    assert "resuming from" in log.read_text()
    assert not _processes_of(out)


def test_stand_in_for_slurm_trains_on_two_processes_and_its_jobs_outlive_the_sweep(
    tmp_path: Path,
) -> None:
    out = tmp_path / "sweep"
    train, test = planned(0).config.eval.train, planned(0).config.eval.test
    line = f"knn --train '{train}' --test '{test}' --k 5 --num-workers 0"
    words = ("submitit_local", "0", "1", "2", "1", line)
    sweep = _sweep(out, *words)
    folder = out / "runs" / planned(0).name

    def submitted() -> bool:
        job = read_job(folder)
        return sweep.poll() is not None or (job is not None and job.handle.isdecimal())

    _wait(submitted)
    assert sweep.poll() is None, _said(out)
    sweep.terminate()
    assert sweep.wait(timeout=200) == 75, _said(out)
    assert "jobs that continue by themselves: 1" in _said(out)
    again = _sweep(out, *words)
    assert again.wait(timeout=400) == 0, _said(out)
    (row,) = _rows(out)
    assert (row.status, row.attempts, row.ranks) == ("done", 1, 2)
    assert row.metrics["measured"] is not None
    assert len([path for path in (out / "submitit").iterdir() if path.name.isdecimal()]) == 1
    _wait(lambda: not _processes_of(out), timeout_s=200)
