"""The jobs submitted to Slurm, and which of them count as alive."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dinoscale.config.sweep.executor import ExecutorConfig, SlurmConfig
from dinoscale.scaling.sweep import slurm_jobs
from dinoscale.scaling.sweep.slurm_jobs import SubmititExecutor

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "sweep"
SETTINGS: dict[str, dict[str, Any]] = {
    "one_node": {"processes": 8},
    "two_nodes": {
        "processes": 4,
        "nodes": 2,
        "slurm": {
            "partition": "gpu",
            "account": "vision lab",
            "hours": 1.5,
            "cpus_per_process": 12,
            "setup": ("module load cuda", "source ~/venv/bin/activate"),
            "options": {"constraint": "h100", "gpus-per-node": "h100:4", "qos": "long"},
        },
    },
}


def _executor(name: str, out: Path) -> SubmititExecutor:
    settings = SETTINGS[name]
    slurm = SlurmConfig(**settings.get("slurm", {}))
    return SubmititExecutor(ExecutorConfig(**{**settings, "kind": "slurm", "slurm": slurm}), out)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of Slurm's programs; sbatch takes everything for job 4711, which squeue knows."""
    folder = tmp_path / "bin"
    folder.mkdir()
    says = {"srun": "", "sbatch": "Submitted batch job 4711", "squeue": "12\\n4711\\n"}
    for name, text in says.items():
        (folder / name).write_text(f"#!/bin/sh\nprintf '{text}'\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("name", SETTINGS)
def test_script_is_the_one_on_file(name: str, tmp_path: Path) -> None:
    executor = _executor(name, tmp_path / "out")
    assert executor.start(tmp_path / "out" / "runs" / "a") == "4711"
    (script,) = (tmp_path / "out" / "submitit").rglob("*_submission.sh")
    text = script.read_text()
    shown = text.replace(str(tmp_path), "FOLDER").replace(sys.executable, "PYTHON")
    assert shown == (GOLDEN / f"{name}.sh").read_text()
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck")
    if checker is not None:
        subprocess.run([checker, "--exclude=SC1090,SC1091", script], check=True)


def test_job_has_ended_when_it_has_left_the_queue(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_jobs, "_POLL_S", {"slurm": 0.0})
    executor = _executor("one_node", tmp_path / "out")
    folder = tmp_path / "out" / "runs" / "a"
    executor.start(folder)
    assert executor.adopt(tmp_path / "b", "12")
    assert not executor.adopt(tmp_path / "c", "13")
    assert not executor.ended()
    queue = (programs / "squeue").read_text()
    (programs / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert not executor.ended()  # Slurm does not answer
    (programs / "squeue").write_text(queue.replace("4711", ""))
    assert executor.ended() == [(folder, "job 4711 (see submitit/4711)")]
    assert not executor.ended()


def test_job_that_sbatch_refuses_is_an_error(programs: Path, tmp_path: Path) -> None:
    executor = _executor("one_node", tmp_path / "out")
    (programs / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2; exit 1\n")
    with pytest.raises(OSError, match="invalid partition"):
        executor.start(tmp_path / "out" / "runs" / "a")


def test_process_of_another_program_is_no_job() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()", "submitit"], stdin=-1) as job:
        handles = {str(job.pid), str(os.getpid()), "process 7", "999999999"}
        assert slurm_jobs._processes(handles) == {str(job.pid)}
        job.kill()
        while job.poll() is None:
            pass
        assert not slurm_jobs._processes(handles)
