"""`dinoscale checkpoint`: what a user sees of a run's checkpoints and does with them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dinoscale.checkpoint.layout import directory
from dinoscale.checkpoint.load import open_run
from dinoscale.config import dump_config
from tests.distributed.tiny_run import tiny_config
from tests.forked import run_module
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

_IMAGES = "synthetic:shapes?images=24&size=16"


def train(config_file: str) -> None:
    import os

    from dinoscale.config import load_config
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    train(load_config(config_file, []), read_process(os.environ))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks with k-NN accuracies and checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(
        run_dir=str(folder / "run"),
        train={"epochs": 3, "batch_size": 6, "micro_batch_size": 3},
        data={"train": _IMAGES, "num_workers": 0},
        eval={"train": _IMAGES, "test": _IMAGES, "k": 2, "crop": 16, "resize": 16},
        engine={"zero_stage": 3, "precision": "fp32"},
        checkpoint={"keep_last": 9},
    )
    (folder / "run.yaml").write_text(dump_config(config))
    function = "tests.e2e.test_checkpoint_command:train"
    run_distributed(function, world_size=2, timeout_s=200, config_file=str(folder / "run.yaml"))
    return folder / "run"


def _call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_module("dinoscale", "checkpoint", *arguments)


def _result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


def _copy(finished: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_list_shows_steps_ranks_and_the_best(finished: Path) -> None:
    done = _call("list", finished)
    rows = _result(done)["checkpoints"]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert {(row["world_size"], row["zero_stage"]) for row in rows} == {(2, 3)}
    top1 = [row["knn_top1"] for row in rows]
    assert [row["best"] for row in rows].index(True) == max(range(3), key=lambda at: (top1[at], at))
    assert len(done.stderr.splitlines()) == 4
    assert "best" in done.stderr


def test_verify_names_the_damaged_one_and_exits_with_2(finished: Path, tmp_path: Path) -> None:
    run = _copy(finished, tmp_path)
    assert _result(_call("verify", run))["damaged"] == 0
    shard = directory(run, 8) / "shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = _call("verify", run)
    assert done.returncode == 2
    assert "shard_00001.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    assert [bool(row["damage"]) for row in result["checkpoints"]] == [False, True, False]
    assert _result(_call("verify", directory(run, 4)))["damaged"] == 0


def test_resharded_checkpoint_holds_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    result = _result(_call("reshard", finished, tmp_path / "new", "--shards", "5"))
    assert result["checkpoint"] == str(directory(tmp_path / "new", 12))
    old, new = open_run(finished), open_run(tmp_path / "new")
    assert len(list(new.path.glob("shard_*"))) == 5
    assert old.state == new.state
    assert old.kinds().keys() == new.kinds().keys()
    assert len(old.kinds()) == 4
    for kind, names in old.kinds().items():
        for name in sorted(set(names)):
            whole = old.read(kind, name, 0, old.numel(name))
            assert whole.equal(new.read(kind, name, 0, old.numel(name))), (kind, name)
    again = _call("reshard", finished, tmp_path / "new")
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_prune_keeps_the_newest_good_one_and_the_best(finished: Path, tmp_path: Path) -> None:
    run = _copy(finished, tmp_path)
    (directory(run, 12) / "state.json").write_text("{}")
    planned = _result(_call("prune", run, "--no-best", "--dry-run"))
    assert planned["deleted"] == [str(directory(run, 4))]
    assert directory(run, 4).exists()
    assert _result(_call("prune", run, "--no-best"))["kept"] == [str(directory(run, 8))]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000008", "step_00000012"]
    assert _call("prune", run, "--keep-last", "0").returncode == 2


def test_export_is_that_of_the_main_command(finished: Path, tmp_path: Path) -> None:
    result = _result(_call("export", finished, tmp_path / "weights.safetensors"))
    assert (result["step"], result["network"]) == (12, "teacher")


@pytest.mark.parametrize("task", ["list", "verify", "prune"])
def test_directory_without_checkpoints_is_named(tmp_path: Path, task: str) -> None:
    done = _call(task, tmp_path)
    assert done.returncode == 2
    assert f"no checkpoint in {tmp_path}" in done.stderr


def test_a_report_shows_where_the_teacher_looks(finished: Path, tmp_path: Path) -> None:
    done = run_module("dinoscale", "report", finished, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["state"]["how"] == "finished"
    assert result["state"]["step"] == 12
    assert not result["problems"]
    assert (tmp_path / "attention.png").stat().st_size > 1000
    page = (tmp_path / "report.html").read_text()
    assert "step_00000012 teacher: 4 images of synthetic:shapes" in page
