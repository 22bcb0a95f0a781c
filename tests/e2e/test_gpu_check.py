"""`tests/gpu/check.sh` without a GPU: what it skips, what it reports, how it ends."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dinoscale.config import load_config, micro_batch_sizes
from tests.gpu.check import CHECKS, Check, run_checks
from tests.gpu.measures import MEASURES, trial_run
from tests.harness import run_distributed

SCRIPT = Path(__file__).resolve().parents[1] / "gpu" / "check.sh"


def _check(name: str, program: str, *, gpus: int = 0, limit_s: float = 60.0) -> Check:
    return Check(name, "a program", ("-c", program), limit_s, gpus)


def test_each_check_has_a_verdict_a_reason_and_what_it_said() -> None:
    checks = [
        _check("good", "print('words'); print('{\"a\": 1}')"),
        _check("wrong", "print('{\"a\": 2}'); raise SystemExit(1)"),
        _check("words", "print('no JSON')"),
        _check("hangs", "import time; print('begun', flush=True); time.sleep(99)", limit_s=1.5),
        _check("large", "", gpus=2),
    ]
    found = run_checks(checks, gpus=1, limit_s=300)
    assert {name: result["status"] for name, result in found.items()} == {
        **{"good": "passed", "wrong": "failed", "words": "passed"},
        **{"hangs": "failed", "large": "skipped"},
    }
    assert (found["good"]["result"], found["wrong"]["result"]) == ({"a": 1}, {"a": 2})
    assert found["wrong"]["why"] == "ended with exit code 1"
    assert found["words"]["said"] == "no JSON"
    assert "did not end in" in found["hangs"]["why"]
    assert found["large"]["why"] == "needs 2 GPUs, 1 here"
    late = run_checks(checks[:1], gpus=1, limit_s=0.5)
    assert late["good"] == {
        **{"status": "not run", "why": "no time was left", "shows": "a program"},
    }
    hangs = _check("cut short", checks[3].command[1])
    assert run_checks([hangs], gpus=1, limit_s=1.5)["cut short"]["status"] == "not run"


def test_the_checks_fit_into_their_time_and_name_what_exists() -> None:
    needed = sum(check.limit_s for check in CHECKS if check.gpus == 1)
    assert needed <= 2 * 480  # limits, not what they take
    named = {check.command[2] for check in CHECKS if check.command[1] == "tests.gpu.measures"}
    assert named == MEASURES.keys()
    gathering = next(check for check in CHECKS if check.name == "stage 3 twice")
    assert gathering.gpus == 2  # with one rank DeepSpeed gathers nothing


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_size_after_the_one_auto_takes_is_tried_as_a_trial_does(world_size: int) -> None:
    config = load_config("vit_s16", ["train.micro_batch_size=auto"])
    size = micro_batch_sizes(config, world_size=world_size)[0]
    _, plan = trial_run(config, size, world_size=world_size)
    assert (plan.world_size, plan.micro_batch_size) == (world_size, size)
    assert (plan.accumulation_steps, plan.total_steps > 0) == (2, True)


def test_without_a_gpu_every_check_is_skipped_by_name() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    environment.pop("WHEELS", None)
    done = subprocess.run(
        [str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["checks"]) == [check.name for check in CHECKS]
    for result in report["checks"].values():
        assert result["status"] == "skipped"
        assert result["why"].startswith("needs ")
    assert (report["gpus"], report["failed"], report["not_run"]) == ([], [], [])


def test_wheels_are_used_on_top_of_what_the_interpreter_has(tmp_path: Path) -> None:
    """Also where that is of a virtual environment, whose packages a further one does not see."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    environment["WHEELS"] = str(tmp_path)
    command = [str(SCRIPT), "--only", "no such check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no wheels in {tmp_path}" in done.stderr
    about = "carried-1.dist-info"
    files = {
        "carried.py": "import importlib.util as u, sys; print('torch', bool(u.find_spec('torch')),"
        " file=sys.stderr)",
        "use_carried.pth": "import carried",  # read after those of the interpreter
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: carried\nVersion: 1\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{about}/RECORD": record}.items():
            wheel.writestr(name, text)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "torch True" in done.stderr
    assert "no such check" in done.stderr  # of the checks themselves, which have begun


@pytest.mark.distributed
def test_what_runs_on_ranks_runs_on_a_cpu_too() -> None:
    average, prepared = (
        run_distributed(f"tests.gpu.measures:{name}", world_size=1, timeout_s=100, **options)[0]
        for name, options in (("on_ranks_average", {"late": False}), ("on_ranks_prepare", {}))
    )
    assert len(average) == 64
    assert prepared == 4
