"""A user's mistake ends in a sentence and exit code 2, soon, and touches nothing."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dinoscale import cli
from tests.forked import ROOT, run_module

_TINY = {
    "model.patch_size": 8,
    "model.embed_dim": 32,
    "model.depth": 1,
    "model.num_heads": 1,
    "crops.global_size": 32,
    "crops.local_size": 16,
    "eval.crop": 32,
    "train.batch_size": 8,
    "train.epochs": 1,
    "optim.warmup_epochs": 0,
    "dino.warmup_teacher_temp_epochs": 0,
    "log.wandb": "false",
    "data.num_workers": 0,
}


def _dinoscale(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dinoscale", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def _refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for text in says:
        assert text in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["vit_x16"], "vit_s16"),
        (["vit_s16", "crops.num_locl=4"], "did you mean 'num_local'"),
        (["vit_s16", "crops.local_size=95"], "not a multiple of the patch size 16"),
        (["vit_s16", "train.epochs=5"], "optim.warmup_epochs"),
        (["vit_s16", "optim.lr=fast"], "optim.lr"),
        (["vit_s16", "data.lanes=4"], "data.lanes: renamed, write data.stream_readers"),
        (["no_such_file.yaml"], "no_such_file.yaml"),
    ],
)
def test_bad_configuration_is_named_as_soon_as_it_is_read(
    arguments: list[str], says: str, help_s: float
) -> None:
    begin = _children_s()
    _refused(_dinoscale("config", *arguments), says)
    assert _children_s() - begin < 8 * help_s  # two to three times; importing torch takes 12


@pytest.fixture(scope="module")
def help_s() -> float:
    """CPU time of the shortest command."""
    begin = _children_s()
    _dinoscale("--help")
    return _children_s() - begin


def _children_s() -> float:
    """CPU time of all child processes that have ended, whatever else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_bad_training_input_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    empty, broken, run = tmp_path / "empty", tmp_path / "broken.tar", tmp_path / "run"
    empty.mkdir()
    broken.write_text("<html>not found</html>")
    common = [f"{key}={value}" for key, value in _TINY.items()]
    cases = {
        "missing folder": ([f"data.train={tmp_path / 'none'}"], str(tmp_path / "none")),
        "empty folder": ([f"data.train={empty}"], str(empty)),
        "broken shard": ([f"data.train={broken}"], "broken.tar"),
        "no data": ([], "data.train"),
        "few images": (["data.train=synthetic:shapes?images=4&size=32"], "4 images"),
        "unequal": (["data.train=synthetic:shapes?images=64", "train.micro_batch_size=3"], "3"),
    }
    for name, (overrides, says) in cases.items():
        command = ("dinoscale", "train", "vit_t16", *common, f"run_dir={run}", *overrides)
        done = run_module(*command)
        assert done.returncode == 2, (name, done.stderr)
        assert "Traceback" not in done.stderr, name
        assert says in done.stderr, (name, done.stderr)
        assert not run.exists(), name


def test_a_refused_folder_leaves_no_list_of_its_files_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, temporary = tmp_path / "images", tmp_path / "temporary"
    images.mkdir()
    temporary.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(b"")
    monkeypatch.setenv("TMPDIR", str(temporary))
    settings = [f"{key}={value}" for key, value in _TINY.items()]
    done = run_module("dinoscale", "train", "vit_t16", *settings, f"data.train={images}")
    _refused(done, "2 images")
    assert not list(temporary.glob("dinoscale*"))


def test_folders_of_the_working_directory_are_taken_for_no_package(tmp_path: Path) -> None:
    for name in ("data_tools", "tests", "yaml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('of the user')")
    variables = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}  # as DeepSpeed sets it
    done = subprocess.run(
        [sys.executable, "-m", "dinoscale", "presets"],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "vit_s16" in done.stdout


@pytest.mark.parametrize(
    "line",
    [
        ["bench", "step", "vit_s16", "--profile", ""],
        ["data", "build-shards", "images", ""],
        ["plan", "vit_s16", "--gpus", "8", "--gpu-memory="],
    ],
)
def test_an_empty_argument_is_not_one_left_out(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(line)
    assert ended.value.code == 2
    assert "is empty, perhaps from a variable that is not set" in capsys.readouterr().err
    cli.run(["launch", "vit_s16", "--slurm", "--dry-run", "--options", ""])


@pytest.mark.parametrize(
    "spec",
    [
        "https://me:0123abcd@host/{a.tar",
        "pipe:curl -u me:0123abcd https://host/a.tar",
    ],
)
def test_a_password_in_a_source_is_in_no_error(spec: str) -> None:
    done = run_module("dinoscale", "data", "index", spec)
    _refused(done, "error: ")
    assert "0123abcd" not in done.stderr


def test_a_tilde_after_an_option_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("dinoscale.cli._quickstart", lambda options: seen.append(options.run_dir))
    cli.run(["quickstart", "--run-dir=~/runs"])
    assert seen == ["/home/me/runs"]
