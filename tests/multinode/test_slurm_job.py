"""A real Slurm of two nodes: what srun tells the tasks, and launchers/slurm.sbatch as it is."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults.run_processes import newest_step, steps_logged, write_config
from tests.golden.test_trajectory import FOLDER, require_reference
from tests.multinode.cluster import ROOT, Host

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

RUNS = [{"stage": 2, "accumulation": 1}, {"stage": 3, "accumulation": 1}]
TASKS = ["--nodes=2", "--ntasks-per-node=1"]


def test_tasks_of_srun_on_two_nodes_follow_the_reference(login: Host, tmp_path: Path) -> None:
    torch.save({"folder": str(FOLDER), "runs": RUNS}, tmp_path / "arguments.pt")
    program = ["tests.harness", "tests.golden.test_trajectory:follow_trajectory", str(tmp_path)]
    done = login.run(["srun", *TASKS, "python", "-m", *program], timeout_s=300)
    assert done.code == 0, done.said[-4000:]
    ranks = [torch.load(tmp_path / f"result_{rank}.pt", weights_only=True) for rank in range(2)]
    require_reference(ranks, RUNS)


def test_batch_job_that_is_warned_saves_is_requeued_and_ends(login: Host, tmp_path: Path) -> None:
    steps, run_dir, said = 60, tmp_path / "run", tmp_path / "job.txt"
    config = str(write_config(tmp_path, stage=2, epochs=1000))
    resources = [*TASKS, "--cpus-per-task=1", "--gpus-per-node=1", f"--output={said}"]
    script = str(ROOT / "launchers" / "slurm.sbatch")
    words = ["sbatch", "--parsable", *resources, script, config]
    done = login.run([*words, f"train.stop_after_steps={steps}"])
    assert done.code == 0, done.said
    job = done.said.strip()
    _wait_until(lambda: steps_logged(run_dir) >= 3, said)
    assert login.run(["scancel", "--signal=USR1", job]).code == 0  # as Slurm does near the end
    _wait_until(lambda: "Restarts=1" in login.run(["scontrol", "show", "job", job]).said, said)
    assert f"saved, job {job} is in the queue again" in said.read_text()
    assert 3 <= newest_step(run_dir) < steps
    # Slurm would wait two minutes; in the second of its end the job would still count as killed.
    assert login.run(["scontrol", "update", f"JobId={job}", "StartTime=now+5"]).code == 0
    _wait_until(lambda: f"job {job} ended with exit code 0" in said.read_text(), said)
    assert newest_step(run_dir) == steps
    assert re.search(r"resuming from .*step_0*\d+, \d+ steps left", said.read_text())


def _wait_until(condition: Callable[[], bool], said: Path, *, timeout_s: float = 240.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, said.read_text()[-4000:] if said.exists() else "no output"
        time.sleep(0.3)  # some conditions ask Slurm by a program
