"""A sweep on a real Slurm: a run on two nodes, warned of the end of its time, goes on."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dinoscale.scaling.sweep.run_files import read_job, read_result
from dinoscale.scaling.sweep.table import TABLE, read_table
from tests.multinode.cluster import Host
from tests.unit.sweep.tiny_sweep import REAL_SWEEP, planned

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

RUN = planned(1)  # of those that the program trains, the long one


def test_job_on_two_nodes_that_is_warned_saves_is_requeued_and_measured(
    login: Host, tmp_path: Path
) -> None:
    out, said = tmp_path / "sweep", tmp_path / "said.txt"
    folder = out / "runs" / RUN.name
    sweep = f"{sys.executable} -c '{REAL_SWEEP}' {out} slurm 1 2 1 1 > {said} 2>&1"
    login.start(["bash", "-c", sweep])

    def logged() -> int:
        path = folder / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    _wait_until(lambda: logged() >= 3, said)
    found = read_job(folder)
    assert found is not None
    job = found.handle
    assert login.run(["scancel", "--signal=USR2", job]).code == 0  # as Slurm does near the end
    _wait_until(lambda: "Restarts=1" in login.run(["scontrol", "show", "job", job]).said, said)
    assert read_result(folder, RUN.key).ending == "stopped"
    assert login.run(["scontrol", "update", f"JobId={job}", "StartTime=now+5"]).code == 0
    _wait_until(lambda: (out / TABLE).exists() and len(read_table(out / TABLE)) == 1, said)
    (row,) = read_table(out / TABLE)
    assert (row.key, row.status, row.attempts, row.ranks) == (RUN.key, "done", 1, 2)
    assert row.curves[-1]["step"] == 96
    assert "resuming from" in (folder / "job.log").read_text()


def _wait_until(condition: Callable[[], bool], said: Path, *, timeout_s: float = 300.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, said.read_text()[-4000:] if said.exists() else "no output"
        time.sleep(0.3)  # some conditions ask Slurm by a program
