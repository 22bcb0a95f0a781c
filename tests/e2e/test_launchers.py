"""One configuration under every launcher: the same run, and the same refusals."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinoscale.config import RunConfig, dump_config
from dinoscale.runtime.launcher_env import _default_port
from tests.distributed.plain_run import Plain, train_plainly
from tests.distributed.tiny_run import STEPS_PER_EPOCH, tiny_config
from tests.e2e.local_files import dinoscale_on_local_files
from tests.forked import ROOT, Forked, run_module, start_module
from tests.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = 4
LAUNCHERS = {
    "python": ["python", "-m", "dinoscale"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "-m", "dinoscale"],
    "deepspeed": [
        *("deepspeed", "--num_accelerators", "2", "--master_port", "PORT"),
        *("--module", "dinoscale"),
    ],
}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """The configuration, in a folder of its own where the run goes too."""
    return _write_config(tmp_path)


def _write_config(folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(dump_config(_config(folder / "run", epochs=1, drop_path_rate=0.2)))
    return path


def _config(run_dir: Path, *, epochs: int, drop_path_rate: float) -> RunConfig:
    """A float32 run of four steps an epoch that one process and two split differently."""
    return tiny_config(
        run_dir=str(run_dir),
        model={"drop_path_rate": drop_path_rate},
        optim={"lr": 0.02, "warmup_epochs": 0},
        train={"epochs": epochs, "batch_size": 6, "micro_batch_size": 6},
        data={"train": "synthetic:shapes?images=24&size=16", "num_workers": 0},
        engine={"zero_stage": 2, "precision": "fp32"},
    )


@pytest.fixture(scope="module")
def plain() -> Plain:
    """The same network and optimizer on images of noise, for what float32 does to them."""
    config = _config(Path("unused"), epochs=STEPS // STEPS_PER_EPOCH, drop_path_rate=0.0)
    return train_plainly(config, steps=STEPS)


def _environment(**variables: str) -> dict[str, str]:
    """As in a shell with the environment activated, and no launcher around it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"(RANK|WORLD_SIZE|LOCAL_|MASTER_|SLURM_|OMPI_|PMI_|TORCHELASTIC)", name)
    }
    programs = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    ours = {"PATH": programs, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**kept, **ours, **variables}


def _launch(launcher: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    port = str(free_port())
    words = [port if word == "PORT" else word for word in LAUNCHERS[launcher]]
    return subprocess.run(
        [*words, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=_environment(),
        cwd=ROOT,
        check=False,
    )


def _losses(stdout: str, run_dir: Path) -> list[float]:
    """Losses of the steps; the summary on stdout must agree with them."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if "loss" in record]
    (printed,) = (line for line in stdout.splitlines() if line.startswith("{"))
    summary = json.loads(printed)
    assert (summary["steps"], summary["loss"]) == (STEPS, losses[-1])
    assert len(losses) == STEPS
    return losses


@pytest.fixture(scope="module")
def python_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses without any launcher, on one process."""
    config_file = _write_config(tmp_path_factory.mktemp("python"))
    done = _launch("python", "train", str(config_file))
    assert done.returncode == 0, done.stderr[-3000:]
    return _losses(done.stdout, config_file.parent / "run")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launcher_makes_the_run_of_one_process(
    config_file: Path, launcher: str, python_losses: list[float], plain: Plain
) -> None:
    done = _launch(launcher, "train", str(config_file))
    assert done.returncode == 0, done.stderr[-3000:]
    losses = _losses(done.stdout, config_file.parent / "run")
    plain.require_losses(losses, python_losses)


@pytest.mark.slow
def test_tasks_of_srun_make_the_run_of_one_process(
    config_file: Path, python_losses: list[float], plain: Plain
) -> None:
    job = _job_of_free_port()
    tasks = [_start_task(config_file, task, job) for task in range(2)]
    try:
        outputs = [task.communicate(timeout=280)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0]
    assert outputs[1] == ""
    losses = _losses(outputs[0], config_file.parent / "run")
    plain.require_losses(losses, python_losses)


def _job_of_free_port() -> str:
    """The number of a job whose tasks meet on a port that is free."""
    first = _default_port({"SLURM_JOB_ID": "0"})
    port = free_port(least=first)
    job = {"SLURM_JOB_ID": str(port - first)}
    assert _default_port(job) == port
    return job["SLURM_JOB_ID"]


def _start_task(config_file: Path, task: int, job: str) -> Forked:
    environment = _environment(
        SLURM_STEP_ID="0",
        SLURM_JOB_ID=job,
        SLURM_PROCID=str(task),
        SLURM_LOCALID=str(task),
        SLURM_NTASKS="2",
        SLURM_LAUNCH_NODE_IPADDR="127.0.0.1",
    )
    return start_module("dinoscale", "train", config_file, environment=environment)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_misspelt_key_is_refused_within_seconds(config_file: Path, launcher: str) -> None:
    begin = time.monotonic()
    done = _launch(launcher, "train", str(config_file), "optim.lrr=0.1")
    assert time.monotonic() - begin < 200  # of which deepspeed takes 12 to start
    assert done.returncode == (1 if launcher == "torchrun" else 2)  # torchrun: 1 for any failure
    assert "error: optim.lrr: unknown key, did you mean 'lr'?" in done.stderr
    assert "cli.py" not in done.stderr  # no stack of ours; torchrun prints its own
    assert not (config_file.parent / "run").exists()


def test_run_directory_of_each_node_is_refused_on_all_ranks(tmp_path: Path) -> None:
    config_file, port = _write_config(tmp_path), str(free_port())
    ranks = []
    for rank in range(2):
        node = tmp_path / f"node{rank}"
        node.mkdir()
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
        environment = _environment(MASTER_ADDR="127.0.0.1", **own)
        words = ["train", str(config_file), "run_dir=run"]
        rank_of_node = Forked(dinoscale_on_local_files, words, cwd=node, environment=environment)
        ranks.append(rank_of_node)
    begin = time.monotonic()
    try:
        said = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert time.monotonic() - begin < 150
    assert [process.returncode for process in ranks] == [2, 2], said
    host = socket.gethostname()
    for text in said:
        assert f"error: run_dir: rank 1 ({host}) cannot see in {tmp_path}/node1/run" in text
        assert "Traceback" not in text


def test_contradictory_ranks_are_refused(config_file: Path) -> None:
    environment = _environment(
        **{"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "SLURM_STEP_ID": "0"},
        **{"SLURM_PROCID": "1", "SLURM_NTASKS": "8"},
    )
    done = run_module("dinoscale", "train", config_file, environment=environment)
    assert done.returncode == 2
    assert "error: RANK=3 (RANK) contradicts SLURM_PROCID=1 (srun)" in done.stderr
    assert "Traceback" not in done.stderr


def test_port_in_use_is_named(config_file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = _environment(
            RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        begin = time.monotonic()
        done = run_module("dinoscale", "train", config_file, environment=environment)
    assert time.monotonic() - begin < 200
    assert done.returncode == 2
    assert f"error: port {port} (MASTER_PORT) cannot be used" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (config_file.parent / "run").exists()
