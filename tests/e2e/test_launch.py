"""`dinoscale launch` as a command: what it prints, what it starts, and the exit codes."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dinoscale.cluster.launch.commands import over_pdsh
from dinoscale.cluster.launch.hostfile import Host

ROOT = Path(__file__).resolve().parents[2]
TORCH = "from types import SimpleNamespace\ncuda = SimpleNamespace(is_available=lambda: False)\n"
_SSH = """#!/bin/sh
for last; do :; done
[ -z "$FAIL" ] || exit 255
exec sh -c "$last"
"""
_SBATCH = """#!/bin/sh
if [ "$1" = --test-only ]; then
  echo "sbatch: $SAYS" >&2
  exit ${REFUSES:-0}
fi
printf "%s\\n" "$@" > "$LOG"
command -v python > "$LOG.python"
exit 7
"""
_PROGRAMS = {"ssh": _SSH, "sbatch": _SBATCH, "pdsh": "#!/bin/sh\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Programs to be found, and two hosts that are this machine."""
    for name, text in _PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "torch.py").write_text(TORCH)  # the real one takes seconds; asked on nodes only
    (tmp_path / ".deepspeed_env").write_text(f"PYTHONPATH={tmp_path}:{ROOT}\n")
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    return tmp_path


def _launch(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    ours = {"PATH": path, "HOME": str(folder), "PYTHONPATH": str(ROOT), "LOG": str(folder / "log")}
    return subprocess.run(
        [sys.executable, "-m", "dinoscale", "launch", "quickstart", *arguments],
        env={**os.environ, **ours, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_check_reports_every_node_and_starts_nothing(folder: Path) -> None:
    how = ["--hostfile", "hosts", "--master-addr", "127.0.0.1", "--master-port", "31999"]
    done = _launch(folder, *how, "--check", f"run_dir={folder}/run", NCCL_DEBUG="INFO")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == 0
    assert "--master_port 31999 --module dinoscale train quickstart" in report["command"]
    assert [node["host"]["name"] for node in report["nodes"]] == ["a", "b"]
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["node", "a", "b"]
    assert "NCCL_DEBUG" in done.stderr  # set here, and would not be there
    assert not (folder / "run").exists()


def test_host_that_does_not_answer_stops_the_launch(folder: Path) -> None:
    done = _launch(folder, "--hostfile", "hosts", FAIL="yes")
    assert done.returncode == 2
    assert "error: nothing was started. a: cannot be reached by ssh: nothing; `ssh a" in done.stderr
    assert "; 1 more above" in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_line_is_run_with_its_words_and_its_exit_code(folder: Path) -> None:
    settings = ["run_dir=runs/a b", "data.train=/x/{0..9}.tar"]
    path = f"{folder}{os.pathsep}{os.defpath}"  # the environment is not activated
    says = "Job 1 to start at noon"
    done = _launch(folder, "--slurm", "--nodes", "2", *settings, SAYS=says, PATH=path)
    assert done.returncode == 7  # of our sbatch
    script = str(ROOT / "launchers" / "slurm.sbatch")
    assert (folder / "log").read_text().splitlines() == [
        *("--nodes", "2", script, "quickstart", *settings)
    ]
    taken = (folder / "log.python").read_text().strip()  # by the job, from PATH
    assert taken == str(Path(sys.executable).parent / "python")
    assert "Job 1 to start at noon; the nodes are not known yet" in done.stderr
    assert f"sbatch --nodes 2 {script} quickstart 'run_dir=runs/a b'" in done.stderr


def test_resources_that_slurm_refuses_stop_the_launch(folder: Path) -> None:
    done = _launch(folder, "--slurm", SAYS="error: Invalid partition name", REFUSES="1")
    assert done.returncode == 2
    assert "nothing was started. sbatch: sbatch: error: Invalid partition name" in done.stderr
    assert not (folder / "log").exists()


def test_missing_program_is_named(folder: Path) -> None:
    (folder / "sbatch").unlink()
    done = _launch(folder, "--slurm", PATH="/nonexistent")
    assert done.returncode == 2
    assert "error: sbatch is not installed here" in done.stderr


# Runs the command of a node here, with what would start its processes replaced by an echo.
_REMOTE = """#!/usr/bin/env bash
while [[ $1 != node* ]]; do shift; done
shift
exec sh -c "${*/deepspeed.launcher.launch/echo}"
"""
_WORDS = ["run_dir=it's/$HOME;`id` 50%n", "data.train=/x/{000..099}.tar", 'log.project="*" \\ #']


@pytest.mark.slow
def test_arguments_pass_through_deepspeed_and_pdsh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ssh").write_text(_REMOTE)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "echo.py").write_text("import sys\nprint(ascii(sys.argv[-4:]))\n")
    hosts = [Host("node1", 1), Host("node2", 1)]
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    line = over_pdsh(
        ["train", *_WORDS],
        hosts,
        hostfile="hosts",
        address="node1",
        port=29500,
        ssh_options=[],
        options=[],
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", shlex.join(line)],
        env={**os.environ, "PATH": path, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("node")]
    assert sorted(told) == [f"{host.name}: {['train', *_WORDS]!a}" for host in hosts]
